"""What is laid out ahead is what a step would have laid out itself, wherever a run is cut or eased."""

import pytest
import torch

from sftcli.data.batches.batch import BatchPlan
from sftcli.events import MemoryEased, NeverStop, StepDone
from sftcli.training.distributed.group import Group
from sftcli.training.window_ahead import WindowAhead
from tests.equivalence.test_memory import trainer_on
from tests.support.recording import MemoryStore, StopAfter, assert_equal_bits
from tests.support.training import CPU, PAD_ID, random_examples

STEPS = 5


def a_plan(size: int = 2) -> BatchPlan:
    return BatchPlan(random_examples(20), batch_size=4, micro_batch_size=size, pad_id=PAD_ID, seed=0)


def rows_of(window):
    return [(batch.example_ids, batch.input_ids.tolist()) for batch in window]


class CountedPlan:
    """A plan that remembers which windows were laid out."""

    def __init__(self, plan):
        self.plan, self.asked = plan, []
        self.micro_batch_tokens, self.epoch = plan.micro_batch_tokens, plan.epoch

    def window(self, step):
        self.asked.append(step)
        return self.plan.window(step)


def steps_one_by_one(made, count):
    """Take steps of which none knows that another follows."""
    return [made.take_step() for _ in range(count)]


@pytest.mark.parametrize("eased_at", [1, 3, 99])
def test_steps_ahead_equal_steps_one_by_one_bit_for_bit_also_where_memory_eases(eased_at: int):
    ahead, sink = trainer_on(2, micro_batch_size=4, from_step=eased_at)
    ahead.fit(NeverStop())
    alone, _ = trainer_on(2, micro_batch_size=4, from_step=eased_at)
    taken = steps_one_by_one(alone, STEPS)
    assert len(sink.of(MemoryEased)) == (eased_at < STEPS)
    assert [(one.loss, one.grad_norm, one.micro_batches) for one in sink.of(StepDone)] == [
        (one.loss, one.grad_norm, one.micro_batches) for one in taken
    ]
    assert_equal_bits(alone.snapshot(), ahead.snapshot())


@pytest.mark.parametrize("stop_at", [1, 3])
def test_a_run_that_was_stopped_and_goes_on_equals_steps_one_by_one(stop_at: int):
    store = MemoryStore()
    first, _ = trainer_on(2, micro_batch_size=4, from_step=3, store=store)
    first.fit(StopAfter(stop_at))
    second, _ = trainer_on(2, micro_batch_size=4, from_step=3)
    second.restore(store.snapshots[stop_at])
    second.fit(NeverStop())
    alone, _ = trainer_on(2, micro_batch_size=4, from_step=3)
    steps_one_by_one(alone, STEPS)
    assert_equal_bits(alone.snapshot(), second.snapshot())


def test_each_window_of_a_run_is_laid_out_once():
    made, _ = trainer_on(8, micro_batch_size=4)
    made.plan = plan = CountedPlan(made.plan)
    made.fit(NeverStop())
    assert plan.asked == list(range(STEPS))


def test_a_trainer_that_goes_back_takes_the_rows_of_the_step_it_went_back_to():
    made, _ = trainer_on(8, micro_batch_size=4)
    start = made.snapshot()
    begin = {name: tensor.clone() for name, tensor in start.weights.items()}
    first = made.take_step(is_followed=True)
    made.optimizer.state.clear()
    made.restore(type(start)(state=start.state, weights=begin, optimizer={}, rng=start.rng))
    assert made.take_step().loss == first.loss


def test_the_window_of_another_plan_or_step_is_dropped():
    ahead, plan, other = WindowAhead(CPU), a_plan(), a_plan(size=1)
    for asked, step in ((other, 1), (plan, 2), (plan, 1)):
        ahead.prepare(plan, 1, Group())
        assert rows_of(ahead.take(asked, step)) == rows_of(asked.window(step))
    assert len(other.window(1)) > len(plan.window(1))


def test_a_fault_in_rows_is_met_by_the_step_that_needs_them():
    class Faulty(CountedPlan):
        def window(self, step):
            if step == 2:
                raise OSError("row 7 cannot be read")
            return super().window(step)

    made, sink = trainer_on(8, micro_batch_size=4)
    made.plan = Faulty(made.plan)
    with pytest.raises(OSError, match="row 7"):
        made.fit(NeverStop())
    assert len(sink.of(StepDone)) == made.state.step == 2


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_process_sends_its_own_part_of_a_window_ahead(rank: int):
    plan, meta = a_plan(size=1), torch.device("meta")
    ahead = WindowAhead(meta)
    ahead.prepare(plan, 0, Group(rank=rank, size=3))
    window = ahead.take(plan, 0)
    sent = [place for place, batch in enumerate(window) if batch.input_ids.device == meta]
    # Of 4 micro-batches the last is that of rank 0; the others compute the same one with weight 0 where weights are shared.
    assert sent == [rank, 3]
    assert [batch.example_ids for batch in window] == [batch.example_ids for batch in plan.window(0)]
