from pathlib import Path

import pytest
import torch

from sftcli.config.schema.adapter import AdapterKind
from sftcli.errors import UsageError
from sftcli.services.train import parallelism as sharing
from sftcli.services.train.parallelism import replicated_bytes, shares_weights
from sftcli.training.distributed.group import Group
from tests.support.runs import StopAtStep, settings_of, train
from tests.support.tiny_model import build_tiny_model

CPU = torch.device("cpu")


def test_state_that_cannot_be_shared_out_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sets = ("run.name=exp", "training.parallel=fsdp", "training.optimizer=adafactor")
    with pytest.raises(UsageError, match=r"training\.parallel is fsdp, and adafactor") as caught:
        train(settings_of(Path(), Path("model"), *sets), StopAtStep(9))
    assert caught.value.exit_code == 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("parallel", "size", "room", "shares"),
    [
        ("fsdp", 2, 1e15, True),
        ("fsdp", 1, 0, False),
        ("ddp", 2, 0, False),
        ("auto", 2, 1e15, False),
        ("auto", 2, 1000, True),
        ("auto", 1, 1000, False),
    ],
)
def test_auto_shares_weights_out_where_one_process_has_no_room_for_all(
    tmp_path, monkeypatch, parallel, size, room, shares
):
    folder = build_tiny_model(tmp_path / "model")
    settings = settings_of(tmp_path, folder, f"training.parallel={parallel}").settings
    monkeypatch.setattr(sharing, "total_memory_bytes", lambda _: int(room))
    assert shares_weights(settings, folder, Group(size=size), dtype=torch.float32, device=CPU) is shares


def test_adapter_needs_far_less_than_all_weights(tmp_path):
    folder = build_tiny_model(tmp_path / "model")
    full = settings_of(tmp_path, folder).settings
    lora = full.model_copy(
        update={"adapter": full.adapter.model_copy(update={"kind": AdapterKind.LORA, "rank": 1})}
    )
    assert replicated_bytes(lora, folder, torch.bfloat16) < replicated_bytes(full, folder, torch.bfloat16) / 2
