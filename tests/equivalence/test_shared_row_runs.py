"""Whole trainings of processes that share rows: they end as that of one, and a run goes on with any number of them."""

import json
from functools import partial
from pathlib import Path

import pytest

from sftcli.config.resolve import parse_set
from sftcli.errors import UsageError
from sftcli.events import NeverStop, Session
from sftcli.services.train.resume import ResumeRequest, resume_training
from tests.support.several import (
    assert_same_training,
    checkpoint_bytes,
    events,
    make_place,
    steps,
    train_here,
    train_together,
)
from tests.support.tiny_experts import build_experts
from tests.support.tiny_tokenizer import build_tiny_tokenizer

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_place(tmp_path_factory.mktemp("shared-rows"))


def train_alone(place: Path, model: Path, run: str, *changes: str) -> None:
    """Train in one process, once."""
    if not (place / "runs" / run).exists():
        train_here(place, model, run, *changes)


def train_sharing(place: Path, model: Path, run: str, *changes: str, size: int = 2) -> None:
    """Train in ``size`` forked processes, of which two share each row."""
    train_together(
        partial(train_here, place, model, run, "training.context_processes=2", *changes), size=size
    )


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("packing", ["on", "off"])
@pytest.mark.parametrize("size", [2, 4])
def test_processes_that_share_rows_train_as_one(place: Path, size: int, packing: str, parallel: str) -> None:
    pack, run = f"training.packing={packing}", f"{packing}-{parallel}-{size}"
    train_alone(place, place / "model", packing, pack)
    train_sharing(place, place / "model", run, pack, f"training.parallel={parallel}", size=size)
    assert_same_training(place, run, packing)


def go_on(place: Path, *changes: str) -> None:
    """Go on with the run ``shared`` from its fourth step, in this process."""
    request = ResumeRequest(
        root=place / "runs", run="shared", step=4, overrides=tuple(map(parse_set, changes))
    )
    resume_training(request, Session(lambda _: None, NeverStop()))


def test_a_run_goes_on_bit_for_bit_or_with_another_number_which_it_says(place: Path) -> None:
    train_alone(place, place / "model", "off", "training.packing=off")
    train_sharing(place, place / "model", "shared")
    whole = checkpoint_bytes(place, "shared", 8)
    train_together(partial(go_on, place), size=2)
    assert checkpoint_bytes(place, "shared", 8) == whole
    assert_same_training(place, "shared", "off")
    with pytest.raises(UsageError, match="context_processes is 2, and 1 process cannot be divided by it"):
        go_on(place)
    for size in (1, 3):
        train_together(partial(go_on, place, "training.context_processes=1"), size=size)
        assert_same_training(place, "shared", "off")
        changed = json.loads((place / "runs" / "shared" / "run.json").read_text())["resumed"][-1]["machine"]
        assert changed["context processes"] == ["2", "1"]


@pytest.mark.parametrize(
    "changes",
    [
        ["training.loss=dft"],
        ["adapter.kind=lora", "training.gradient_checkpointing=true"],
        ["training.router_aux_loss=0.5"],
    ],
    ids=["dft", "lora", "experts"],
)
def test_ways_to_train_are_the_same_where_rows_are_shared(place: Path, changes: list[str]) -> None:
    model, name = place / "model", "final/model.safetensors"
    if "router" in changes[0]:
        build_experts("mixtral").save_pretrained(place / "mixtral")
        model = build_tiny_tokenizer(place / "mixtral")
    if "lora" in changes[0]:
        name = "final/adapter_model.safetensors"
    alone = changes[0].replace("=", "-")
    run = f"{alone}-shared"
    train_alone(place, model, alone, *changes)
    train_sharing(place, model, run, *changes)
    assert_same_training(place, run, alone, name)
    for key in ("grad_norm", "objective", "router_aux_loss"):
        found, expected = ([event.get(key) for event in steps(place, one)] for one in (run, alone))
        assert found == (expected if None in expected else pytest.approx(expected, abs=1e-5)), key
    loads = [
        [event.get("experts") for event in events(place, one) if event["event"] == "HeldoutDone"]
        for one in (run, alone)
    ]
    assert loads[0][0] == loads[1][0]
