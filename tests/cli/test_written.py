"""What a run leaves behind is what it trained, to the bit, and all that its source held."""

import pytest
import torch
from safetensors.torch import load_file

from tests.support.runs import StopAtStep, settings_of, train, write_rows
from tests.support.tiny_model import build_tiny_model

NEVER = 99
SHORT = ("training.epochs=1", "data.heldout_fraction=0", "training.eval_every_steps=0")
EMBEDDINGS = ("model.embed_tokens.weight", "lm_head.weight")


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    write_rows(folder / "rows.jsonl", 12)
    return folder


def tensors(folder):
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("trains_embeddings", [True, False], ids=["all", "frozen-embeddings"])
def test_final_weights_are_the_masters_cast_once_and_frozen_ones_those_of_the_source(
    rows, tmp_path, dtype, trains_embeddings, precision
):
    source = build_tiny_model(tmp_path / "model", dtype=dtype, tie=trains_embeddings)
    run = tmp_path / "runs" / "one"
    changes = (f"run.root={run.parent}", "run.name=one", f"training.precision={precision}", *SHORT)
    frozen = f"training.train_embeddings={str(trains_embeddings).lower()}"
    train(settings_of(rows, source, *changes, frozen), StopAtStep(NEVER))
    before, final = tensors(source), tensors(run / "final")
    masters = load_file(run / "checkpoints" / "step-00000003" / "model.safetensors")
    assert final.keys() == before.keys() == masters.keys()
    for name, tensor in final.items():
        if not trains_embeddings and name in EMBEDDINGS:
            assert torch.equal(tensor, before[name])
            continue
        assert tensor.dtype == dtype
        assert masters[name].dtype == torch.float32
        assert torch.equal(tensor, masters[name].to(dtype))
        assert not torch.equal(tensor, before[name])
        assert not torch.equal(masters[name], masters[name].bfloat16().float())
