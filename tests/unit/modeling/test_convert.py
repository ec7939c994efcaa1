import json
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from sftcli.errors import (
    DataError,
)
from sftcli.events import Progressed, Warned
from sftcli.modeling.cache import cache_folder
from sftcli.modeling.locate import locate_model
from tests.support.recording import RecordingSink
from tests.support.tiny_gguf import build_tiny_gguf
from tests.support.tiny_model import same_weights


def test_a_gguf_file_becomes_the_same_model(tiny: Path, tiny_gguf: Path, sink: RecordingSink) -> None:
    located = locate_model(str(tiny_gguf), revision=None, emit=sink)
    assert same_weights(located.folder, tiny)
    assert (
        load_file(located.folder / "model.safetensors").keys() == load_file(tiny / "model.safetensors").keys()
    )
    tokenizer = AutoTokenizer.from_pretrained(located.folder)
    messages = [{"role": "user", "content": "Name the ferry."}]
    theirs = AutoTokenizer.from_pretrained(tiny).apply_chat_template(messages)["input_ids"]
    assert tokenizer.apply_chat_template(messages)["input_ids"] == theirs
    assert AutoModelForCausalLM.from_pretrained(located.folder).generation_config.eos_token_id == 2


def test_a_converted_model_is_told_as_older_readers_know_it(tiny_gguf: Path, sink: RecordingSink) -> None:
    folder = locate_model(str(tiny_gguf), revision=None, emit=sink).folder
    config = json.loads((folder / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert tokenizer["model_input_names"] == ["input_ids", "attention_mask"]


def test_a_gguf_file_is_converted_once(tiny_gguf: Path, sink: RecordingSink) -> None:
    first = locate_model(str(tiny_gguf), revision=None, emit=sink)
    assert sink.of(Progressed)
    before = (first.folder / "model.safetensors").stat().st_ino
    again = RecordingSink()
    second = locate_model(str(tiny_gguf), revision=first.revision, emit=again)
    assert second == first
    assert (second.folder / "model.safetensors").stat().st_ino == before
    assert len(again.events) == 1


def test_numbers_are_cut_into_digits_where_the_file_says_so(
    tiny: Path, tmp_path: Path, sink: RecordingSink
) -> None:
    pieces = {}
    for kind in ("smollm", "gpt-2"):
        path = build_tiny_gguf(tiny, tmp_path / f"{kind}.gguf", pre_tokenizer=kind)
        tokenizer = AutoTokenizer.from_pretrained(locate_model(str(path), revision=None, emit=sink).folder)
        pieces[kind] = tokenizer.tokenize("12")
    assert pieces == {"smollm": ["1", "2"], "gpt-2": ["12"]}


def test_a_file_that_is_not_gguf_is_refused(tmp_path: Path, sink: RecordingSink) -> None:
    (tmp_path / "x.gguf").write_bytes(b"PK\x03\x04")
    with pytest.raises(DataError, match="is not a GGUF file"):
        locate_model(str(tmp_path / "x.gguf"), revision=None, emit=sink)


@pytest.mark.parametrize("kept_bytes", [16, 900, 30_000])
def test_a_cut_gguf_file_is_refused_and_leaves_nothing(
    tiny_gguf: Path, sink: RecordingSink, kept_bytes: int
) -> None:
    tiny_gguf.write_bytes(tiny_gguf.read_bytes()[:kept_bytes])
    with pytest.raises(DataError, match="cannot be converted"):
        locate_model(str(tiny_gguf), revision=None, emit=sink)
    assert list((cache_folder() / "models").iterdir()) == []


def test_a_gguf_file_without_all_tensors_is_refused(tiny: Path, tmp_path: Path, sink: RecordingSink) -> None:
    path = build_tiny_gguf(tiny, tmp_path / "x.gguf", leave_out="model.layers.1.mlp.up_proj.weight")
    with pytest.raises(DataError, match=r"lacks 1 tensors.*model\.layers\.1\.mlp\.up_proj\.weight"):
        locate_model(str(path), revision=None, emit=sink)


@pytest.mark.parametrize("damage", ["missing", "short", "no source", "bad source"])
def test_a_broken_folder_in_the_cache_is_made_anew_with_a_warning(
    tiny: Path, tiny_gguf: Path, sink: RecordingSink, damage: str
) -> None:
    folder = locate_model(str(tiny_gguf), revision=None, emit=sink).folder
    if damage == "missing":
        (folder / "tokenizer.json").unlink()
    elif damage == "short":
        (folder / "model.safetensors").write_bytes(b"short")
    elif damage == "no source":
        (folder / "source.json").unlink()
    else:
        (folder / "source.json").write_text("[1]")
    located = locate_model(str(tiny_gguf), revision=None, emit=sink)
    assert "made anew" in sink.of(Warned)[0].text
    assert same_weights(located.folder, tiny)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
