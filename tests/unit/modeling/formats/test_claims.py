"""Sizes that a configuration claims and the weights do not have are refused before anything of that size is built."""

import json
import struct
import time

import pytest

from sftcli.errors import DataError
from sftcli.modeling.formats.folder_check import check_model_folder
from sftcli.modeling.formats.gguf.gguf_import import converted_gguf
from tests.support.recording import RecordingSink
from tests.support.tiny_model import build_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return build_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("num_hidden_layers", 100_000, "config.json says 100000 layers, the weights hold 2"),
        ("num_hidden_layers", 10**9, "config.json says 1000000000 layers, the weights hold 2"),
        (
            "hidden_size",
            10**6,
            "says hidden_size 1000000, no side of a tensor in the weights is longer than 514",
        ),
        ("vocab_size", 4 * 10**9, "says vocab_size 4000000000"),
        ("intermediate_size", 10**8, "says intermediate_size 100000000"),
        ("num_attention_heads", 10**8, "says num_attention_heads 100000000"),
    ],
)
def test_a_size_that_the_weights_have_not_is_refused_at_once(model, key, value, words):
    config = model / "config.json"
    kept = config.read_text()
    try:
        for nested in (False, True):
            content = json.loads(kept)
            config.write_text(
                json.dumps({"text_config": content | {key: value}} if nested else content | {key: value})
            )
            began = time.process_time()
            with pytest.raises(DataError, match=words) as caught:
                check_model_folder(model)
            assert time.process_time() - began < 1
            assert caught.value.hint
    finally:
        config.write_text(kept)


def test_the_model_itself_passes(model):
    check_model_folder(model)


def gguf(*, values: bytes = b"", count: int = 0, tensors: int = 0, rest: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, count) + values + rest


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def tensor(name: str, *shape: int) -> bytes:
    return text(name) + struct.pack("<I", len(shape)) + struct.pack(f"<{len(shape)}QIQ", *shape, 0, 0)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (
            gguf(values=text("llama.block_count") + struct.pack("<II", 4, 100_000), count=1, tensors=2,
                 rest=tensor("blk.0.w", 4, 4) + tensor("blk.1.w", 4, 4)),
            "it says 100000 layers, the weights hold 2",
        ),
        (
            gguf(values=text("llama.embedding_length") + struct.pack("<II", 4, 4_000_000), count=1, tensors=1,
                 rest=tensor("blk.0.w", 4, 4)),
            "it says embedding_length 4000000",
        ),
        (gguf(tensors=1, rest=tensor("w", 2**40, 2**40)), "the tensor w has 1208925819614629174706176 numbers"),
        (gguf(tensors=1, rest=text("w") + struct.pack("<I", 2**32 - 1)), "the tensor w has 4294967295 dimensions"),
        (gguf(tensors=2**60), "cannot be converted"),
        (gguf(count=2**60), "cannot be converted"),
        (gguf(count=1, values=struct.pack("<Q", 2**62)), "a text of 4611686018427387904 bytes is longer"),
        (gguf(count=1, values=text("a") + struct.pack("<IIQ", 9, 8, 2**62)), "cannot be converted"),
    ],
)  # fmt: skip
def test_sizes_beyond_a_gguf_file_are_refused_at_once(tmp_path, content, words):
    path = tmp_path / "it.gguf"
    path.write_bytes(content + b"\0" * 64)
    began = time.process_time()
    with pytest.raises(DataError, match=words):
        converted_gguf(path, prefix="it", emit=RecordingSink())
    assert time.process_time() - began < 2
