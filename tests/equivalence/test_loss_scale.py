"""float16 products: losses are those of float32 up to rounding, an overflow costs no step, and a run goes on as if never stopped."""

from dataclasses import replace

import pytest
import torch

from sftcli.config.schema.training import TrainingSettings
from sftcli.errors import UsageError
from sftcli.events import HeldoutDone, NeverStop, Notice, Session, StepDone
from sftcli.runtime import choose_dtype
from sftcli.services.train.resume import ResumeRequest, resume_training, verify_resume
from sftcli.training import loss_scale
from sftcli.training.loss_scale import FIRST
from tests.support.recording import MemoryStore, RecordingSink, StopAfter
from tests.support.runs import StopAtStep, numbers_of, settings_of, tensors_of, train, write_rows
from tests.support.tiny_model import build_tiny_model
from tests.support.training import build_trainer, random_examples, tiny_llama

HALF = torch.float16


def trainer_in(dtype, *, store=None, dropout=0.0, model=None, heldout=None, steps=6):
    sink = RecordingSink()
    settings = TrainingSettings(
        max_steps=steps, batch_size=8, micro_batch_size=4, learning_rate=1e-2, warmup_steps=1
    )
    torch.manual_seed(0)
    model = model or tiny_llama(dropout=dropout)
    made = build_trainer(
        settings=settings, store=store or MemoryStore(), emit=sink, model=model, dtype=dtype,
        heldout=heldout,
    )  # fmt: skip
    return made, sink


def steps_of(sink):
    return [(event.loss, event.grad_norm) for event in sink.of(StepDone)]


def told(sink):
    return [event.text for event in sink.of(Notice) if "float16" in event.text]


def assert_equal(left, right):
    for name, tensor in left.snapshot().weights.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, right.snapshot().weights[name]), name


def test_losses_and_gradients_are_those_of_float32_up_to_rounding():
    heldout = random_examples(4, seed=1)
    half, in_half = trainer_in(HALF, heldout=heldout)
    half.fit(NeverStop())
    whole, in_whole = trainer_in(torch.float32, heldout=heldout)
    whole.fit(NeverStop())
    for found, expected in zip(steps_of(in_half), steps_of(in_whole), strict=True):
        assert found == pytest.approx(expected, rel=5e-3)
    scored, wanted = (sink.of(HeldoutDone)[-1].loss for sink in (in_half, in_whole))
    assert scored == pytest.approx(wanted, rel=5e-3)
    assert all(weight.dtype == HALF for weight in half.weights.model.parameters())
    moved = [
        float((half.snapshot().weights[name] - weight).norm() / weight.norm())
        for name, weight in whole.snapshot().weights.items()
    ]
    assert max(moved) < 0.05


def test_gradients_below_the_range_of_float16_are_lost_without_a_scale_alone(monkeypatch):
    norms = {}
    for name, dtype, first in (("fp32", torch.float32, FIRST), ("scaled", HALF, FIRST), ("bare", HALF, 1.0)):
        monkeypatch.setattr(loss_scale, "FIRST", first)
        made, _ = trainer_in(dtype)
        whole = made.batch_loss
        made.batch_loss = lambda batch, whole=whole: 1e-6 * whole(batch)
        norms[name] = made.take_step().grad_norm
    assert norms["scaled"] == pytest.approx(norms["fp32"], rel=5e-3)
    assert norms["bare"] < 0.9 * norms["fp32"]


def test_overflow_is_survived_and_the_step_is_that_of_the_scale_that_fits_bit_for_bit():
    high, in_high = trainer_in(HALF, dropout=0.2)
    high.state = replace(high.state, loss_scale=2.0**40)
    found, scale = high.take_step(), high.state.loss_scale
    assert 1 < scale < 2.0**40
    assert len(told(in_high)) == 40 - int(scale).bit_length() + 1
    assert "the step is computed again" in told(in_high)[0]
    fits, in_fits = trainer_in(HALF, dropout=0.2)
    fits.state = replace(fits.state, loss_scale=scale)
    expected = fits.take_step()
    assert told(in_fits) == []
    assert (found.loss, found.grad_norm, found.applied) == (expected.loss, expected.grad_norm, True)
    assert high.state == fits.state
    assert_equal(high, fits)


def test_loss_that_is_not_finite_is_a_bad_step_and_moves_no_scale():
    made, sink = trainer_in(HALF)
    whole = made.batch_loss
    made.batch_loss = lambda batch: whole(batch) * float("nan")
    step = made.take_step()
    assert (step.applied, made.state.bad_steps, made.state.loss_scale) == (False, 1, FIRST)
    assert told(sink) == []


def test_gradients_that_no_scale_makes_finite_are_a_bad_step():
    made, sink = trainer_in(HALF)
    made.weights.model.model.norm.weight.register_hook(lambda gradient: gradient * float("inf"))
    step = made.take_step()
    assert (step.applied, made.state.bad_steps, made.state.loss_scale) == (False, 1, 1.0)
    assert len(told(sink)) == int(FIRST).bit_length() - 1


def test_scale_grows_after_steps_without_an_overflow(monkeypatch):
    monkeypatch.setattr(loss_scale, "GROW_AFTER", 4)
    made, _ = trainer_in(HALF, steps=6)
    made.state = replace(made.state, loss_scale=8.0)
    made.fit(NeverStop())
    assert (made.state.loss_scale, made.state.loss_scale_steps) == (16.0, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_precisions_have_no_scale(dtype):
    made, _ = trainer_in(dtype)
    made.take_step()
    assert made.state.loss_scale == 0


@pytest.mark.parametrize("stop_at", [2, 5])
def test_run_that_went_on_is_the_one_that_never_stopped(monkeypatch, stop_at):
    monkeypatch.setattr(loss_scale, "GROW_AFTER", 3)
    whole, in_whole = trainer_in(HALF, dropout=0.2)
    whole.fit(NeverStop())
    store = MemoryStore()
    first, _ = trainer_in(HALF, dropout=0.2, store=store)
    first.fit(StopAfter(stop_at))
    second, in_second = trainer_in(HALF, dropout=0.2)
    second.restore(store.snapshots[stop_at])
    second.fit(NeverStop())
    assert steps_of(in_second) == steps_of(in_whole)[stop_at:]
    assert second.state == whole.state
    assert whole.state.loss_scale != FIRST
    assert_equal(whole, second)


def test_run_on_disk_goes_on_and_verifies_and_its_model_is_float32(tmp_path, monkeypatch):
    write_rows(tmp_path / "rows.jsonl")
    model = build_tiny_model(tmp_path / "model")
    monkeypatch.setenv("SFT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(loss_scale, "FIRST", 2.0**36)  # some overflows at the start
    sets = ("training.precision=fp16", "checkpoint.every_steps=2", "training.max_steps=6")
    train(settings_of(tmp_path, model, "run.name=whole", *sets), StopAtStep(99))
    train(settings_of(tmp_path, model, "run.name=cut", *sets), StopAtStep(3))
    rest = StopAtStep(99)
    resume_training(ResumeRequest(root=tmp_path / "runs", run="cut"), Session(rest, rest))
    whole, cut = tmp_path / "runs" / "whole", tmp_path / "runs" / "cut"
    assert tensors_of(whole, 6) == tensors_of(cut, 6)
    assert numbers_of(whole) == numbers_of(cut)
    assert verify_resume(ResumeRequest(root=tmp_path / "runs", run="cut"), Session(rest, NeverStop())).tensors
    assert (whole / "final" / "model.safetensors").stat().st_size == (
        model / "model.safetensors"
    ).stat().st_size
    assert '"precision": "fp16"' in (whole / "run.json").read_text()


def test_weights_that_float16_has_not_are_refused_by_name():
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = 70_000.0
    with pytest.raises(UsageError, match=r"layers\.1\.mlp\.up_proj\.weight holds numbers above 65504"):
        trainer_in(HALF, model=model)


@pytest.mark.parametrize(
    ("capability", "has_bf16", "chosen"),
    [
        ((9, 0), True, torch.bfloat16),
        ((8, 0), True, torch.bfloat16),
        ((7, 5), False, HALF),
        ((7, 0), False, HALF),
        ((6, 1), False, torch.float32),
    ],
)
def test_auto_takes_float16_on_gpus_with_units_for_it_alone(monkeypatch, capability, has_bf16, chosen):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *, including_emulation: has_bf16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: capability)
    assert choose_dtype("auto", torch.device("cuda")) is chosen
    assert choose_dtype("fp16", torch.device("cpu")) is HALF
