"""Templates whose control tokens the tokenizer does not have."""

import pytest
from transformers import GPT2Config, GPT2LMHeadModel

from sftcli.errors import UsageError
from sftcli.events import Notice, Warned
from sftcli.modeling.locate.locate import locate_model
from sftcli.modeling.new_tokens import with_new_tokens
from sftcli.modeling.tokenizer.chat_tokenizer import load_chat_tokenizer
from sftcli.modeling.tokenizer.special_tokens import MARKER
from sftcli.services.prepare.markers import check_markers
from tests.support.recording import RecordingSink
from tests.support.tiny_tokenizer import (
    FAMILIES,
    TEMPLATES,
    build_family_tokenizer,
    build_metaspace_tokenizer,
)

PLAIN = "{% for m in messages %}{{ 'Assistant: ' + m.content + eos_token + ' [see] <b> </s>' }}{% endfor %}"
# Its words are no tokens, and its answers end in one, as in Zephyr.
ZEPHYR = "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}{% endfor %}"


def told(folder, template=None) -> list[object]:
    sink = RecordingSink()
    check_markers(load_chat_tokenizer(folder, template=template), sink)
    return sink.events


def written(folder, source: str) -> str:
    path = folder / "other.jinja"
    path.write_text(source, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("name", FAMILIES)
def test_own_templates_of_families_say_nothing(tmp_path, name):
    assert told(build_family_tokenizer(tmp_path, name)) == []


def test_ordinary_words_are_no_control_tokens(tmp_path):
    folder = build_family_tokenizer(tmp_path, "qwen3")
    assert told(folder, written(tmp_path, PLAIN)) == []
    text = "<|im_start|> [INST] [/INST] <<SYS>> <start_of_turn> <end_of_turn> <\uff5cUser\uff5c> Assistant: <b> [1] <|a b|> a<|b and c|>d"
    assert MARKER.findall(text) == [
        "<|im_start|>", "[INST]", "[/INST]", "<<SYS>>", "<start_of_turn>", "<end_of_turn>", "<\uff5cUser\uff5c>",
    ]  # fmt: skip


def test_template_of_another_family_is_told_where_its_answers_end_all_the_same(tmp_path):
    folder = build_family_tokenizer(tmp_path, "mistral")
    (event,) = told(folder, written(tmp_path, ZEPHYR))
    assert isinstance(event, Warned)
    assert (
        "other.jinja writes control tokens that this tokenizer lacks and reads as ordinary text: <|user|> ("
        in event.text
    )
    assert '--set model.new_tokens=\'["<|user|>", "<|assistant|>", "<|system|>"]\'' in event.text
    (folder / "chat_template.jinja").write_text(ZEPHYR, encoding="utf-8")
    (event,) = told(folder)
    assert isinstance(event, Notice)
    assert event.text.startswith(
        "the model's chat template writes control tokens as ordinary text: <|user|> ("
    )


def test_markers_that_a_family_writes_as_text_itself_are_only_a_notice(tmp_path):
    (event,) = told(build_metaspace_tokenizer(tmp_path, "first"))  # as Llama 2
    assert isinstance(event, Notice)
    assert "[INST] (" in event.text


@pytest.mark.parametrize(
    ("family", "template", "end"), [("mistral", "llama3", "<|eot_id|>"), ("llama3", "gemma", "<end_of_turn>")]
)
def test_answer_that_would_end_in_pieces_is_refused_and_the_way_out_works(
    tmp_path, monkeypatch, family, template, end
):
    monkeypatch.setenv("SFT_CACHE_DIR", str(tmp_path / "cache"))
    folder = tmp_path / "model"
    build_family_tokenizer(folder, family)
    GPT2LMHeadModel(GPT2Config(vocab_size=700, n_embd=8, n_layer=1, n_head=2)).save_pretrained(folder)
    build_family_tokenizer(folder, family)
    chosen = str(TEMPLATES / f"{template}.jinja")
    with pytest.raises(UsageError) as caught:
        told(folder, chosen)
    assert (
        f"ends an answer with {end}, which is no token of this tokenizer: it falls into"
        in caught.value.message
    )
    assert "--set model.new_tokens='[" in caught.value.hint
    tokens = [token for token in FAMILIES[template].special if token in caught.value.hint]
    located = locate_model(str(folder), revision=None, emit=RecordingSink())
    assert told(with_new_tokens(located, tokens, RecordingSink()).folder, chosen) == []


def test_built_in_template_names_the_tokens_to_add(tmp_path):
    folder = build_metaspace_tokenizer(tmp_path, "never")
    with pytest.raises(UsageError, match="needs the tokens") as caught:
        load_chat_tokenizer(folder, template="chatml")
    assert """--set model.new_tokens='["<|im_start|>", "<|im_end|>"]'""" in caught.value.hint
