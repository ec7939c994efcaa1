from pathlib import Path

import pytest
import torch

from sftcli.config.schema.adapter import AdapterKind
from sftcli.errors import UsageError
from sftcli.services.train.start.parallelism import replicated_bytes, shares_weights
from sftcli.training.distributed.group import Group
from tests.support.runs import StopAtStep, settings_of, train
from tests.support.tiny_model import build_tiny_model

CPU = torch.device("cpu")
MANY = 10**12  # processes that share this machine's memory: none has room for a model


def test_state_that_cannot_be_shared_out_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sets = ("run.name=exp", "training.parallel=fsdp", "training.optimizer=adafactor")
    with pytest.raises(UsageError, match=r"training\.parallel is fsdp, and adafactor") as caught:
        train(settings_of(Path(), Path("model"), *sets), StopAtStep(9))
    assert caught.value.exit_code == 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("parallel", "size", "shares"),
    [
        ("fsdp", 2, True),
        ("fsdp", 1, False),
        ("ddp", MANY, False),
        ("auto", 2, False),
        ("auto", MANY, True),
        ("auto", 1, False),
    ],
)
def test_auto_shares_weights_out_where_one_process_has_no_room_for_all(tmp_path, parallel, size, shares):
    folder = build_tiny_model(tmp_path / "model")
    settings = settings_of(tmp_path, folder, f"training.parallel={parallel}").settings
    assert shares_weights(settings, folder, Group(size=size), dtype=torch.float32, device=CPU) is shares


def test_adapter_needs_far_less_than_all_weights(tmp_path):
    folder = build_tiny_model(tmp_path / "model")
    full = settings_of(tmp_path, folder).settings
    lora = full.model_copy(
        update={"adapter": full.adapter.model_copy(update={"kind": AdapterKind.LORA, "rank": 1})}
    )
    assert replicated_bytes(lora, folder, torch.bfloat16) < replicated_bytes(full, folder, torch.bfloat16) / 2
