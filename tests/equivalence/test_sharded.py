"""Processes that share out the weights take the steps of one process; `test_processes.py` has the fast test of it."""

import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from sftcli.config.schema.adapter import AdapterSettings
from sftcli.config.schema.training import TrainingSettings
from sftcli.errors import UsageError
from sftcli.modeling.activations import checkpoint_activations
from sftcli.modeling.adapter.adapter import add_adapter
from sftcli.modeling.kernels.document_attention import attend_by_document
from sftcli.modeling.kernels.fuse import fuse_layers
from sftcli.training.checkpoint.format import read_snapshot
from sftcli.training.checkpoint.names import list_checkpoints
from sftcli.training.distributed.group import Group
from sftcli.training.distributed.traffic import Weight, sharded_traffic
from sftcli.training.loss import response_nll_sum
from sftcli.training.loss_scale import FIRST, LossScaler
from sftcli.training.optim.optimizer import make_optimizer
from sftcli.training.trainer import Trainer
from sftcli.training.weights.sharded import ShardedWeights, layers_of
from tests.support.counting import TrafficCounter
from tests.support.processes import run_together
from tests.support.recording import MemoryStore
from tests.support.saving import assert_has_parts_of, store_of
from tests.support.tiny_modern import tiny_modern
from tests.support.training import CPU, build_trainer, tiny_llama

SIZES = (2, 3)
STEPS = 3
LAST = 4  # step of a run that goes on


def settings(**changes: object) -> TrainingSettings:
    values: dict[str, object] = {
        "max_steps": STEPS,
        "batch_size": 6,
        "micro_batch_size": 2,
        "learning_rate": 1e-3,
        "warmup_steps": 0,
        "precision": "fp32",
        "packing": "off",
    }
    return TrainingSettings(**(values | changes))


def build_model(kind: str) -> torch.nn.Module:
    torch.manual_seed(0)
    if kind == "modern":
        return tiny_modern().train()
    if kind == "experts":
        config = MixtralConfig(**tiny_llama().config.to_diff_dict() | {"num_local_experts": 4})
        model = MixtralForCausalLM(config).train()
        add_adapter(model, AdapterSettings(kind="lora", rank=2, experts=True))
        return model
    model = tiny_llama(tie=kind not in ("untied", "lora"))  # no adapter on a tied head
    if kind == "fused":
        fuse_layers(model)
    if kind == "lora":
        add_adapter(model, AdapterSettings(kind="lora", rank=4, target_modules=("auto", "lm_head")))
    if kind == "checkpointing":
        checkpoint_activations(model)
    if kind == "packed":
        assert attend_by_document(model)
    return model


def trainer_of(group: Group, kind: str, *, dtype: torch.dtype = torch.float32, **changes: object) -> Trainer:
    """Return a trainer that shares out the weights among ``group``, or has them all where it is one process."""
    model = build_model(kind)
    if kind == "packed":
        changes |= {"packing": "on", "micro_batch_tokens": 48}
    trainer = build_trainer(
        settings=settings(**changes), store=MemoryStore(), emit=lambda _: None, model=model, dtype=dtype
    )
    trainer.group = group
    if group.size > 1:
        trainer.weights = ShardedWeights(build_model(kind), compute_dtype=dtype, group=group, device=CPU)
        trainer.optimizer = make_optimizer(trainer.weights.masters, trainer.settings)
        trainer.batch_loss = trainer.weights.gathered(partial(response_nll_sum, trainer.weights.model))
    return trainer


def same_as_one_process(group: Group, kind: str) -> None:
    alone, several = trainer_of(Group(), kind), trainer_of(group, kind)
    for _ in range(STEPS):
        expected, found = alone.take_step(), several.take_step()
        assert found.loss == pytest.approx(expected.loss, abs=1e-5)
        assert found.grad_norm == pytest.approx(expected.grad_norm, abs=1e-5)
    assert_has_parts_of(several.snapshot(), alone.snapshot(), group, within=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    "kind", ["tied", "untied", "fused", "lora", "experts", "checkpointing", "packed", "modern"]
)
def test_each_kind_of_training_is_that_of_one_process(tmp_path: Path, kind: str, size: int) -> None:
    run_together(same_as_one_process, size=size, folder=tmp_path, args=(kind,))


def rounded_is_near(group: Group) -> None:
    alone = trainer_of(Group(), "tied", dtype=torch.bfloat16)
    several = trainer_of(group, "tied", dtype=torch.bfloat16)
    for _ in range(STEPS):
        assert several.take_step().loss == pytest.approx(alone.take_step().loss, abs=1e-2)
    assert all(master.dtype == torch.float32 for master in several.weights.masters.values())


def scaled_is_near(group: Group) -> None:
    said: list[str] = []
    alone, several = (trainer_of(one, "tied", dtype=torch.float16) for one in (Group(), group))
    several.scaler = LossScaler(several.weights, group, lambda event: said.append(event.text))
    several.state = replace(several.state, loss_scale=2.0**40)  # some overflows at the start
    for _ in range(STEPS):
        expected, found = alone.take_step(), several.take_step()
        assert found.applied
        assert found.loss == pytest.approx(expected.loss, rel=5e-3)
        assert found.grad_norm == pytest.approx(expected.grad_norm, rel=2e-2)
    assert 1 < several.state.loss_scale < 2.0**40
    assert len(said) == 40 - int(several.state.loss_scale).bit_length() + 1
    assert several.state.loss_scale_steps == STEPS
    whole, gathered = alone.snapshot(), several.snapshot()
    for name, tensor in gathered.weights.items():
        assert tensor.dtype == torch.float32
        assert (tensor - whole.weights[name]).norm() < 0.01 * tensor.norm(), name


@pytest.mark.slow
def test_products_in_float16_are_scaled_alike_in_all_processes(tmp_path: Path) -> None:
    run_together(scaled_is_near, size=2, folder=tmp_path)


def bad_rows_of_one_process_are_a_bad_step_of_all(group: Group) -> None:
    several = trainer_of(group, "tied", dtype=torch.float16)
    several.scaler = LossScaler(several.weights, group, lambda _: None)
    whole = several.batch_loss
    factor = float("nan") if group.rank else 1.0
    several.batch_loss = lambda batch: whole(batch) * factor
    step = several.take_step()
    assert (step.applied, several.state.bad_steps, several.state.loss_scale) == (False, 1, FIRST)


@pytest.mark.slow
def test_a_loss_that_is_not_finite_in_one_process_moves_no_scale(tmp_path: Path) -> None:
    run_together(bad_rows_of_one_process_are_a_bad_step_of_all, size=2, folder=tmp_path)


def refuses_what_float16_has_not(group: Group) -> None:
    model = build_model("tied")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = 70_000.0
    with pytest.raises(UsageError, match=r"up_proj\.weight holds numbers above 65504"):
        ShardedWeights(model, compute_dtype=torch.float16, group=group, device=CPU)


@pytest.mark.slow
def test_weights_that_float16_has_not_are_refused_before_they_are_shared_out(tmp_path: Path) -> None:
    run_together(refuses_what_float16_has_not, size=2, folder=tmp_path)


@pytest.mark.slow
def test_products_in_bfloat16_leave_float32_masters(tmp_path: Path) -> None:
    run_together(rounded_is_near, size=2, folder=tmp_path)


def counts_what_is_predicted(group: Group, exchange_each_micro_batch: bool) -> None:
    trainer = trainer_of(group, "tied")
    assert isinstance(trainer.weights, ShardedWeights)
    trainer.weights.exchange_each_micro_batch = exchange_each_micro_batch
    layers = [
        [Weight(shape=tuple(p.shape)) for p in layer.parameters()]
        for layer in layers_of(trainer.weights.model)
    ]
    inner = {id(p) for layer in layers_of(trainer.weights.model) for p in layer.parameters()}
    root = [Weight(shape=tuple(p.shape)) for p in trainer.weights.model.parameters() if id(p) not in inner]
    micro_batches = -(-3 // group.size)  # three micro-batches a step
    expected = sharded_traffic(
        layers,
        root,
        processes=group.size,
        micro_batches=micro_batches,
        compute_bytes=4,
        exchanges=micro_batches if exchange_each_micro_batch else 1,
    )
    for _ in range(2):
        with TrafficCounter() as counter:
            trainer.take_step()
        assert counter.traffic == expected
    assert group.exchanged_bytes == 2 * expected.scattered


@pytest.mark.slow
@pytest.mark.parametrize("exchange_each_micro_batch", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_exchanged_bytes_are_the_predicted_ones(
    tmp_path: Path, size: int, exchange_each_micro_batch: bool
) -> None:
    run_together(counts_what_is_predicted, size=size, folder=tmp_path, args=(exchange_each_micro_batch,))


def goes_on_and_saves(
    group: Group, folder: str, notes: str, shards: bool, until: int, losses: list[float]
) -> None:
    """Go on from the newest checkpoint to step ``until``; the steps must have ``losses``, counted from the first."""
    if shards:
        trainer = trainer_of(group, "tied", max_steps=LAST)
    else:
        trainer = trainer_of(Group(), "tied", max_steps=LAST)
        trainer.group = group
    trainer.store = store_of(trainer, Path(folder), Path(notes))
    if found := list_checkpoints(Path(folder)):
        trainer.restore(read_snapshot(found[-1]))
    while trainer.state.step < until:
        assert trainer.take_step().loss == pytest.approx(losses[trainer.state.step - 1], abs=1e-5)
    trainer.save()
    group.sum([0.0])  # none begins to look before it is there


WAYS = [
    "1w",
    "2w",
    "3w",
    "4w",
    "2s",
    "3s",
    "4s",
]  # shared out on two processes is "2s", whole on each of them "2w"


@pytest.mark.slow
@pytest.mark.parametrize("saved", WAYS)
def test_a_run_goes_on_with_any_number_of_processes_in_any_mode(tmp_path: Path, saved: str) -> None:
    alone = trainer_of(Group(), "tied", max_steps=LAST)
    losses = [alone.take_step().loss for _ in range(LAST)]

    def go_on(way: str, place: Path, until: int) -> None:
        size, shards = int(way[0]), way[1] == "s"
        arguments = (str(place / "run"), str(place / f"notes-{way}-{until}"), shards, until, losses)
        if size == 1:
            goes_on_and_saves(Group(), *arguments)
        else:
            run_together(goes_on_and_saves, size=size, folder=place / f"{way}-{until}", args=arguments)

    go_on(saved, tmp_path / "first", 2)
    for resumed in WAYS:
        place = tmp_path / resumed
        shutil.copytree(tmp_path / "first" / "run", place / "run")
        go_on(resumed, place, LAST)
        last = list_checkpoints(place / "run")[-1]
        parts = int(resumed[0]) if resumed[1] == "s" else 1
        assert len([*last.glob("model*.safetensors")]) == len([*last.glob("optimizer*.safetensors")]) == parts
        for name, weight in alone.snapshot().weights.items():
            torch.testing.assert_close(read_snapshot(last).weights[name], weight, rtol=0, atol=1e-5)
