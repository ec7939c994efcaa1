from pathlib import Path

import pytest
import torch

from sftcli.config.schema.adapter import AdapterKind
from sftcli.config.schema.training import OPTIMIZERS
from sftcli.errors import UsageError
from sftcli.modeling.formats.sizes import parameters_bytes
from sftcli.services.train.start import parallelism
from sftcli.services.train.start.parallelism import choose_shards, replicated_bytes, sharing_of
from sftcli.training.distributed.group import Group
from tests.support.runs import StopAtStep, settings_of, train
from tests.support.tiny_model import build_tiny_model

CPU = torch.device("cpu")
MANY = 10**12  # processes that share this machine's memory: none has room for a model


@pytest.mark.parametrize("parallel", ["fsdp", "hsdp"])
@pytest.mark.parametrize("optimizer", [name for name, facts in OPTIMIZERS.items() if not facts.takes_shards])
def test_state_that_cannot_be_shared_out_is_refused_before_anything_is_written(
    tmp_path, monkeypatch, parallel, optimizer
):
    monkeypatch.chdir(tmp_path)
    sets = ("run.name=exp", f"training.parallel={parallel}", f"training.optimizer={optimizer}")
    with pytest.raises(UsageError, match=rf"training\.parallel is {parallel}, and {optimizer}") as caught:
        train(settings_of(Path(), Path("model"), *sets), StopAtStep(9))
    assert caught.value.exit_code == 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("parallel", "size", "per_machine", "shards"),
    [
        ("fsdp", 2, 2, 2),
        ("fsdp", 1, 1, 1),
        ("ddp", MANY, MANY, 1),
        ("auto", 2, 2, 1),
        ("auto", MANY, MANY, MANY),
        ("auto", MANY, 0, MANY),
        ("auto", 1, 1, 1),
        ("hsdp", 8, 4, 4),
        ("hsdp", 4, 4, 4),
        ("hsdp", 4, 1, 1),
    ],
)
def test_weights_are_shared_out_as_requested_or_where_a_replica_has_no_room(
    tmp_path, parallel, size, per_machine, shards
):
    folder = build_tiny_model(tmp_path / "model")
    settings = settings_of(tmp_path, folder, f"training.parallel={parallel}").settings
    group = Group(size=size, per_machine=per_machine)
    assert choose_shards(settings, folder, group, dtype=torch.float32, device=CPU) == shards


@pytest.mark.parametrize(("memory", "shards"), [(1.3, 1), (0.7, 8), (0.17, 8), (0.15, 64)])
def test_auto_shares_inside_a_machine_where_its_processes_have_room_together(
    tmp_path, monkeypatch, memory, shards
):
    folder = build_tiny_model(tmp_path / "model")
    settings = settings_of(tmp_path, folder).settings
    need = replicated_bytes(settings, folder, torch.float32)
    monkeypatch.setattr(parallelism, "total_memory_bytes", lambda _: int(memory * need))
    device = torch.device("cuda")
    found = choose_shards(settings, folder, Group(size=64, per_machine=8), dtype=torch.float32, device=device)
    assert found == shards


@pytest.mark.parametrize("shards", [1, 4, 8])
def test_a_run_that_goes_on_shares_as_it_recorded(tmp_path, shards):
    group = Group(size=8, per_machine=2)
    settings = settings_of(tmp_path, tmp_path).settings
    recorded = sharing_of(shards, group)
    assert (
        choose_shards(settings, tmp_path, group, dtype=torch.float32, device=CPU, recorded=recorded) == shards
    )


@pytest.mark.parametrize(
    ("shard_processes", "per_machine", "message"),
    [
        (3, 4, "shard_processes is 3, and 8 processes are no multiple"),
        (0, 0, "different numbers of processes"),
    ],
)
def test_groups_that_cannot_be_made_are_refused(tmp_path, shard_processes, per_machine, message):
    sets = ("training.parallel=hsdp", f"training.shard_processes={shard_processes}")
    settings = settings_of(tmp_path, tmp_path, *sets).settings
    with pytest.raises(UsageError, match=message):
        choose_shards(
            settings, tmp_path, Group(size=8, per_machine=per_machine), dtype=torch.float32, device=CPU
        )


def test_adapter_needs_far_less_than_all_weights(tmp_path):
    folder = build_tiny_model(tmp_path / "model")
    full = settings_of(tmp_path, folder).settings
    lora = full.model_copy(
        update={"adapter": full.adapter.model_copy(update={"kind": AdapterKind.LORA, "rank": 1})}
    )
    assert replicated_bytes(lora, folder, torch.bfloat16) < replicated_bytes(full, folder, torch.bfloat16) / 2


@pytest.mark.parametrize(
    ("optimizer", "bytes_a_weight"),
    [("adamw", 18), ("muon", 16), ("adafactor", 10.4), ("adamw_lean", 10.04)],
)
def test_a_replica_needs_what_its_optimizer_keeps(tmp_path, optimizer, bytes_a_weight):
    folder = build_tiny_model(tmp_path / "model")
    settings = settings_of(tmp_path, folder, f"training.optimizer={optimizer}").settings
    weights = parameters_bytes(folder) / 4
    assert replicated_bytes(settings, folder, torch.bfloat16) == pytest.approx(
        bytes_a_weight * weights, abs=1
    )
