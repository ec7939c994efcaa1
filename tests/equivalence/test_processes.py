"""One, two and three processes take the same steps: the same rows, losses, weights, and no byte more than predicted."""

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from sftcli.config.schema.training import TrainingSettings
from sftcli.events import HeldoutDone
from sftcli.services.runs.event_log import read_events
from sftcli.services.runs.folder import RunFolder
from sftcli.training.distributed.group import Group
from sftcli.training.distributed.traffic import Weight, replicated_traffic, sharded_traffic
from tests.support.counting import TrafficCounter
from tests.support.fed_rows import rows_of_steps, train_and_record
from tests.support.processes import run_together
from tests.support.recording import MemoryStore
from tests.support.several import assert_same_training, make_place, steps, train_here, train_together
from tests.support.tiny_experts import build_experts
from tests.support.tiny_tokenizer import build_tiny_tokenizer
from tests.support.training import build_trainer

STEPS, BATCH = 8, 6
BALANCE = ("training.router_aux_loss=0.5",)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_place(tmp_path_factory.mktemp("together"))


@pytest.fixture(scope="module")
def alone(place: Path) -> str:
    train_together(partial(train_and_record, place, "alone"), size=1)
    return "alone"


def predicted_bytes(model: Path, *, parallel: str, size: int) -> int:
    weights = list(AutoModelForCausalLM.from_pretrained(model).parameters())
    shapes = [Weight(shape=tuple(weight.shape)) for weight in weights]
    if parallel == "ddp":
        return replicated_traffic(shapes).summed
    return sharded_traffic([], shapes, shards=size, micro_batches=1, compute_bytes=4).scattered


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_a_training_of_several_processes_is_that_of_one(
    place: Path, alone: str, size: int, parallel: str
) -> None:
    run = f"{parallel}-{size}"
    train_together(partial(train_and_record, place, run, f"training.parallel={parallel}"), size=size)
    assert len(list((place / f"fed-{run}").iterdir())) == size
    fed, expected = (rows_of_steps(place / f"fed-{one}", place / "model") for one in (run, alone))
    assert fed == expected
    assert [len(rows) for rows in fed] == [BATCH] * STEPS
    assert_same_training(place, run, alone)
    predicted = predicted_bytes(place / "model", parallel=parallel, size=size)
    assert [event["exchanged_bytes"] for event in steps(place, run)] == [predicted] * STEPS
    assert {event["exchanged_bytes"] for event in steps(place, alone)} == {0}


@pytest.fixture(scope="module")
def balanced(place: Path) -> tuple[Path, str]:
    """A model with experts, and the training of one process with a load-balancing loss."""
    build_experts("mixtral").save_pretrained(place / "mixtral")
    model = build_tiny_tokenizer(place / "mixtral")
    train_together(partial(train_here, place, model, "balanced", *BALANCE), size=1)
    return model, "balanced"


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_experts_are_balanced_over_all_processes_and_their_load_is_that_of_all(
    place: Path, balanced: tuple[Path, str], parallel: str
) -> None:
    model, alone = balanced
    run = f"balanced-{parallel}"
    train_together(partial(train_here, place, model, run, f"training.parallel={parallel}", *BALANCE), size=2)
    assert_same_training(place, run, alone)
    found, expected = ([event["router_aux_loss"] for event in steps(place, one)] for one in (run, alone))
    assert found == pytest.approx(expected, rel=1e-5)
    loads = [
        [
            event.experts
            for event in read_events(RunFolder(place / "runs" / one))
            if isinstance(event, HeldoutDone)
        ]
        for one in (run, alone)
    ]
    assert loads[0][0] == loads[1][0]
    assert loads[1][0].keys() == {"0", "1"}


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize(
    "changes",
    [
        ["training.packing=on"],
        ["training.gradient_checkpointing=true"],
        ["training.train_embeddings=false"],
        ["training.early_stopping_evals=1", "training.eval_every_steps=2"],
    ],
    ids=["packing", "checkpointing", "frozen-embeddings", "early-stopping"],
)
def test_ways_to_train_are_the_same_on_two_processes(
    place: Path, request: pytest.FixtureRequest, changes: list[str], parallel: str
) -> None:
    run = f"{request.node.callspec.id}-two"
    here = partial(train_here, place, place / "model")
    train_together(partial(here, f"{run}-alone", *changes), size=1)
    train_together(partial(here, run, f"training.parallel={parallel}", *changes), size=2)
    assert_same_training(place, run, f"{run}-alone")


def _trained(group: Group) -> tuple[list[float], dict[str, Tensor]]:
    settings = TrainingSettings(
        max_steps=3, batch_size=6, micro_batch_size=2, learning_rate=1e-3, warmup_steps=0, precision="fp32"
    )
    trainer = build_trainer(settings=settings, store=MemoryStore(), emit=lambda _: None)
    trainer.group = group
    masters = trainer.weights.masters
    expected = replicated_traffic(Weight(shape=tuple(master.shape)) for master in masters.values())
    losses = []
    for _ in range(3):
        with TrafficCounter() as counter:
            losses.append(trainer.take_step().loss)
        assert counter.traffic.summed == (expected.summed if group.size > 1 else 0)
    assert group.exchanged_bytes == (3 * expected.summed if group.size > 1 else 0)
    return losses, {name: master.detach().clone() for name, master in masters.items()}


def same_as_alone(group: Group) -> None:
    losses, weights = _trained(group)
    alone_losses, alone = _trained(Group())
    assert losses == pytest.approx(alone_losses, abs=1e-5)
    for name, weight in weights.items():
        torch.testing.assert_close(weight, alone[name], rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3, 4])  # 4: more than a step has passes
def test_exchanged_bytes_are_the_predicted_ones_where_each_process_has_all_weights(
    size: int, tmp_path: Path
) -> None:
    run_together(same_as_alone, size=size, folder=tmp_path)
