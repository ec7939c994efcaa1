"""Rows that a model has no room for are named before it trains."""

import json
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
from transformers import GPT2Config, GPT2LMHeadModel, OPTConfig, OPTForCausalLM

from sftcli.data.example import Example
from sftcli.data.prepared.store import ROWS_PER_CHUNK, TRAIN, ExampleTable, PreparedWriter
from sftcli.data.reading.record import Origin
from sftcli.errors import MismatchError
from sftcli.events import Warned
from sftcli.services.prepare.capacity import require_positions, require_room
from tests.support.recording import RecordingSink
from tests.support.training import tiny_llama

TOKENIZER = SimpleNamespace(vocab_size=403, decode=lambda ids, skip_special: f"<{ids[0]}>")


def prepared(*rows: list[int], heldout: tuple[list[int], ...] = ()):
    def table(rows):
        return ExampleTable(pa.table({"input_ids": pa.array(rows, pa.list_(pa.int32()))}))

    return SimpleNamespace(
        dataset=SimpleNamespace(train=table(rows), heldout=table(heldout), text=table(())),
        tokenizer=TOKENIZER,
    )


def require(folder, data, config):
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    sink = RecordingSink()
    require_room(data, folder, sink)
    return [event.text for event in sink.of(Warned)]


@pytest.mark.parametrize("config", [{"vocab_size": 400}, {"text_config": {"vocab_size": 400}}])
def test_tokens_beyond_the_embeddings_are_named(tmp_path, config):
    assert require(tmp_path, prepared([1, 399], [0]), config) == []
    with pytest.raises(MismatchError) as caught:
        require(tmp_path, prepared([1, 399], [400, 402, 400], heldout=([401],)), config)
    text = caught.value.message
    assert "'<400>' (400), '<401>' (401), '<402>' (402);" in text
    assert "its embeddings have 400 rows, and the tokenizer has 403 tokens" in text


@pytest.mark.parametrize("largest", [7, 2000])
def test_store_tells_which_tokens_are_in_it_and_looks_for_none_above_its_largest(tmp_path, largest):
    ids = [*range(ROWS_PER_CHUNK), largest]  # the largest is in the last of two chunks, or in the first
    with PreparedWriter(tmp_path / "store") as writer:
        for line, last in enumerate(ids):
            row = np.array([3, min(last, largest)], dtype=np.int32)
            origin = Origin(path="rows", line=line)
            writer.add(TRAIN, Example(input_ids=row, loss_mask=row > 3, origin=origin))
        stored = writer.finish({"sources": []})
    held = {3, *(min(token, largest) for token in ids)}
    for first in (0, 3, largest - 1, largest, largest + 1):
        assert stored.train.ids_from(first) == {token for token in held if token >= first}
    assert stored.heldout.ids_from(0) == set()
    assert stored.manifest["largest_ids"] == {"train": largest, "heldout": -1, "text": -1}
    del stored.train._chunks  # nothing is read where nothing is to be found
    assert stored.train.ids_from(largest + 1) == set()


def test_folder_without_a_configuration_or_a_size_tells_nothing(tmp_path):
    require_room(prepared([999]), tmp_path, RecordingSink())
    assert require(tmp_path, prepared([999]), {}) == []


def test_rows_beyond_the_positions_are_counted(tmp_path):
    data = prepared([1] * 8, [1] * 9, heldout=([1] * 12,))
    (text,) = require(tmp_path, data, {"max_position_embeddings": 8})
    assert text.startswith(
        "2 of 3 rows are longer than the 8 positions that the model was made for, up to 12 tokens"
    )


SMALL = {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
LEARNED = {
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**SMALL, n_embd=8, n_layer=1, n_head=2, n_positions=16)),
    "opt": lambda: OPTForCausalLM(
        OPTConfig(
            **SMALL, hidden_size=8, ffn_dim=8, num_hidden_layers=1, num_attention_heads=2, word_embed_proj_dim=8,
            max_position_embeddings=16,
        )
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LEARNED)
def test_rows_beyond_learned_positions_are_refused(name):
    model = LEARNED[name]()
    require_positions(model, prepared([1] * 16))
    with pytest.raises(MismatchError, match=r"a row has 17 tokens, and \w+ has learned 16 positions"):
        require_positions(model, prepared([1], heldout=([1] * 17,)))


def test_positions_that_are_computed_have_no_end():
    require_positions(tiny_llama(), prepared([1] * 5000))
