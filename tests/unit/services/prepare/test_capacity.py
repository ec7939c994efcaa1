"""Rows that a model has no room for are named before it trains."""

import json
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import save_file
from transformers import GPT2Config, GPT2LMHeadModel, OPTConfig, OPTForCausalLM

from sftcli.data.example import Example
from sftcli.data.prepared.about import AboutRows
from sftcli.data.prepared.store import ROWS_PER_CHUNK, TRAIN, ExampleTable, PreparedWriter
from sftcli.data.reading.record import Origin
from sftcli.errors import MismatchError
from sftcli.events import Notice, Warned
from sftcli.services.prepare.capacity import require_positions, require_room
from tests.support.recording import RecordingSink
from tests.support.training import tiny_llama


def tokenizer(*, pad_id: int = 2, control_ids=frozenset({1, 2}), stop_ids=frozenset({2})) -> SimpleNamespace:
    return SimpleNamespace(
        vocab_size=403, decode=lambda ids, skip_special: f"<{ids[0]}>", pad_id=pad_id, control_ids=control_ids,
        stop_ids=stop_ids,
    )  # fmt: skip


def prepared(*rows: list[int], heldout: tuple[list[int], ...] = (), **special):
    def table(rows):
        return ExampleTable(pa.table({"input_ids": pa.array(rows, pa.list_(pa.int32()))}))

    return SimpleNamespace(
        dataset=SimpleNamespace(train=table(rows), heldout=table(heldout), text=table(())),
        tokenizer=tokenizer(**special),
    )


def require(folder, data, config, kind=Warned, tensors=None):
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(
        tensors or {"model.layers.0.mlp.up_proj.weight": torch.zeros(8, 4)}, folder / "model.safetensors"
    )
    sink = RecordingSink()
    require_room(data, folder, sink)
    return [event.text for event in sink.of(kind)]


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
        stored = writer.finish(AboutRows(audit={}))
    held = {3, *(min(token, largest) for token in ids)}
    for first in (0, 3, largest - 1, largest, largest + 1):
        assert stored.train.ids_from(first) == {token for token in held if token >= first}
    assert stored.heldout.ids_from(0) == set()
    assert stored.manifest.largest_ids == {"train": largest, "heldout": -1, "text": -1}
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


@pytest.mark.parametrize(
    ("values", "reach"),
    [
        ({"max_position_embeddings": 8, "sliding_window": 4}, 8),
        ({"max_position_embeddings": 8, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, 8),
        ({"max_position_embeddings": 8, "rope_scaling": {"type": "linear", "factor": 2.0}}, 16),
        # As of Qwen2.5, to which the scaling is added by hand, and of models that were trained with it.
        ({"max_position_embeddings": 8, "rope_parameters": {"rope_type": "yarn", "factor": 4.0,
                                                           "original_max_position_embeddings": 8}}, 32),
        ({"max_position_embeddings": 32, "rope_parameters": {"rope_type": "yarn", "factor": 4.0,
                                                            "original_max_position_embeddings": 8}}, 32),
        ({"max_position_embeddings": 32, "rope_scaling": {"rope_type": "longrope", "long_factor": [1.0]},
          "original_max_position_embeddings": 4}, 32),
        # Where layers differ the whole length is told, as in Gemma 3.
        ({"max_position_embeddings": 32, "rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8.0},
                                                            "sliding_attention": {"rope_type": "default"}}}, 32),
        ({"text_config": {"max_position_embeddings": 16}}, 16),
    ],
)  # fmt: skip
def test_rows_may_be_as_long_as_scaled_positions_reach(tmp_path, values, reach):
    assert require(tmp_path, prepared([1] * reach), values) == []
    (text,) = require(tmp_path, prepared([1] * (reach + 1)), values)
    assert f"longer than the {reach} positions" in text


def test_padding_without_an_embedding_is_refused_and_special_tokens_that_no_row_holds_are_told(tmp_path):
    config = {"vocab_size": 400}
    with pytest.raises(
        MismatchError, match=r"the padding token '<400>' \(400\) has no embedding: .* have 400 rows"
    ) as caught:
        require(tmp_path, prepared([1], pad_id=400), config)
    assert 'set "pad_token" in tokenizer_config.json' in caught.value.hint
    data = prepared([1], control_ids=frozenset({399, 400}), stop_ids=frozenset({2, 401}))
    (text,) = require(tmp_path, data, config, Notice)
    assert "'<400>' (400), '<401>' (401); the rows hold none of them" in text
    assert require(tmp_path, prepared([1], control_ids=frozenset({399})), config, Notice) == []


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
def test_rows_beyond_learned_positions_are_refused_before_a_model_is_loaded(tmp_path, name):
    LEARNED[name]().save_pretrained(tmp_path)
    require_room(prepared([1] * 16), tmp_path, RecordingSink())
    with pytest.raises(MismatchError, match="a row has 17 tokens, and the model has learned 16 positions"):
        require_room(prepared([1], heldout=([1] * 17,)), tmp_path, RecordingSink())


@pytest.mark.parametrize("name", LEARNED)
def test_rows_beyond_learned_positions_are_refused(name):
    model = LEARNED[name]()
    require_positions(model, prepared([1] * 16))
    with pytest.raises(MismatchError, match=r"a row has 17 tokens, and \w+ has learned 16 positions"):
        require_positions(model, prepared([1], heldout=([1] * 17,)))


def test_positions_that_are_computed_have_no_end():
    require_positions(tiny_llama(), prepared([1] * 5000))
