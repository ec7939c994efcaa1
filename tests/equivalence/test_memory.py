"""Running out of memory: the step is taken again with less of it, and nothing else about the run changes."""

import pytest
import torch

from sftcli.config.schema.training import TrainingSettings
from sftcli.data.batches.batch import BatchPlan, Packing, collate
from sftcli.errors import ResourceError
from sftcli.events import Ending, MemoryEased, NeverStop, Session, StepDone
from sftcli.services.train.resume import ResumeRequest, resume_training
from sftcli.services.train.run import TrainingRun
from sftcli.training.checkpoint.names import list_checkpoints
from sftcli.training.out_of_memory import MemoryLadder
from sftcli.training.row_scores import score_rows
from sftcli.training.state import TrainState
from sftcli.training.trainer import Trainer
from tests.support.memory import FAULTS, KERNEL
from tests.support.recording import MemoryStore, RecordingSink, StopAfter
from tests.support.runs import StopAtStep, events_of, numbers_of, settings_of, tensors_of, train, write_rows
from tests.support.tiny_model import build_tiny_model
from tests.support.training import PAD_ID, build_trainer, random_examples, tiny_llama

ERRORS = FAULTS | {"kernel": KERNEL}


class SmallMachine:
    """A loss that has no room for more than ``rows`` rows. The first micro-batch of a step fits: it leaves gradients."""

    def __init__(self, loss, rows, error="torch", *, from_step=1, trainer=None):
        self.loss, self.rows, self.error = loss, rows, ERRORS[error]
        self.from_step, self.trainer, self.calls = from_step, trainer, 0

    def __call__(self, batch):
        self.calls += 1
        is_tight = self.trainer is None or self.trainer.state.step + 1 >= self.from_step
        if is_tight and len(batch.input_ids) > self.rows and self.calls % 2 == 0:
            raise self.error
        return self.loss(batch)


def trainer_on(rows, *, micro_batch_size, store=None, error="torch", dtype=torch.float32, from_step=1):
    sink = RecordingSink()
    settings = TrainingSettings(
        max_steps=5,
        batch_size=8,
        micro_batch_size=micro_batch_size,
        learning_rate=1e-2,
        warmup_steps=1,
        packing="off",
    )
    torch.manual_seed(0)
    made = build_trainer(
        settings=settings, store=store or MemoryStore(), emit=sink, model=tiny_llama(dropout=0.2), dtype=dtype
    )
    made.batch_loss = SmallMachine(made.batch_loss, rows, error, from_step=from_step, trainer=made)
    return made, sink


@pytest.mark.parametrize(
    ("error", "dtype"), [*((error, torch.float32) for error in ERRORS), ("torch", torch.bfloat16)]
)
def test_run_that_was_halved_equals_one_that_was_small_from_the_start_bit_for_bit(error, dtype):
    halved, sink = trainer_on(2, micro_batch_size=4, error=error, dtype=dtype)
    halved.fit(NeverStop())
    small, expected = trainer_on(2, micro_batch_size=2, dtype=dtype)
    small.fit(NeverStop())
    losses = [(event.loss, event.grad_norm) for event in sink.of(StepDone)]
    assert losses == [(event.loss, event.grad_norm) for event in expected.of(StepDone)]
    for name, tensor in small.snapshot().weights.items():
        assert torch.equal(tensor, halved.snapshot().weights[name])
    (eased,) = sink.of(MemoryEased)
    assert (eased.step, eased.micro_batch_size, eased.micro_batches) == (1, 2, 4)
    assert expected.of(MemoryEased) == []


def test_halved_step_has_the_loss_of_the_whole_one_up_to_rounding():
    torch.manual_seed(0)
    steps = []
    for rows in (8, 1):
        sink = RecordingSink()
        settings = TrainingSettings(
            max_steps=1, batch_size=8, micro_batch_size=4, warmup_steps=0, packing="off"
        )
        made = build_trainer(settings=settings, store=MemoryStore(), emit=sink)
        made.batch_loss = SmallMachine(made.batch_loss, rows)
        steps.append(made.take_step())
    assert steps[0].loss == pytest.approx(steps[1].loss, rel=1e-6)
    assert steps[0].grad_norm == pytest.approx(steps[1].grad_norm, rel=1e-5)
    assert steps[0].response_tokens == steps[1].response_tokens


def test_last_rungs_are_gradient_checkpointing_and_then_the_error_leaves_no_gradient():
    made, sink = trainer_on(0, micro_batch_size=4)
    before = {name: tensor.clone() for name, tensor in made.snapshot().weights.items()}
    with pytest.raises(torch.OutOfMemoryError):
        made.take_step()
    rungs = [(event.micro_batch_size, event.gradient_checkpointing) for event in sink.of(MemoryEased)]
    assert rungs == [(2, False), (1, False), (1, True), (1, True)]
    assert "selective gradient checkpointing from here on" in sink.of(MemoryEased)[2].text
    assert ": gradient checkpointing from here on" in sink.of(MemoryEased)[3].text
    assert made.tried() == "micro-batches of 1 row and gradient checkpointing"
    assert all(weight.grad is None for weight in made.weights.model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in made.snapshot().weights.items())
    assert made.state.step == 0


def test_heldout_rows_that_do_not_fit_together_are_scored_in_halves():
    heldout = random_examples(9, seed=3)
    settings = TrainingSettings(max_steps=1, warmup_steps=0)
    whole, tight = (
        build_trainer(settings=settings, store=MemoryStore(), emit=RecordingSink(), heldout=heldout)
        for _ in range(2)
    )
    expected = whole.heldout_loss(NeverStop())
    tight.weights.model.model.embed_tokens.register_forward_pre_hook(refuse_more_than(2))
    found = tight.heldout_loss(NeverStop())
    assert (found.rows, found.response_tokens) == (9, expected.response_tokens)
    assert found.row_nll == pytest.approx(expected.row_nll, rel=1e-6)
    assert found.row_tokens == expected.row_tokens
    assert found.nll == pytest.approx(expected.nll, rel=1e-6)


def test_row_that_does_not_fit_alone_is_out_of_memory():
    model, batch = tiny_llama(), collate(random_examples(3), example_ids=range(3), pad_id=PAD_ID)
    expected = score_rows(model, [batch], stop=NeverStop())
    handle = model.model.embed_tokens.register_forward_pre_hook(refuse_more_than(1))
    found = score_rows(model, [batch], stop=NeverStop())
    assert [found[row].nll for row in range(3)] == pytest.approx([expected[row].nll for row in range(3)])
    handle.remove()
    model.model.embed_tokens.register_forward_pre_hook(refuse_more_than(0))
    with pytest.raises(torch.OutOfMemoryError):
        score_rows(model, [batch], stop=NeverStop())


def refuse_more_than(rows):
    def refuse(_module, given):
        if len(given[0]) > rows:
            raise FAULTS["torch"]

    return refuse


def test_packed_rows_are_told_in_tokens():
    examples = random_examples(8)
    plans = {
        size: BatchPlan(
            examples, batch_size=8, micro_batch_size=size, pad_id=PAD_ID, seed=0,
            packing=Packing(row_tokens=96).reduced(size, 4),
        )
        for size in (4, 2, 1)
    }  # fmt: skip
    ladder = MemoryLadder(micro_batch_size=4, make_plan=plans.__getitem__)
    lower = ladder.below(TrainState())
    event = ladder.event(lower, ladder.plan(lower), why="ran out of memory")
    passes = plans[2].window(0)
    assert max(batch.input_ids.numel() for batch in passes) <= 48
    assert (event.micro_batch_size, event.micro_batch_tokens, event.micro_batches) == (0, 48, len(passes))
    assert (
        f"micro-batches of 48 tokens of packed rows from here on, {len(passes)} in this step;" in event.text
    )
    assert ladder.tried(lower, plans[2]).startswith("micro-batches of 48 tokens of packed rows")


def test_other_errors_of_a_step_pass_and_leave_no_gradient():
    made, sink = trainer_on(0, micro_batch_size=4)
    made.batch_loss.error = RuntimeError("shape")
    with pytest.raises(RuntimeError, match="shape"):
        made.take_step()
    assert sink.of(MemoryEased) == []
    assert all(weight.grad is None for weight in made.weights.model.parameters())


@pytest.mark.parametrize("stop_at", [2, 4])
def test_resumed_run_takes_the_micro_batches_that_the_run_had_at_that_step(stop_at):
    whole, _ = trainer_on(2, micro_batch_size=4, from_step=3)
    whole.fit(NeverStop())
    store = MemoryStore()
    first, _ = trainer_on(2, micro_batch_size=4, from_step=3, store=store)
    first.fit(StopAfter(stop_at))
    second, sink = trainer_on(2, micro_batch_size=4, from_step=3)
    second.restore(store.snapshots[stop_at])
    second.fit(NeverStop())
    assert len(sink.of(MemoryEased)) == (1 if stop_at == 2 else 0)
    for name, tensor in whole.snapshot().weights.items():
        assert torch.equal(tensor, second.snapshot().weights[name])


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with rows and a model, on a machine with room for two rows."""
    write_rows(tmp_path / "rows.jsonl")
    build_tiny_model(tmp_path / "model")
    monkeypatch.setenv("SFT_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path


def shrink(monkeypatch, rows):
    class SmallTrainer(Trainer):
        def __init__(self, *, batch_loss, **parts) -> None:
            super().__init__(batch_loss=SmallMachine(batch_loss, rows), **parts)

    monkeypatch.setattr(TrainingRun, "trainer_type", SmallTrainer)


def test_decision_is_logged_reported_and_kept_when_the_run_goes_on(place, monkeypatch):
    sets = ("training.micro_batch_size=2", "checkpoint.every_steps=1", "training.packing=off")
    shrink(monkeypatch, 1)
    whole = StopAtStep(99)
    assert (
        train(settings_of(place, place / "model", "run.name=whole", *sets), whole).ending is Ending.FINISHED
    )
    cut = StopAtStep(4)
    assert train(settings_of(place, place / "model", "run.name=cut", *sets), cut).ending is Ending.STOPPED
    rest = StopAtStep(99)
    resume_training(ResumeRequest(root=place / "runs", run="cut"), Session(rest, rest))
    assert not [event for event in rest.events if isinstance(event, MemoryEased)]
    run, other = place / "runs" / "whole", place / "runs" / "cut"
    assert tensors_of(run, 10) == tensors_of(other, 10)
    assert numbers_of(run) == numbers_of(other)
    assert [event["micro_batch_size"] for event in events_of(other, "MemoryEased")] == [1]
    for name in ("training.log", "report.html"):
        assert (
            "ran out of memory: micro-batches of 1 row from here on, 4 in this step"
            in (other / name).read_text()
        )


@pytest.mark.parametrize(
    "part",
    [
        "sftcli.training.weights.masters.MasterWeights.__init__",
        "sftcli.services.train.loading.load_model",
        "sftcli.services.train.build.make_optimizer",
        "torch.optim.AdamW.step",
        "sftcli.services.train.build.heldout_nll",
        "sftcli.training.state.TrainingSnapshot.copied",
        "sftcli.training.checkpoint.store.write_part",
        "sftcli.services.train.run.save_model_folder",
    ],
)
def test_wherever_memory_runs_out_the_exit_code_is_71_and_the_way_out_is_named(place, monkeypatch, part):
    def full(*_, **__):
        raise FAULTS["runtime"]

    monkeypatch.setattr(part, full)
    with pytest.raises(ResourceError, match="out of memory") as caught:
        train(settings_of(place, place / "model", "run.name=full", "training.max_steps=4"), StopAtStep(99))
    assert caught.value.exit_code == 71
    assert all(way in caught.value.hint for way in ("optimizer=adafactor", "--lora", "--adapter qlora"))
    assert "gradient_checkpointing" in caught.value.hint


def test_end_of_the_ladder_is_exit_code_71_and_checkpoints_stay(place, monkeypatch):
    shrink(monkeypatch, 0)
    with pytest.raises(
        ResourceError, match="out of memory with micro-batches of 1 row and gradient"
    ) as caught:
        train(settings_of(place, place / "model", "run.name=tight", "training.packing=off"), StopAtStep(99))
    assert caught.value.exit_code == 71
    assert not list_checkpoints(place / "runs" / "tight" / "checkpoints")
