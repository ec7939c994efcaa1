"""A training whose processes read their parts of the weights is that of processes that load all of them, to the last bit."""

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sftcli.errors import DataError, UsageError
from sftcli.modeling.load import load_in_parts, load_model
from sftcli.services.train import loading
from sftcli.training.distributed.group import Group
from sftcli.training.embeddings import freeze_embeddings
from sftcli.training.weights.placement import full_tensor, local_part
from sftcli.training.weights.sharded import ShardedWeights
from tests.support.processes import run_together
from tests.support.several import (
    checkpoint_bytes,
    end,
    events,
    flags,
    make_place,
    start,
    steps,
    train_here,
    train_together,
)
from tests.support.tiny_experts import build_experts
from tests.support.tiny_model import build_tiny_model
from tests.support.tiny_tokenizer import build_tiny_tokenizer

SIZES = (2, 3)
CPU = torch.device("cpu")
UP = "model.layers.1.mlp.up_proj.weight"


def _change(folder: Path, name: str, change: Callable[[torch.Tensor], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors[name])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def both(
    group: Group, folder: str, dtype: torch.dtype, freezes: bool, shards: int
) -> tuple[ShardedWeights, ShardedWeights]:
    """Return the weights that are shared out of a whole model, and those that are read in parts."""
    whole = load_model(Path(folder), dtype=torch.float32, device=CPU)
    model, files = load_in_parts(Path(folder), dtype=torch.float32, together=group)
    if freezes:
        freeze_embeddings(whole)
        freeze_embeddings(model)
    options = {"compute_dtype": dtype, "group": group, "shards": shards, "device": CPU}
    return ShardedWeights(whole, **options), ShardedWeights(model, **options, files=files)


def has_the_same_shards_in_replicas(group: Group, folder: str) -> None:
    has_the_same_shards(group, folder, torch.bfloat16, freezes=True, shards=2)


def has_the_same_shards(
    group: Group, folder: str, dtype: torch.dtype, freezes: bool, shards: int = 0
) -> None:
    whole, parts = both(group, folder, dtype, freezes, shards or group.size)
    expected, found = (dict(one.model.named_parameters()) for one in (whole, parts))
    assert [*found] == [*expected]
    assert [*parts.masters] == [*whole.masters]
    for name, weight in found.items():
        assert weight.requires_grad == expected[name].requires_grad
        assert local_part(weight).dtype == local_part(expected[name]).dtype
        assert torch.equal(local_part(weight), local_part(expected[name])), name
        assert torch.equal(full_tensor(weight), full_tensor(expected[name])), name
    written, wanted = parts.tensors(), whole.tensors()
    assert [*written] == [*wanted]
    for name, tensor in written.items():
        assert tensor.dtype == wanted[name].dtype, name
        assert torch.equal(tensor, wanted[name]), name


@pytest.mark.slow
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", SIZES)
def test_each_process_has_the_rows_that_it_would_keep_of_the_whole(tmp_path, size, dtype, stored):
    """Frozen weights too: what rounding loses of them is known to the process that writes, and to no other."""
    for tie, freezes in ((True, False), (False, True)):
        folder = build_tiny_model(tmp_path / f"model-{tie}", tie=tie, dtype=stored)
        arguments = (str(folder), dtype, freezes)
        run_together(has_the_same_shards, size=size, folder=tmp_path / f"{tie}", args=arguments)


@pytest.mark.slow
def test_processes_with_the_same_rows_in_other_replicas_read_the_same(tmp_path):
    folder = build_tiny_model(tmp_path / "model", tie=False)
    run_together(has_the_same_shards_in_replicas, size=4, folder=tmp_path, args=(str(folder),))


def in_parts(group: Group, folder: str) -> ShardedWeights:
    model, files = load_in_parts(Path(folder), dtype=torch.float32, together=group)
    return ShardedWeights(
        model, compute_dtype=torch.float16, group=group, shards=group.size, device=CPU, files=files
    )


def refuses(group: Group, folder: str, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        in_parts(group, folder)


@pytest.mark.slow
@pytest.mark.parametrize("row", [0, -1], ids=["of-the-first", "of-the-last"])
def test_numbers_in_the_rows_of_one_process_are_refused_by_all(tmp_path, row):
    nans, large = (build_tiny_model(tmp_path / name) for name in ("nans", "large"))
    _change(nans, UP, lambda tensor: tensor[row].fill_(math.nan))
    _change(large, UP, lambda tensor: tensor[row].fill_(70_000.0))
    run_together(
        refuses,
        size=2,
        folder=tmp_path / "a",
        args=(str(nans), DataError, "non-finite values in float32: .*up_proj"),
    )
    run_together(
        refuses,
        size=2,
        folder=tmp_path / "b",
        args=(str(large), UsageError, "up_proj.weight holds numbers above 65504"),
    )


# The program


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = make_place(tmp_path_factory.mktemp("parts"))
    build_tiny_model(place / "untied", tie=False)
    build_tiny_model(place / "rounded", dtype=torch.bfloat16)
    build_experts("mixtral").save_pretrained(place / "experts")
    build_tiny_tokenizer(place / "experts")
    return place


def train_whole(place: Path, model: Path, run: str, *changes: str) -> None:
    """Train as ``train_here``, of a model that each process loads whole."""

    def refuse(*_: object, **__: object) -> None:
        raise loading.WholeOnlyError("a test wants it")

    loading.load_in_parts = refuse  # this process does nothing else
    train_here(place, model, run, *changes)


def said(place: Path, run: str) -> list[str]:
    """Return what was said, without names of runs."""
    return [
        event["text"].replace(run, "RUN")
        for event in events(place, run)
        if event["event"] in ("Notice", "Warned")
    ]


def final_bytes(place: Path, run: str) -> dict[str, bytes]:
    files = sorted((place / "runs" / run / "final").glob("*.safetensors"))
    assert files
    return {path.name: path.read_bytes() for path in files}


def decided(place: Path, run: str) -> dict:
    found: dict = json.loads((place / "runs" / run / "run.json").read_text())["decisions"]
    return found


def is_of_whole_loading(text: str) -> bool:
    return text.startswith("each process loads the whole model before weights are shared out: ")


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("model", "changes"),
    [
        ("model", []),
        ("model", ["training.packing=on", "training.precision=bf16"]),
        ("untied", ["training.train_embeddings=false", "training.precision=bf16"]),
        ("rounded", ["training.gradient_checkpointing=true", "training.train=layers.1"]),
        ("experts", ["training.router_aux_loss=0.5"]),
        ("rounded", ["adapter.kind=lora", "adapter.rank=4", "training.precision=bf16"]),
        ("model", ["adapter.kind=dora", "adapter.rank=4"]),
    ],
    ids=["tied", "packed", "frozen-embeddings", "rounded", "experts", "lora", "dora"],
)
def test_a_training_is_the_same_and_says_the_same(place, request, model, changes, size):
    runs = [f"{request.node.callspec.id}-{size}-{way}" for way in ("whole", "parts")]
    for run, train in zip(runs, (train_whole, train_here), strict=True):
        train_together(
            partial(train, place, place / model, run, "training.parallel=fsdp", *changes), size=size
        )
    whole, parts = runs
    assert [event["loss"] for event in steps(place, parts)] == [
        event["loss"] for event in steps(place, whole)
    ]
    assert decided(place, parts) == decided(place, whole)
    assert checkpoint_bytes(place, parts, 8) == checkpoint_bytes(place, whole, 8)
    assert final_bytes(place, parts) == final_bytes(place, whole)
    ours, theirs = said(place, parts), said(place, whole)
    reasons = [text for text in ours if is_of_whole_loading(text)]
    assert [text for text in ours if text not in reasons] == [
        text for text in theirs if not is_of_whole_loading(text)
    ]
    assert len(reasons) == ("adapter.kind=dora" in changes)


@pytest.mark.slow
def test_numbers_that_the_second_process_alone_reads_end_both_by_name(place):
    folder = build_tiny_model(place / "spoilt")
    _change(folder, UP, lambda tensor: tensor[-1].fill_(math.nan))
    arguments = flags(folder, "spoilt", "training.parallel=fsdp")
    done = end(start(place, "train", *arguments, "--processes", "2"))
    assert done.code == DataError.exit_code
    assert done.err.count("non-finite values in float32: model.layers.1.mlp.up_proj.weight") == 1
