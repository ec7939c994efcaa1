import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from sftcli.data.conversations.messages import TokenRow
from sftcli.data.example import Example
from sftcli.data.reading.record import Origin
from sftcli.data.rendering.render import Renderer
from sftcli.errors import DataError, NotFoundError, UsageError
from sftcli.modeling.tokenizer.chat_tokenizer import HFChatTokenizer, load_chat_tokenizer
from tests.support.chat import family_tokenizer
from tests.support.tiny_tokenizer import CHATML, build_metaspace_tokenizer, build_tiny_tokenizer

MESSAGES = [{"role": "user", "content": "Hi"}]
METASPACE = ["never", "first", "always", "prepend"]


def edit(path: Path, **changes: object) -> None:
    content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    path.write_text(json.dumps({**content, **changes}), encoding="utf-8")


def test_loading_needs_neither_torch_nor_transformers(tmp_path: Path):
    build_tiny_tokenizer(tmp_path)
    code = (
        "import sys; from pathlib import Path; from sftcli.modeling.tokenizer.chat_tokenizer import load_chat_tokenizer;"
        f"load_chat_tokenizer(Path({str(tmp_path)!r})).encode('a');"
        "sys.exit(', '.join({'torch', 'transformers', 'datasets'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == ""


def test_generation_stops_at_what_tokenizer_and_settings_name(tmp_path: Path):
    build_tiny_tokenizer(tmp_path)
    edit(tmp_path / "generation_config.json", eos_token_id=[0, 2, 9999])
    assert load_chat_tokenizer(tmp_path).stop_ids == {0, 2}


def test_generation_settings_may_name_no_stop_token(tmp_path: Path):
    build_tiny_tokenizer(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    assert load_chat_tokenizer(tmp_path).stop_ids == {2}


def test_the_model_configuration_is_asked_where_there_are_no_generation_settings(tmp_path: Path):
    build_tiny_tokenizer(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    edit(tmp_path / "config.json", eos_token_id=0)
    assert load_chat_tokenizer(tmp_path).stop_ids == {0, 2}


def test_stop_tokens_can_be_added_by_name(tmp_path: Path):
    build_tiny_tokenizer(tmp_path)
    assert load_chat_tokenizer(tmp_path, stop_tokens=["<|endoftext|>"]).stop_ids == {0, 2}
    with pytest.raises(UsageError, match=r"stop token '<none>' is not a token"):
        load_chat_tokenizer(tmp_path, stop_tokens=["<none>"])


def test_a_tokenizer_without_any_stop_token_is_refused(tmp_path: Path):
    build_tiny_tokenizer(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    edit(tmp_path / "tokenizer_config.json", eos_token=None)
    with pytest.raises(UsageError, match="define a stop token") as caught:
        load_chat_tokenizer(tmp_path)
    assert "eos_token" in caught.value.hint


def test_without_a_padding_token_padding_is_the_stop_token(tmp_path: Path):
    build_tiny_tokenizer(tmp_path, pad_token=None)
    assert load_chat_tokenizer(tmp_path).pad_id == 2


def test_named_tokens_may_be_written_as_objects(tmp_path: Path):
    build_tiny_tokenizer(tmp_path)
    edit(tmp_path / "tokenizer_config.json", eos_token={"content": "<|endoftext|>", "lstrip": False})
    assert load_chat_tokenizer(tmp_path).eos_text == "<|endoftext|>"


def test_special_tokens_are_control_and_bracketed_others_are_markup(tmp_path: Path):
    tokenizer = load_chat_tokenizer(build_tiny_tokenizer(tmp_path))
    assert tokenizer.control_ids == {0, 1, 2}
    assert {text for text, i in tokenizer.control_texts.items() if i in tokenizer.markup_ids} == {
        "<think>",
        "</think>",
    }


def test_a_token_that_looks_like_control_is_control_without_the_flag(tmp_path: Path):
    build_tiny_tokenizer(tmp_path)
    plain = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    plain.add_tokens(["<|fim_prefix|>", "word", "\n\n", "[TOOL]"])
    plain.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_chat_tokenizer(tmp_path)
    fim, word = (plain.token_to_id(text) for text in ("<|fim_prefix|>", "word"))
    assert fim in tokenizer.control_ids
    assert fim not in tokenizer.encode("<|fim_prefix|>", reading="answer")
    assert tokenizer.encode("word", reading="text") == [word]
    assert set(tokenizer.control_texts) >= {"[TOOL]", "<|fim_prefix|>"}
    assert "\n\n" not in tokenizer.control_texts


def test_the_three_readings_differ_in_control_tokens_and_markup(tmp_path: Path):
    tokenizer = load_chat_tokenizer(build_tiny_tokenizer(tmp_path))
    stop, think = (tokenizer.control_texts[text] for text in ("<|im_end|>", "<think>"))
    found = {
        reading: {stop, think} & set(tokenizer.encode("a<|im_end|><think>", reading=reading))
        for reading in ("template", "answer", "text")
    }
    assert found == {"template": {stop, think}, "answer": {think}, "text": set()}


@settings(max_examples=50, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_readings_agree_on_text_without_tokens_and_decode_to_it(text: str):
    tokenizer = family_tokenizer("chatml")
    assume(
        not any(token in text for token in tokenizer.control_texts)
    )  # hypothesis draws texts of the program too
    ids = tokenizer.encode(text, reading="text")
    assert ids == tokenizer.encode(text, reading="answer") == tokenizer.encode(text)
    assert tokenizer.decode(ids, skip_special=False) == text


@pytest.mark.parametrize("scheme", METASPACE)
def test_a_text_in_the_middle_gets_no_space_in_front(tmp_path: Path, scheme: str):
    tokenizer = load_chat_tokenizer(build_metaspace_tokenizer(tmp_path, scheme))  # type: ignore[arg-type]
    (ids,) = tokenizer.encode_many(["word"], reading="answer", continued=True)
    assert tokenizer.decode_many([ids]) == ["word"]
    (ids,) = tokenizer.encode_many([" word"], reading="text", continued=True)
    assert tokenizer.decode_many([ids]) == [" word"]


def test_when_a_space_is_put_in_front_is_found_out(tmp_path: Path):
    found = {}
    for scheme in METASPACE:
        folder = build_metaspace_tokenizer(tmp_path / scheme, scheme)  # type: ignore[arg-type]
        found[scheme] = load_chat_tokenizer(folder).prefix_space
    assert found == {"never": "never", "first": "first", "always": "always", "prepend": "always"}


def test_a_limit_saved_in_the_tokenizer_does_not_cut_rows(tmp_path: Path):
    build_tiny_tokenizer(tmp_path)
    plain = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    plain.enable_truncation(3)
    plain.enable_padding(length=8)
    plain.save(str(tmp_path / "tokenizer.json"))
    text = "The ferry leaves the harbour at seven"
    assert load_chat_tokenizer(tmp_path).encode(text) == family_tokenizer("chatml").encode(text)


@pytest.mark.parametrize("name", ["chatml", "alpaca", "modern-llm"])
def test_built_in_templates_go_before_the_tokenizers_own(tmp_path: Path, name: str):
    build_tiny_tokenizer(tmp_path, template="own")
    tokenizer = load_chat_tokenizer(tmp_path, template=name)
    assert tokenizer.template_name == name
    assert tokenizer.render(MESSAGES, tools=None, add_generation_prompt=True) != "own"


def test_chatml_stops_at_its_own_token_although_the_tokenizer_names_another(tmp_path: Path):
    build_tiny_tokenizer(tmp_path, eos_token="<|endoftext|>")
    assert load_chat_tokenizer(tmp_path, template="chatml").stop_ids == {0, 2}


def test_chatml_needs_its_tokens(tmp_path: Path):
    build_metaspace_tokenizer(tmp_path, "first")
    with pytest.raises(UsageError, match=r"needs the tokens <\|im_start\|> and <\|im_end\|>"):
        load_chat_tokenizer(tmp_path, template="chatml")


def test_a_template_may_be_a_file(tmp_path: Path):
    build_tiny_tokenizer(tmp_path)
    file = tmp_path / "mine.jinja"
    file.write_text("mine", encoding="utf-8")
    tokenizer = load_chat_tokenizer(tmp_path, template=str(file))
    assert tokenizer.render(MESSAGES, tools=None, add_generation_prompt=False) == "mine"


def test_a_template_that_is_neither_lists_what_is_built_in(tmp_path: Path):
    build_tiny_tokenizer(tmp_path)
    with pytest.raises(UsageError, match="no chat template 'chat-ml'") as caught:
        load_chat_tokenizer(tmp_path, template="chat-ml")
    assert "alpaca, chatml, modern-llm" in caught.value.hint


def test_without_a_template_nothing_is_chosen_for_the_user(tmp_path: Path):
    build_tiny_tokenizer(tmp_path, template=None)
    with pytest.raises(UsageError, match="has no chat template") as caught:
        load_chat_tokenizer(tmp_path)
    assert "alpaca, chatml, modern-llm" in caught.value.hint


def test_the_template_may_stand_in_the_configuration(tmp_path: Path):
    build_tiny_tokenizer(tmp_path, template=None)
    edit(tmp_path / "tokenizer_config.json", chat_template=CHATML)
    tokenizer = load_chat_tokenizer(tmp_path)
    assert tokenizer.render(MESSAGES, tools=None, add_generation_prompt=False) == (
        "<|im_start|>user\nHi<|im_end|>\n"
    )
    assert tokenizer.template_name == "the model's own"


def test_a_template_for_tools_is_used_where_there_are_tools(tmp_path: Path):
    build_tiny_tokenizer(tmp_path, template=None)
    edit(
        tmp_path / "tokenizer_config.json",
        chat_template=[{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}],
    )
    tokenizer = load_chat_tokenizer(tmp_path)
    assert tokenizer.render(MESSAGES, tools=None, add_generation_prompt=False) == "plain"
    assert tokenizer.render(MESSAGES, tools=[{}], add_generation_prompt=False) == "tools"


def test_plain_templates_start_as_the_tokenizer_starts_texts(tmp_path: Path):
    from tokenizers.processors import TemplateProcessing

    build_metaspace_tokenizer(tmp_path, "first")
    plain = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    plain.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    plain.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_chat_tokenizer(tmp_path, template="alpaca")
    assert tokenizer.render(MESSAGES, tools=None, add_generation_prompt=True).startswith("<s>### Instruction")
    assert any("<s>" in note for note in tokenizer.notes)


def test_a_template_that_prints_the_date_prints_a_fixed_one_and_says_so():
    tokenizer = family_tokenizer("llama3")
    assert "01 Jan 2025" in tokenizer.render(MESSAGES, tools=None, add_generation_prompt=False)
    assert tokenizer.notes == ("the template prints the date; here it is always 01 Jan 2025",)


def test_the_fingerprint_changes_with_what_could_change_ids_or_masks(tmp_path: Path):
    def fingerprint(name: str, **options: object) -> str:
        return load_chat_tokenizer(build_tiny_tokenizer(tmp_path / name, **options)).fingerprint  # type: ignore[arg-type]

    assert fingerprint("a") == fingerprint("b")
    others = {
        fingerprint("c", template=CHATML + " "),
        fingerprint("d", eos_token="<|endoftext|>", stop_token="<|im_end|>"),
        fingerprint("e", extra_special=("<x>",)),
        fingerprint("f", stop_token="<|endoftext|>"),
    }
    assert len({fingerprint("a"), *others}) == 5


def test_a_folder_without_a_tokenizer_is_not_found(tmp_path: Path):
    with pytest.raises(NotFoundError, match=r"no tokenizer\.json"):
        load_chat_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", b"{}", "is not a tokenizer"),
        ("tokenizer.json", b"\xff\xfe", "is UTF-16 text"),
        ("tokenizer.json", b"", "is empty"),
        (
            "tokenizer_config.json",
            b'{"added_tokens_decoder": {"x": {"content": "a"}}}',
            "does not fit tokenizer.json",
        ),
        (
            "tokenizer_config.json",
            b'{"added_tokens_decoder": {"600": {"content": "\\udfff"}}}',
            "holds half of a surrogate pair",
        ),
        ("chat_template.jinja", b"{% break %}", "is not valid Jinja"),
        (
            "chat_template.jinja",
            b"version https://git-lfs.github.com/spec/v1\noid sha256:4d\nsize 9\n",
            "Git LFS",
        ),
        ("tokenizer_config.json", b"{", "is not valid JSON"),
        ("tokenizer_config.json", b"[]", "holds no JSON object"),
        ("generation_config.json", b"nope", "is not valid JSON"),
        (
            "generation_config.json",
            b'{"eos_token_id": 1180591620717411303424}',
            "generation_config.json: eos_token_id holds 118",
        ),
        (
            "generation_config.json",
            b'{"eos_token_id": [2, -1]}',
            "generation_config.json: eos_token_id holds -1, which is no id",
        ),
        ("generation_config.json", b'{"eos_token_id": true}', "eos_token_id holds true, which is no id"),
        ("chat_template.jinja", b"\xff", "is not UTF-8"),
        ("chat_template.jinja", b"{% if %}", "is not valid Jinja"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, name: str, content: bytes, message: str):
    build_tiny_tokenizer(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_chat_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"normalizer": {"type": "Replace", "pattern": {"String": ""}, "content": "aaaa"}},
        {"model": {"type": "Unigram", "unk_id": None, "vocab": [], "byte_fallback": False}},
        {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
    ],
)
@pytest.mark.parametrize("is_tried", [True, False])
def test_a_tokenizer_that_fails_at_its_work_is_named_and_its_panic_is_not_shown(
    tmp_path: Path,
    changes: dict[str, object],
    is_tried: bool,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    if not is_tried:  # by a child
        monkeypatch.setattr("sys.executable", "")
    build_tiny_tokenizer(tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(
        DataError, match=r"tokenizer\.json:? (does not work|is not a tokenizer|a library fails on it): "
    ):
        load_chat_tokenizer(tmp_path)
    assert capfd.readouterr().err == ""


def test_tokens_that_only_the_configuration_knows_are_added_under_their_ids(tmp_path: Path):
    build_tiny_tokenizer(tmp_path)
    size = Tokenizer.from_file(str(tmp_path / "tokenizer.json")).get_vocab_size()
    token = {"content": "<extra>", "special": True}
    edit(tmp_path / "tokenizer_config.json", added_tokens_decoder={str(size): token})
    assert load_chat_tokenizer(tmp_path).control_texts["<extra>"] == size
    edit(tmp_path / "tokenizer_config.json", added_tokens_decoder={str(size + 7): token})
    with pytest.raises(DataError, match="'<extra>' has id"):
        load_chat_tokenizer(tmp_path)


def test_hiding_markup_moves_no_other_token(tmp_path: Path):
    build_tiny_tokenizer(tmp_path)
    plain = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    plain.add_tokens(["word"])
    plain.save(str(tmp_path / "tokenizer.json"))
    tokenizer: HFChatTokenizer = load_chat_tokenizer(tmp_path)
    assert tokenizer.encode("<think>word", reading="text")[-1] == plain.token_to_id("word")


def test_ids_of_a_vocabulary_that_leaves_some_out_are_all_in_it(tmp_path: Path):
    build_tiny_tokenizer(tmp_path)
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    vocab = content["model"]["vocab"]
    largest = max(vocab, key=vocab.get)
    vocab[largest] += 3
    for added in content["added_tokens"]:
        if added["content"] == "<think>":
            vocab["<think>"] = added["id"] = vocab[largest] + 1
    path.write_text(json.dumps(content), encoding="utf-8")
    tokenizer: HFChatTokenizer = load_chat_tokenizer(tmp_path)
    assert tokenizer.markup_ids >= {vocab["<think>"]}
    assert tokenizer.vocab_size == vocab["<think>"] + 1
    assert tokenizer.vocab_size > Tokenizer.from_file(str(path)).get_vocab_size()
    ids = (0, vocab["<think>"])
    row = TokenRow(
        origin=Origin(path="rows", line=1), input_ids=ids, loss_mask=(False, True), num_trained_turns=1
    )
    (rendered,) = Renderer(tokenizer, max_tokens=8).render_all([[row]])
    (example,) = rendered.results
    assert isinstance(example, Example)
    assert tuple(example.input_ids) == ids
