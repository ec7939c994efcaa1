import json
from pathlib import Path

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from sftcli.cache import cache_folder
from sftcli.errors import (
    DataError,
)
from sftcli.events import Notice, Progressed, Warned
from sftcli.modeling.formats.gguf.gguf_header import read_header
from sftcli.modeling.locate.locate import locate_model
from tests.support.recording import RecordingSink
from tests.support.tiny_gguf import build_tiny_gguf
from tests.support.tiny_model import same_weights


def test_a_gguf_file_becomes_the_same_model(tiny: Path, tiny_gguf: Path, sink: RecordingSink) -> None:
    located = locate_model(str(tiny_gguf), revision=None, emit=sink)
    assert same_weights(located.folder, tiny, dtype=torch.float32)
    assert (
        load_file(located.folder / "model.safetensors").keys() == load_file(tiny / "model.safetensors").keys()
    )
    tokenizer = AutoTokenizer.from_pretrained(located.folder)
    messages = [{"role": "user", "content": "Name the ferry."}]
    theirs = AutoTokenizer.from_pretrained(tiny).apply_chat_template(messages)["input_ids"]
    assert tokenizer.apply_chat_template(messages)["input_ids"] == theirs
    assert AutoModelForCausalLM.from_pretrained(located.folder).generation_config.eos_token_id == 2


@pytest.fixture
def odd_norms(tiny: Path) -> Path:
    """The tiny model with a norm that no type of 16 bits holds, and one that float16 holds and bfloat16 does not."""
    weights = load_file(tiny / "model.safetensors")
    weights["model.layers.0.input_layernorm.weight"] += 2.0**-20
    weights["model.layers.1.input_layernorm.weight"] += 2.0**-10
    save_file(weights, tiny / "model.safetensors", metadata={"format": "pt"})
    return tiny


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
def test_numbers_of_a_file_that_is_not_quantized_are_kept_as_they_are(
    kind: str, odd_norms: Path, tmp_path: Path, sink: RecordingSink
) -> None:
    path = build_tiny_gguf(odd_norms, tmp_path / "x.gguf", kind=kind)
    folder = locate_model(str(path), revision=None, emit=sink).folder
    dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[kind]
    found, original = (load_file(place / "model.safetensors") for place in (folder, odd_norms))
    for name, tensor in original.items():
        stored = tensor if tensor.ndim == 1 else tensor.to(dtype)
        assert found[name].float().equal(stored.float()), name
        fits = stored.to(dtype).float().equal(stored.float())
        assert found[name].dtype == (dtype if fits else torch.float32), name
    told = str(dtype).removeprefix("torch.")
    assert json.loads((folder / "config.json").read_text())["dtype"] == told
    assert json.loads((folder / "source.json").read_text())["dtype"] == told
    assert sink.of(Notice)[0].text.endswith(f"to a {told} model folder, once")


def test_quantized_numbers_are_rounded_to_bfloat16(
    odd_norms: Path, tmp_path: Path, sink: RecordingSink
) -> None:
    path = build_tiny_gguf(odd_norms, tmp_path / "x.gguf", kind="Q8_0")
    folder = locate_model(str(path), revision=None, emit=sink).folder
    assert {t.dtype for t in load_file(folder / "model.safetensors").values()} == {torch.bfloat16}
    assert "exact" not in json.loads((folder / "source.json").read_text())
    again = RecordingSink()
    assert locate_model(str(path), revision=None, emit=again).folder == folder
    assert len(again.events) == 1


def test_a_folder_that_was_rounded_before_is_made_anew(
    tiny: Path, tiny_gguf: Path, sink: RecordingSink
) -> None:
    folder = locate_model(str(tiny_gguf), revision=None, emit=sink).folder
    source = json.loads((folder / "source.json").read_text())
    del source["exact"]
    (folder / "source.json").write_text(json.dumps(source | {"dtype": "bfloat16"}))
    (folder / "model.safetensors").write_bytes(bytes(source["files"]["model.safetensors"]))
    assert locate_model(str(tiny_gguf), revision=None, emit=sink).folder == folder
    assert same_weights(folder, tiny, dtype=torch.float32)
    assert not sink.of(Warned)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0"])
def test_the_head_of_a_file_is_read_as_the_package_reads_it(kind: str, tiny: Path, tmp_path: Path) -> None:
    path = build_tiny_gguf(tiny, tmp_path / "x.gguf", kind=kind)
    header, theirs = read_header(path), gguf.GGUFReader(path)
    assert header.pre_tokenizer == theirs.fields["tokenizer.ggml.pre"].contents()
    names = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
    assert header.tensors == {
        tensor.name: (names.get(tensor.tensor_type.name, ""), len(tensor.shape) > 1)
        for tensor in theirs.tensors
    }


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
    with pytest.raises(DataError, match="is a zip archive"):
        locate_model(str(tmp_path / "x.gguf"), revision=None, emit=sink)


@pytest.mark.parametrize("kept_bytes", [16, 900, 30_000])
def test_a_cut_gguf_file_is_refused_and_leaves_nothing(
    tiny_gguf: Path, sink: RecordingSink, kept_bytes: int
) -> None:
    tiny_gguf.write_bytes(tiny_gguf.read_bytes()[:kept_bytes])
    with pytest.raises(DataError, match="cannot be converted"):
        locate_model(str(tiny_gguf), revision=None, emit=sink)
    assert list((cache_folder() / "models").glob("*")) == []


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (b"<|im_start|>", b"<|im_\xfftart|>", "utf-8"),
        (b"general.architecture", b"general.architecturf", "architecture"),
    ],
)
def test_a_damaged_text_in_a_gguf_file_is_told_of_that_file_and_of_no_other(
    tiny_gguf: Path, sink: RecordingSink, old: bytes, new: bytes, words: str
) -> None:
    content = tiny_gguf.read_bytes()
    assert old in content
    tiny_gguf.write_bytes(content.replace(old, new))
    with pytest.raises(DataError, match=tiny_gguf.name) as caught:
        locate_model(str(tiny_gguf), revision=None, emit=sink)
    message = caught.value.message
    assert words in message
    assert ".sft-" not in message
    assert "JSON" not in message
    assert list((cache_folder() / "models").glob("*")) == []


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
    assert "rebuilding it" in sink.of(Warned)[0].text
    assert same_weights(located.folder, tiny, dtype=torch.float32)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
