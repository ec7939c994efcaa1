"""Gradients that are freed in the backward pass: where the run ends is the same, to the last bit."""

import pytest
import torch

from sftcli.config.schema.training import TrainingSettings
from sftcli.errors import DivergedError, UsageError
from sftcli.events import MemoryEased, NeverStop, Notice, StepDone
from sftcli.services.train.releasing import gradient_release
from sftcli.training.distributed.group import Group
from tests.support.recording import MemoryStore, RecordingSink, assert_equal_bits
from tests.support.training import build_trainer, tiny_llama

OFTEN, NEVER = 0.05, 0.0


def made(*, sink=None, dtype=torch.float32, dropout=0.0, store=None, **changes):
    values = {
        "max_steps": 3, "batch_size": 4, "micro_batch_size": 4, "learning_rate": 1e-2, "warmup_steps": 0,
        "packing": "off", "release_gradients": True, "max_grad_norm": OFTEN,
    }  # fmt: skip
    torch.manual_seed(0)
    return build_trainer(
        settings=TrainingSettings(**(values | changes)),
        store=store or MemoryStore(),
        emit=sink or RecordingSink(),
        model=tiny_llama(dropout=dropout),
        dtype=dtype,
    )


@pytest.mark.parametrize(
    ("optimizer", "dtype", "max_norm", "dropout"),
    [
        ("adamw", torch.float32, OFTEN, 0.2),
        ("adamw", torch.bfloat16, NEVER, 0.0),
        ("adamw_lean", torch.bfloat16, OFTEN, 0.0),
        ("muon", torch.float32, NEVER, 0.0),
        ("adafactor", torch.bfloat16, OFTEN, 0.0),
    ],
)
def test_run_ends_as_with_all_gradients_kept_bit_for_bit(optimizer, dtype, max_norm, dropout):
    ends = []
    for releases in (False, True):
        sink = RecordingSink()
        trainer = made(
            sink=sink, dtype=dtype, dropout=dropout, optimizer=optimizer, max_grad_norm=max_norm,
            release_gradients=releases,
        )  # fmt: skip
        trainer.fit(NeverStop())
        steps = [(step.loss, step.grad_norm, step.applied) for step in sink.of(StepDone)]
        ends.append((steps, trainer.snapshot()))
    (kept, expected), (released, found) = ends
    assert kept == released
    assert_equal_bits(expected, found)


@pytest.mark.parametrize("max_norm", [OFTEN, NEVER])
def test_gradients_are_never_there_together(max_norm):
    most = {}
    for releases in (False, True):
        trainer = made(max_grad_norm=max_norm, release_gradients=releases, dtype=torch.bfloat16)
        weights, seen = trainer.weights, []

        def count(_, weights=weights, seen=seen):
            every = {*weights.model.parameters(), *weights.masters.values()}
            seen.append(sum(weight.grad.nbytes for weight in every if weight.grad is not None))

        for weight in weights.model.parameters():
            weight.register_post_accumulate_grad_hook(count)
        trainer.take_step()
        most[releases] = max(seen)
    numbers = [master.numel() for master in weights.masters.values()]
    assert most[False] >= 4 * sum(numbers)
    assert most[True] <= 4 * max(numbers)


def test_steps_of_several_micro_batches_are_taken_as_usual():
    sinks, ends = [], []
    for releases in (False, True):
        sinks.append(RecordingSink())
        trainer = made(sink=sinks[-1], micro_batch_size=2, release_gradients=releases)
        trainer.fit(NeverStop())
        ends.append(trainer.snapshot().weights)
    assert all(torch.equal(tensor, ends[1][name]) for name, tensor in ends[0].items())
    assert any("2 micro-batches, whose gradients are summed" in notice.text for notice in sinks[1].of(Notice))


def test_bad_step_that_clips_changes_nothing_and_one_that_does_not_ends_the_run():
    trainer = made()
    before = {name: tensor.clone() for name, tensor in trainer.snapshot().weights.items()}
    trainer.weights.model.model.norm.weight.register_hook(lambda gradient: gradient * float("inf"))
    assert not trainer.take_step().applied
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.snapshot().weights.items())
    trainer = made(max_grad_norm=NEVER)
    trainer.weights.model.model.embed_tokens.weight.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(DivergedError, match="updated some"):
        trainer.take_step()


def test_loss_that_is_not_finite_is_a_bad_step_though_nothing_clips():
    trainer = made(max_grad_norm=NEVER)
    before = {name: tensor.clone() for name, tensor in trainer.snapshot().weights.items()}
    loss = trainer.batch_loss
    trainer.batch_loss = lambda batch: loss(batch) * float("nan")
    assert not trainer.take_step().applied
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.snapshot().weights.items())


def test_memory_that_runs_out_before_an_update_takes_smaller_micro_batches_and_after_one_ends_the_run():
    for clips in (True, False):
        sink = RecordingSink()
        trainer = made(sink=sink, max_grad_norm=OFTEN if clips else NEVER)
        is_full = [True]

        def run_out(_gradient, is_full=is_full):
            if is_full.pop() if is_full else False:
                raise torch.OutOfMemoryError("out of memory")

        trainer.weights.model.model.embed_tokens.weight.register_hook(run_out)  # the last one of a pass
        if clips:
            trainer.take_step()
            assert len(sink.of(MemoryEased)) == 1
        else:
            with pytest.raises(torch.OutOfMemoryError):
                trainer.take_step()


def test_what_cannot_be_released_is_refused_by_name():
    trainer = made()
    plan = trainer.plan
    for group, dtype, words in (
        (Group(size=2), torch.float32, "several processes"),
        (Group(), torch.float16, "float16"),
    ):
        trainer.weights.compute_dtype = dtype
        with pytest.raises(UsageError, match=words):
            gradient_release(
                trainer.weights, trainer.optimizer, trainer.settings, group=group, plan=plan, emit=RecordingSink()
            )  # fmt: skip
