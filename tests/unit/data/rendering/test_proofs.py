"""Faults are planted where other tools had them, one for each proof and more, and every one must be caught."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from sftcli.data.conversations.messages import Conversation, Rejected, RejectReason, RowFaultError
from sftcli.data.example import Example, RowFlag
from sftcli.data.rendering.draft import Drafter
from sftcli.data.rendering.proofs import prove_no_leak, prove_prompt, prove_span, text_fault
from sftcli.data.rendering.render import Renderer
from sftcli.data.rendering.segments import Places
from sftcli.data.rendering.tokenizer import Reading
from sftcli.modeling.tokenizer.chat_tokenizer import HFChatTokenizer, load_chat_tokenizer
from tests.support.chat import answer, conversation, family_tokenizer, marked, rendered, user
from tests.support.tiny_tokenizer import CHATML, build_tiny_tokenizer

ROW = conversation(user("a question"), answer("an answer"))


class Spoiled:
    """A tokenizer that makes ids of contents with a fault."""

    def __init__(self, tokenizer: HFChatTokenizer, fault: Callable[[str, list[int]], list[int]]) -> None:
        self._tokenizer = tokenizer
        self._fault = fault

    def __getattr__(self, name: str) -> object:
        return getattr(self._tokenizer, name)

    def encode_many(
        self, texts: Sequence[str], *, reading: Reading, continued: bool = False
    ) -> list[list[int]]:
        rows = self._tokenizer.encode_many(texts, reading=reading, continued=continued)
        return [
            self._fault(text, ids) if "question" in text or "answer" in text else ids
            for text, ids in zip(texts, rows, strict=True)
        ]


def render(tokenizer: object, row: Conversation = ROW) -> Example | Rejected:
    return Renderer(tokenizer, max_tokens=9999).render_example(row)


def with_template(folder: Path, template: str, **options: str) -> HFChatTokenizer:
    return load_chat_tokenizer(build_tiny_tokenizer(folder, template=template, **options))


def reason(result: Example | Rejected) -> RejectReason:
    assert isinstance(result, Rejected), result
    return result.reason


def test_without_a_fault_the_row_is_kept():
    assert isinstance(render(Spoiled(family_tokenizer("chatml"), lambda _, ids: ids)), Example)


@pytest.mark.parametrize(
    "change",
    [
        "replace('answer', 'reply')",
        "upper",
        "truncate(6, true, '', 0)",
        "replace(' ', '')",
        "capitalize",
        "title",
    ],
)
def test_p1_catches_a_template_that_changes_text(tmp_path: Path, change: str):
    template = CHATML.replace("message['content']", f"(message['content'] | {change})")
    assert reason(render(with_template(tmp_path, template))) in (
        RejectReason.TEMPLATE_REWRITES,
        RejectReason.TEMPLATE_DROPS,
    )


def test_p1_says_what_was_changed(tmp_path: Path):
    template = CHATML.replace("message['content']", "(message['content'] | replace('answer', 'reply'))")
    result = render(with_template(tmp_path, template))
    assert isinstance(result, Rejected)
    assert result.detail == (
        "the template writes 'reply<|im_end|>\\n' where the conversation has 'answer<|im_end|>\\n'"
    )


@pytest.mark.parametrize("opening", ["<|im_start|>assistant\nHm: ", "<|im_start|>model\n", "Assistant:"])
def test_p2_catches_a_generation_prompt_that_training_does_not_show(tmp_path: Path, opening: str):
    template = CHATML.replace(
        "{{ '<|im_start|>assistant\n' }}", "{{ '" + opening.replace("\n", "\\n") + "' }}"
    )
    result = render(with_template(tmp_path, template))
    assert reason(result) is RejectReason.SPAN_UNPROVABLE
    assert "generation is asked for turn 2 by" in str(result)


def test_p2_catches_a_generation_prompt_that_depends_on_a_content(tmp_path: Path):
    template = CHATML.replace(
        "{{ '<|im_start|>assistant\n' }}",
        "{{ '<|im_start|>assistant\n' }}{% if 'question' in messages[0]['content'] %}{{ '<think>' }}{% endif %}",
    )
    assert reason(render(with_template(tmp_path, template))) is RejectReason.SPAN_UNPROVABLE


def test_p2_catches_a_tokenizer_that_reads_the_prompt_otherwise_as_a_whole():
    class Whole(Spoiled):
        def encode_many(
            self, texts: Sequence[str], *, reading: Reading, continued: bool = False
        ) -> list[list[int]]:
            rows = super().encode_many(texts, reading=reading, continued=continued)
            return [[*ids, ids[-1]] if len(ids) > 20 and reading == "template" else ids for ids in rows]

    result = render(Whole(family_tokenizer("chatml"), lambda _, ids: ids))
    assert reason(result) is RejectReason.SPAN_UNPROVABLE


@pytest.mark.parametrize(
    "fault",
    [
        lambda text, ids: ids[1:] if "answer" in text else ids,
        lambda text, ids: ids[:-1] if "answer" in text else ids,
        lambda text, ids: [*ids, ids[-1]] if "answer" in text else ids,
        lambda text, ids: ids[::-1] if "answer" in text else ids,
        lambda text, ids: [] if "answer" in text else ids,
    ],
    ids=["first-lost", "last-lost", "last-twice", "reversed", "all-lost"],
)
def test_p3_catches_a_span_that_is_not_the_answer(fault: Callable[[str, list[int]], list[int]]):
    assert reason(render(Spoiled(family_tokenizer("chatml"), fault))) is RejectReason.SPAN_UNPROVABLE


def test_p3_catches_a_stop_token_at_which_generation_does_not_stop(tmp_path: Path):
    result = render(with_template(tmp_path, CHATML, eos_token="<|endoftext|>"))
    assert reason(result) is RejectReason.NO_STOP_TOKEN
    assert "turn 2 ends in '<|im_end|>', at which generation does not stop" in str(result)


def test_p3_catches_a_turn_without_a_stop_token(tmp_path: Path):
    template = CHATML.replace("'<|im_end|>'", "('' if loop.index == 2 else '<|im_end|>')")
    tokenizer = with_template(tmp_path, template)
    row = conversation(user("u"), answer("a"), user("v"), answer("b"))
    whole = Drafter(tokenizer)
    with pytest.raises(RowFaultError) as caught:
        whole.draft(row)
    assert caught.value.reason is RejectReason.NO_STOP_TOKEN
    first, last = rendered(tokenizer, row)  # so its answers are trained one by one
    assert marked(first, tokenizer).endswith("⟦a\n<|im_end|>⟧")
    assert marked(last, tokenizer).endswith("⟦b<|im_end|>⟧\n")


def test_a_template_without_any_control_token_gets_a_stop_token_behind_the_last_answer(tmp_path: Path):
    template = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    tokenizer = with_template(tmp_path, template + "{% if add_generation_prompt %}assistant: {% endif %}")
    example = render(tokenizer)
    assert isinstance(example, Example)
    assert marked(example, tokenizer) == "user: a question\nassistant: ⟦an answer\n<|im_end|>⟧"
    assert example.flags == {RowFlag.STOP_APPENDED}


@pytest.mark.parametrize("token", ["<|im_start|>", "<|im_end|>", "<|endoftext|>"])
@pytest.mark.parametrize("where", ["question", "answer"])
def test_p4_catches_a_smuggled_control_token(token: str, where: str):
    tokenizer = family_tokenizer("chatml")
    smuggled = tokenizer.control_texts[token]
    spoiled = Spoiled(tokenizer, lambda text, ids: [*ids[:1], smuggled, *ids[1:]] if where in text else ids)
    assert reason(render(spoiled)) is RejectReason.CONTROL_TOKEN


def test_p4_catches_a_tokenizer_that_lets_contents_name_control_tokens():
    class Naive(Spoiled):
        def encode_many(
            self, texts: Sequence[str], *, reading: Reading, continued: bool = False
        ) -> list[list[int]]:
            return super().encode_many(texts, reading="template", continued=continued)

    tokenizer = Naive(family_tokenizer("chatml"), lambda _, ids: ids)
    for row in (conversation(user("<|im_end|>"), answer("a")), conversation(user("u"), answer("<|im_end|>"))):
        assert reason(render(tokenizer, row)) is RejectReason.CONTROL_TOKEN


def test_p4_catches_markup_in_a_prompt():
    tokenizer = family_tokenizer("chatml")
    think = tokenizer.control_texts["<think>"]
    spoiled = Spoiled(tokenizer, lambda text, ids: [think, *ids] if "question" in text else ids)
    assert reason(render(spoiled)) is RejectReason.CONTROL_TOKEN


def test_an_answer_in_another_normal_form_is_kept_and_noted_where_the_tokenizer_changes_it(tmp_path: Path):
    from tokenizers import Tokenizer, normalizers

    folder = build_tiny_tokenizer(tmp_path)
    plain = Tokenizer.from_file(str(folder / "tokenizer.json"))
    plain.normalizer = normalizers.NFC()
    plain.save(str(folder / "tokenizer.json"))
    tokenizer = load_chat_tokenizer(folder)
    example = render(tokenizer, conversation(user("u"), answer("cafe\u0301")))
    assert isinstance(example, Example)
    assert "caf\u00e9" in marked(example, tokenizer)
    assert example.flags == {RowFlag.NORMALIZED}


def test_a_tokenizer_that_loses_letters_is_caught(tmp_path: Path):
    from tokenizers import Tokenizer, normalizers

    folder = build_tiny_tokenizer(tmp_path)
    plain = Tokenizer.from_file(str(folder / "tokenizer.json"))
    plain.normalizer = normalizers.Lowercase()
    plain.save(str(folder / "tokenizer.json"))
    tokenizer = load_chat_tokenizer(folder)
    assert reason(render(tokenizer, conversation(user("u"), answer("Hello")))) is RejectReason.SPAN_UNPROVABLE


def test_a_span_must_hold_every_content_in_order():
    def prove(contents: list[str]) -> None:
        prove_span([5, 9], "abc", "abcdef", contents=contents, stop_ids=frozenset({9}), turn=0)

    prove(["a", "bc"])
    for contents in (["bc", "a"], ["abcd"]):
        with pytest.raises(RowFaultError, match="whole content"):
            prove(contents)


@pytest.mark.parametrize(
    ("ids", "decoded", "message"),
    [
        ([], "", "no stop token"),
        ([5], "abc", "no stop token"),
        ([9, 5, 9], "abc", "goes on behind a stop token"),
        ([5, 9], "abd", "read 'd' where its text is 'cdef'"),
    ],
)
def test_a_span_is_refused_where_it_is_not_text_and_stop_token(ids: list[int], decoded: str, message: str):
    with pytest.raises(RowFaultError, match=message):
        prove_span(ids, decoded, "abcdef", contents=[], stop_ids=frozenset({9}), turn=0)


def test_a_prompt_must_be_how_the_row_begins():
    prove_prompt("ab", "abc", turn=0)
    with pytest.raises(RowFaultError, match="turn 1 is asked for by 'ax'"):
        prove_prompt("ax", "abc", turn=0)


def test_a_leak_is_only_a_forbidden_token_where_a_content_stands():
    ids = np.array([1, 2, 1], dtype=np.int32)
    forbidden = np.array([0, Places.OTHERS, 0], dtype=np.uint8)
    template, answer, other = 0, Places.TRAINED | Places.ANSWERS, Places.OTHERS
    prove_no_leak(ids, np.array([template, other, answer], dtype=np.uint8), forbidden)
    with pytest.raises(RowFaultError, match="control token with id 1"):
        prove_no_leak(ids, np.array([template, other, other], dtype=np.uint8), forbidden)


def test_texts_that_differ_in_length_are_quoted_from_where_one_ends():
    assert text_fault("abc", "ab").detail == "the template writes 'c' where the conversation has ''"
