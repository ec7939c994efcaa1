"""AdamW in 10 bytes a weight: masters in two halves and moments of 8 bits, and what that must not change."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from sftcli.config.schema.run import CheckpointSettings
from sftcli.config.schema.training import TrainingSettings
from sftcli.events import NeverStop, StepDone
from sftcli.training.checkpoint.format import read_snapshot
from sftcli.training.checkpoint.names import list_checkpoints
from sftcli.training.checkpoint.store import DirectoryCheckpointStore
from sftcli.training.optim.eight_bits import BLOCK, Blocks, Noise, packed, unpacked
from sftcli.training.optim.optimizer import make_optimizer, optimizer_tensors
from sftcli.training.weights.masters import MasterWeights
from sftcli.training.weights.split import SplitWeights, join, split
from tests.support.recording import MemoryStore, RecordingSink, StopAfter, assert_equal_bits
from tests.support.runs import StopAtStep, settings_of, train, write_rows
from tests.support.tiny_model import build_tiny_model
from tests.support.training import build_trainer, tiny_llama

PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def trainer(optimizer="adamw_lean", *, dtype=torch.bfloat16, store=None, sink=None, tie=True, **changes):
    values = {
        "max_steps": 6,
        "batch_size": 8,
        "micro_batch_size": 4,
        "learning_rate": 3e-3,
        "warmup_steps": 2,
    }
    settings = TrainingSettings(optimizer=optimizer, packing="off", **(values | changes))
    return build_trainer(
        settings=settings,
        store=store or MemoryStore(),
        emit=sink or RecordingSink(),
        dtype=dtype,
        model=tiny_llama(tie=tie),
    )


def halves(exact):
    rounded, rest = torch.empty_like(exact, dtype=torch.bfloat16), torch.empty_like(exact, dtype=torch.int16)
    split(exact, rounded, rest)
    return rounded, rest


def test_two_halves_are_the_number_to_the_last_bit_and_the_upper_one_is_the_nearest():
    bits = torch.randint(-(2**31), 2**31 - 1, (100_000,), generator=torch.Generator().manual_seed(0))
    ties = torch.tensor([0x3F808000, 0x3F818000, 0x40008000 - 2**32, 0, -(2**31), 0x7F800000])
    exact = torch.cat((bits, ties)).to(torch.int32).view(torch.float32)
    rounded, rest = halves(exact)
    assert torch.equal(join(rounded, rest).view(torch.int32), exact.view(torch.int32))
    is_tie = exact.view(torch.int32) & 0xFFFF == 0x8000
    nearest = exact.bfloat16()
    plain = exact.isfinite() & ~is_tie
    assert torch.equal(rounded[plain], nearest[plain])
    tie = exact.isfinite() & is_tie & nearest.isfinite()
    assert torch.equal((rounded[tie].float() - exact[tie]).abs(), (nearest[tie].float() - exact[tie]).abs())


@pytest.mark.parametrize("signed", [True, False])
def test_moments_of_8_bits_are_right_on_the_average_and_within_an_eighth_each(signed):
    random = torch.Generator().manual_seed(0)
    numbers = torch.randn(40, BLOCK, generator=random) * torch.logspace(-12, 12, 40)[:, None]
    numbers = numbers if signed else numbers.abs()
    blocks = Blocks.of(numbers.shape)
    total = torch.zeros_like(numbers)
    for _ in range(100):
        noise = Noise.drawn(blocks, random).halves(slice(None))[signed]
        codes, scales = packed(numbers, noise, signed=signed)
        found = unpacked(codes, scales, signed=signed)
        total += found
    is_large = numbers.abs() > 1e-3 * scales[:, None]
    error = (found / numbers - 1)[is_large]
    assert error.abs().max() <= 1 / 8
    assert (total / 100 / numbers - 1)[is_large].mean().abs() < 1e-3
    assert (codes.dtype, codes.shape, scales.shape) == (torch.uint8, numbers.shape, (40,))


def test_second_moments_are_never_zero_beside_larger_ones_and_first_ones_are():
    numbers = torch.zeros(1, BLOCK)
    numbers[0, 0] = 1.0
    noise = torch.full((1, BLOCK), 2**20 - 1, dtype=torch.int32)
    assert (unpacked(*packed(numbers, noise, signed=False), signed=False) > 0).all()
    assert unpacked(*packed(numbers, noise, signed=True), signed=True).count_nonzero() == 1
    nothing = torch.zeros(1, BLOCK)
    assert not unpacked(*packed(nothing, noise, signed=False), signed=False).any()


def test_random_numbers_of_rounding_are_even_and_any_two_of_them_independent():
    blocks, random = Blocks.of((3, 4)), torch.Generator().manual_seed(0)
    drawn = [torch.stack(Noise.drawn(blocks, random).halves(slice(None))) for _ in range(20_000)]
    numbers = torch.stack(drawn).flatten(1).double() / 2**20
    assert numbers.mean(0).sub(0.5).abs().max() < 0.01
    assert numbers.var(0).sub(1 / 12).abs().max() < 0.002
    assert numbers.T.corrcoef().fill_diagonal_(0).abs().max() < 0.03  # 4 times what chance gives


SHAPES = st.lists(st.integers(1, 6), min_size=0, max_size=2).flatmap(
    lambda leading: st.integers(1, 700).map(lambda last: (*leading, last))
)


@given(shape=SHAPES, seed=st.integers(0, 99), signed=st.booleans(), data=st.data())
def test_rows_that_are_packed_apart_are_those_that_are_packed_together(shape, seed, signed, data):
    random = torch.Generator().manual_seed(seed)
    blocks = Blocks.of(shape)
    numbers = torch.randn(blocks.rows, blocks.columns, generator=random)
    noise = Noise.drawn(blocks, random)
    assert blocks.per_row * blocks.width >= blocks.columns > (blocks.per_row - 1) * blocks.width
    assert torch.equal(blocks.join(blocks.cut(numbers)), numbers)

    def of(own):
        bits = noise.of(own).halves(slice(None))[signed]
        return packed(blocks.cut(numbers[own]), blocks.cut(bits), signed=signed)

    at = data.draw(st.integers(0, blocks.rows))
    whole, before, behind = (of(own) for own in (slice(None), slice(at), slice(at, None)))
    for together, *apart in zip(whole, before, behind, strict=True):
        assert torch.equal(together, torch.cat(apart))


@pytest.mark.parametrize(("precision", "most"), [("bf16", 10.3), ("fp32", 10.3), ("fp16", 12.3)])
def test_bytes_a_weight_with_its_gradient(precision, most):
    def bytes_of(optimizer):
        made = trainer(optimizer, dtype=PRECISIONS[precision])
        made.take_step()
        made._backward(made.plan.window(1))  # gradients are in memory
        weights = made.weights
        state = optimizer_tensors(made.optimizer, weights.masters).values()
        found = [*weights.model.parameters(), *weights.masters.values(), *weights.remainders.values(), *state]
        found += [weight.grad for weight in found if weight.grad is not None]
        storages = {part.untyped_storage().data_ptr(): part.untyped_storage().nbytes() for part in found}
        numbers = sum(master.numel() for master in weights.masters.values())
        return sum(storages.values()) / numbers

    assert bytes_of("adamw_lean") <= most
    assert bytes_of("adamw") >= 16


def test_a_thousand_updates_of_1e_5_arrive_on_weights_of_size_1():
    model = torch.nn.Linear(64, 64, bias=False)
    torch.nn.init.ones_(model.weight)
    weights = SplitWeights(model)
    settings = TrainingSettings(optimizer="adamw_lean", learning_rate=1e-5, weight_decay=0.0)
    optimizer = make_optimizer(weights.masters, settings, remainders=weights.remainders)
    for _ in range(1000):
        model.weight.grad = torch.ones(64, 64)
        optimizer.step()
    moved = 1 - weights.tensors()["weight"]
    assert moved.mean() == pytest.approx(1e-2, rel=0.01)  # 1,000 times 1e-5
    assert moved.min() > 0.97e-2
    assert moved.max() < 1.03e-2
    assert torch.equal(model.weight.float(), weights.tensors()["weight"].bfloat16().float())


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_losses_are_near_those_of_adamw(precision):
    losses = {}
    for optimizer in ("adamw", "adamw_lean"):
        sink = RecordingSink()
        trainer(optimizer, dtype=PRECISIONS[precision], sink=sink, max_steps=16).fit(NeverStop())
        losses[optimizer] = [step.loss for step in sink.of(StepDone)]
    usual, lean = losses.values()
    assert lean[0] == pytest.approx(usual[0], rel=1e-4)
    assert usual[-1] < 0.9 * usual[0]
    assert lean[-1] == pytest.approx(usual[-1], rel=0.02)


def test_checkpoint_has_float32_weights_and_the_final_model_is_those_rounded_once(tmp_path, monkeypatch):
    monkeypatch.setenv("SFT_CACHE_DIR", str(tmp_path / "cache"))
    write_rows(tmp_path / "rows.jsonl")
    model = build_tiny_model(tmp_path / "model", dtype=torch.bfloat16)
    changes = ("training.optimizer=adamw_lean", "training.precision=bf16", "training.max_steps=2")
    outcome = train(settings_of(tmp_path, model, *changes, "data.heldout_fraction=0"), StopAtStep(99))
    (newest, *_) = list_checkpoints(Path(outcome.path) / "checkpoints")[::-1]
    exact, written = (load_file(folder / "model.safetensors") for folder in (newest, Path(outcome.final)))
    assert {tensor.dtype for tensor in exact.values()} == {torch.float32}
    assert any(not torch.equal(tensor, tensor.bfloat16().float()) for tensor in exact.values())
    assert exact.keys() == written.keys()
    assert all(torch.equal(tensor.to(written[name].dtype), written[name]) for name, tensor in exact.items())


@pytest.mark.parametrize("stop_at", [1, 4])
def test_stopped_and_resumed_equals_uninterrupted_bit_for_bit(tmp_path, stop_at):
    whole, rest = MemoryStore(), MemoryStore()
    disk = DirectoryCheckpointStore(
        tmp_path, settings=CheckpointSettings(), write_model_files=lambda folder: None, fingerprints={}
    )
    trainer(store=whole).fit(NeverStop())
    trainer(store=disk).fit(StopAfter(stop_at))
    second = trainer(store=rest)
    second.restore(read_snapshot(list_checkpoints(tmp_path)[-1]))
    second.fit(NeverStop())
    assert_equal_bits(whole.snapshots[6], rest.snapshots[6])
    assert {tensor.dtype for tensor in rest.snapshots[6].weights.values()} == {torch.float32}


def test_split_masters_have_the_gradients_and_the_loss_of_whole_ones_bit_for_bit():
    found = []
    for optimizer in ("adamw", "adamw_lean"):
        # Tied ones have two gradients in a pass, which are summed in float32 here and in bfloat16 there.
        made = trainer(optimizer, tie=False)
        sums = made._backward(made.plan.window(0))
        found.append((sums, {name: master.grad for name, master in made.weights.masters.items()}))
    (whole, expected), (halved, gradients) = found
    assert torch.equal(whole, halved)
    assert all(gradient.dtype == torch.float32 for gradient in gradients.values())
    assert all(torch.equal(gradient, gradients[name]) for name, gradient in expected.items())


def test_order_of_updates_and_numbers_drawn_elsewhere_change_nothing():
    ends = []
    for one_by_one in (False, True):
        torch.manual_seed(int(one_by_one))
        model = tiny_llama()
        weights = SplitWeights(model)
        settings = TrainingSettings(optimizer="adamw_lean", learning_rate=1e-2)
        optimizer = make_optimizer(weights.masters, settings, remainders=weights.remainders)
        random = torch.Generator().manual_seed(1)
        made = [torch.randn(master.shape, generator=random) for master in weights.masters.values()]
        pairs = list(zip(weights.masters.values(), made, strict=True))
        for part in [[pair] for pair in reversed(pairs)] if one_by_one else [pairs]:
            for master, gradient in part:
                master.grad = gradient
            optimizer.step()
            optimizer.zero_grad()
        ends.append(weights.tensors())
    assert all(torch.equal(tensor, ends[1][name]) for name, tensor in ends[0].items())


def test_whole_masters_are_updated_as_split_ones_are():
    ends = []
    for made in (SplitWeights(tiny_llama()), MasterWeights(tiny_llama(), compute_dtype=torch.float32)):
        settings = TrainingSettings(optimizer="adamw_lean", learning_rate=1e-2)
        optimizer = make_optimizer(made.masters, settings, remainders=made.remainders)
        for step in range(3):
            random = torch.Generator().manual_seed(step)
            for master in made.masters.values():
                master.grad = torch.randn(master.shape, generator=random)
            optimizer.step()
        ends.append(made.tensors())
    assert all(torch.equal(tensor, ends[1][name]) for name, tensor in ends[0].items())


def test_step_that_is_not_finite_changes_nothing():
    made = trainer()
    made.take_step()
    before = {name: tensor.clone() for name, tensor in made.snapshot().weights.items()}
    state = {name: tensor.clone() for name, tensor in made.snapshot().optimizer.items()}
    loss = made.batch_loss
    made.batch_loss = lambda batch: loss(batch) * float("nan")
    assert not made.take_step().applied
    after = made.snapshot()
    assert all(torch.equal(tensor, after.weights[name]) for name, tensor in before.items())
    assert all(torch.equal(tensor, after.optimizer[name]) for name, tensor in state.items())
