"""Which ways of training fit: what is predicted of those that were not measured, and how it is shown."""

import io

import pytest
import torch
from rich.console import Console

from sftcli.cli.results.results import ways_table
from sftcli.config.schema.settings import Settings
from sftcli.config.schema.training import Checkpointing, OptimizerName, TrainingSettings
from sftcli.services.train.ways import Kind, Sizes, ways_beside
from sftcli.training.optim.optimizer import optimizer_tensors
from tests.support.recording import MemoryStore, RecordingSink
from tests.support.training import build_trainer

GB = 10**9
# A model of 8 billion weights on a GPU, bfloat16, 8,192 tokens at once.
SIZES = Sizes(
    trained=8 * GB, total=8 * GB, embeddings=GB, adapter=GB // 25, itemsize=2, is_bf16=True,
    pass_bytes=40 * GB, inputs_bytes=4 * GB, copies=False,
)  # fmt: skip


def ways(*, settings=None, memory=80 * GB, peak=190 * GB, has_cuda=True, has_one_pass=True, sizes=SIZES):
    return ways_beside(
        Settings().model_copy(update=settings or {}),
        sizes,
        peak=peak,
        memory=memory,
        has_cuda=has_cuda,
        has_one_pass=has_one_pass,
    )


def found(every):
    return {(way.name, way.checkpointing): way for way in every}


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_lean", "muon"])
@pytest.mark.parametrize(("dtype", "size"), [(torch.bfloat16, 2), (torch.float32, 4)])
def test_what_is_predicted_is_what_a_trainer_holds(optimizer, dtype, size):
    settings = TrainingSettings(
        optimizer=optimizer, max_steps=1, batch_size=2, micro_batch_size=2, learning_rate=1e-3, warmup_steps=0
    )
    made = build_trainer(settings=settings, store=MemoryStore(), emit=RecordingSink(), dtype=dtype)
    made.take_step()
    weights = made.weights
    masters = weights.masters
    held = [*weights.model.parameters(), *masters.values(), *weights.remainders.values()]
    held += optimizer_tensors(made.optimizer, masters).values()
    storages = {part.untyped_storage().data_ptr(): part.untyped_storage().nbytes() for part in held}
    numbers = sum(master.numel() for master in masters.values())
    sizes = Sizes(
        trained=numbers, total=numbers, embeddings=0, adapter=0, itemsize=size, is_bf16=size == 2,
        pass_bytes=0, inputs_bytes=0, copies=False,
    )  # fmt: skip
    predicted = Kind(optimizer=OptimizerName(optimizer), releases=True).bytes(sizes)
    assert sum(storages.values()) == pytest.approx(predicted, rel=0.04)


def test_way_that_is_set_has_the_peak_that_was_measured_and_others_differ_by_what_they_hold():
    by_name = found(ways())
    (measured,) = [way for way in by_name.values() if way.is_measured]
    assert (measured.name, measured.peak_bytes, measured.fits) == ("adamw", 190 * GB, False)
    needs = {name: (190 * GB - way.peak_bytes) / GB / 8 for (name, on), way in by_name.items() if not on}
    assert needs["adamw_lean"] == pytest.approx(
        2 + 8 - 2.04
    )  # bytes a weight: no copy, and moments of 8 bits
    assert needs["adamw_lean, released"] == pytest.approx(2 + 8 - 2.04 + 4)
    assert by_name["adamw", True].peak_bytes == 154 * GB
    assert by_name["adapter", False].fits
    assert by_name["adapter, 4-bit model", True].peak_bytes < by_name["adapter", True].peak_bytes
    assert by_name["adamw_lean, released", True].fits  # 58 GB
    assert by_name["adamw_lean, released", True].settings == [
        "training.optimizer=adamw_lean",
        "training.release_gradients=true",
        "training.gradient_checkpointing=true",
    ]


def test_what_cannot_be_taken_is_not_listed():
    names = {name for name, _ in found(ways(has_cuda=False, has_one_pass=False))}
    assert not names & {"adapter, 4-bit model", "paged_adamw_8bit", "adamw_lean, released"}
    assert {"adamw", "adamw_lean", "adafactor", "adapter"} <= names
    no_checkpointing = Sizes(**{name: getattr(SIZES, name) for name in SIZES.__slots__} | {"inputs_bytes": 0})
    assert {on for _, on in found(ways(sizes=no_checkpointing))} == {False}


def test_copy_of_a_checkpoint_counts_where_it_is_in_the_same_memory():
    with_copy = Sizes(**{name: getattr(SIZES, name) for name in SIZES.__slots__} | {"copies": True})
    kind = Kind(optimizer=OptimizerName.ADAMW)
    assert kind.bytes(with_copy) - kind.bytes(SIZES) == 12 * 8 * GB


def test_pass_that_was_measured_with_checkpointing_tells_nothing_of_one_without():
    training = TrainingSettings(gradient_checkpointing="selective", optimizer="adafactor")
    every = ways(settings={"training": training})
    assert {way.checkpointing for way in every} == {True}
    assert [way.name for way in every if way.is_measured] == ["adafactor"]
    assert Checkpointing.SELECTIVE.value in " ".join(every[0].settings)


def test_memory_that_is_not_known_says_nothing():
    assert {way.fits for way in ways(memory=0)} == {None}


@pytest.mark.parametrize("columns", [60, 100, 160])
def test_table_fits_on_narrow_screens_in_columns(columns):
    stream = io.StringIO()
    Console(file=stream, width=columns, color_system=None).print(ways_table(ways()))
    lines = stream.getvalue().splitlines()
    assert len(lines) == 1 + len({way.name for way in ways()})
    assert max(map(len, lines)) <= columns
    assert lines[1].split() == ["adamw", "190.0", "GB", "no,", "as", "set", "154.0", "GB", "no"]
