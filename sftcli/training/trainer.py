"""The loop. It takes steps, emits events and hands snapshots to a store; it knows no files, no terminal and no model class."""

import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial

import torch

from sftcli.config.schema.run import CheckpointSettings
from sftcli.config.schema.training import BestBy, TrainingSettings
from sftcli.copies import HostCopies, host_copies
from sftcli.data.batches.batch import Batch
from sftcli.events import (
    Ending,
    EventSink,
    FitEnded,
    FitStarted,
    HeldoutAnswers,
    HeldoutDone,
    NeverStop,
    StepDone,
    StopFlag,
)
from sftcli.memory_faults import is_out_of_memory
from sftcli.runtime import Clock, monotonic, peak_memory_bytes, release_memory
from sftcli.training.checkpoint.background_saver import Saver
from sftcli.training.distributed.agreed_stop import AgreedStop, TimedSaves
from sftcli.training.distributed.group import Group
from sftcli.training.loss import BatchLoss, minimized, three_sums
from sftcli.training.loss_scale import LossScaler
from sftcli.training.optim.optimizer import optimizer_tensors, restore_optimizer
from sftcli.training.optim.release import GradientRelease
from sftcli.training.optim.schedule import learning_rate_at, set_learning_rate
from sftcli.training.optim.update import Taken, launch_update
from sftcli.training.out_of_memory import KeptMemory, MemoryLadder
from sftcli.training.random_streams import capture_rng, collect_rng, restore_rng, restore_stream
from sftcli.training.state import (
    AnswerGiver,
    CheckpointStore,
    HeldoutLoss,
    Part,
    RngState,
    StepPlan,
    TrainingSnapshot,
    TrainState,
)
from sftcli.training.stopping import (
    bad_step,
    has_plateaued,
    is_new_best,
    named_rows,
    refuse_bad_steps,
    with_heldout,
)
from sftcli.training.utilization import Gauge
from sftcli.training.weights.masters import MasterWeights
from sftcli.training.window_ahead import WindowAhead

OTHERS_SECONDS = 5.0  # that a process that has failed gives the others to end a save that they write together


class Trainer:
    """Takes optimizer steps from a plan of micro-batches."""

    def __init__(
        self,
        *,
        settings: TrainingSettings,
        checkpoint: CheckpointSettings,
        weights: MasterWeights,
        optimizer: torch.optim.Optimizer,
        batch_loss: BatchLoss,
        ladder: MemoryLadder,
        heldout_loss: HeldoutLoss | None,
        answer: AnswerGiver | None = None,
        store: CheckpointStore,
        emit: EventSink,
        device: torch.device,
        name_row: Callable[[int], str] = str,
        gauge: Gauge | None = None,
        clock: Clock = monotonic,
        group: Group | None = None,
        before_step: Callable[[Sequence[Batch]], None] | None = None,
        release: GradientRelease | None = None,
    ) -> None:
        self.group = group or Group()
        self.name_row = name_row
        self.gauge = gauge
        self.settings = settings
        self.checkpoint = checkpoint
        self.weights = weights
        self.optimizer = optimizer
        self.batch_loss = batch_loss
        self.before_step = before_step
        self.release = release
        self.ladder = ladder
        self.heldout_loss = heldout_loss
        self.answer = answer
        self.store = store
        self.emit = emit
        self.scaler = LossScaler(weights, self.group, emit)
        self.device = device
        self.asks_device = device.type == "cuda"  # whether numbers are finite, where the optimizer can
        self.clock = clock
        self.state = TrainState()
        self.plan: StepPlan = ladder.plan(self.state)
        self._saver = Saver(emit, clock)
        self._timed = self._timed_saves(NeverStop())
        self._kept = KeptMemory(device)
        self._ahead = WindowAhead(device)
        self.make_copies = host_copies
        self._copies: list[HostCopies] = []  # that the next update has to come after

    def fit(self, stop: StopFlag) -> Ending:
        """Take steps until the budget is spent or ``stop`` is set in one of the processes.

        Held-out loss is measured before the first step and after the last. On return, a checkpoint of the last step is
        in the store; a stop before the first step leaves none. A held-out loss that a stop cut off is measured when the run
        goes on, before its next step, and saved.

        Raises:
            DivergedError: ``max_bad_steps`` steps in a row gave no finite loss or gradient, or all steps that there are.
        """
        last_step = self.settings.max_steps
        self._timed = self._timed_saves(stop)
        stop = AgreedStop(stop=self._timed, group=self.group)
        was_owed = self._owes_heldout()
        if was_owed:
            self.measure_heldout(stop)
        self.emit(FitStarted(step=self.state.step, last_step=last_step))
        try:
            if was_owed and self.state.step and not self._owes_heldout():
                self._saver.saved_step = -1  # what is stored lacks it
                self._save_and_go_on()
            self._take_steps(last_step, stop)
        finally:
            error = sys.exception()
            if not isinstance(error, KeyboardInterrupt):  # who is in a hurry does not wait for a save
                needs_others = self.weights.saves_parts and error is not None  # which may be gone
                self._saver.finish(wait=True, at_most=OTHERS_SECONDS if needs_others else None)
        if self.state.step and self.group.any(self._saver.saved_step != self.state.step):
            self.save()
        ending = self._ending()
        self.emit(FitEnded(step=self.state.step, ending=ending))
        return ending

    def _timed_saves(self, stop: StopFlag) -> TimedSaves:
        seconds = 60 * self.checkpoint.every_minutes
        return TimedSaves(
            stop=stop, clock=self.clock, seconds=seconds, group=self.group, begun_at=self.clock()
        )

    def _ending(self) -> Ending:
        if self._owes_heldout():
            return Ending.STOPPED
        if self.state.step >= self.settings.max_steps:
            return Ending.FINISHED
        return Ending.PLATEAU if has_plateaued(self.state, self.settings) else Ending.STOPPED

    def _take_steps(self, last_step: int, stop: StopFlag) -> None:
        while self.state.step < last_step and not has_plateaued(self.state, self.settings):
            if stop.requested():
                return
            self.emit(self.take_step(is_followed=self.state.step + 1 < last_step))
            self._kept.after_step()
            self._saver.finish(wait=False)
            improved = False
            if self._is_due(self.settings.eval_every_steps) and not stop.requested():
                self.measure_heldout(stop)
                improved = is_new_best(self.state, self.settings)
            if improved or self._is_due(self.checkpoint.every_steps) or stop.save_requested():
                self._save_and_go_on()

    def take_step(self, *, is_followed: bool = False) -> StepDone:
        """Update once from the mean loss over every response token of the global batch.

        ``is_followed`` by the next step, whose window is laid out while the device is at work on this one.
        """
        begin, exchanged = self.clock(), self.group.exchanged_bytes
        if not self.weights.model.training:  # which to say again goes through all modules
            self.weights.model.train()
        learning_rate = learning_rate_at(self.state.step, self.settings)
        set_learning_rate(self.optimizer, learning_rate)
        if self.release:  # whose pass may be the update
            self._hold_for_copies()
        rng = capture_rng()
        window, sums = self._accumulate(rng)
        self._hold_for_copies()
        finish = self._launch_update(window, sums, rng)
        if is_followed:
            self._ahead.prepare(self.plan, self.state.step + 1, self.group)
        taken = finish()
        self.optimizer.zero_grad(set_to_none=True)
        response_tokens = sum(batch.response_tokens for batch in window)
        objective, loss = (total / response_tokens for total in taken.sums[:2])
        tokens = sum(batch.tokens for batch in window)
        text_tokens = sum(batch.tokens for batch in window if batch.is_text)
        self.state = replace(
            self.state,
            step=self.state.step + 1,
            bad_steps=0 if taken.applied else self.state.bad_steps + 1,
            tokens=self.state.tokens + tokens,
            response_tokens=self.state.response_tokens + (0 if text_tokens else response_tokens),
            text_tokens=self.state.text_tokens + text_tokens,
        )
        if not taken.applied:
            rows = named_rows(window, self.name_row)
            self.emit(bad_step(self.state.step, loss=loss, grad_norm=taken.grad_norm, rows=rows))
            refuse_bad_steps(self.state, self.settings)
        seconds = self.clock() - begin
        return StepDone(
            step=self.state.step,
            loss=loss,
            grad_norm=taken.grad_norm,
            learning_rate=learning_rate,
            applied=taken.applied,
            epoch=self.plan.epoch(self.state.step),
            response_tokens=response_tokens,
            tokens=tokens,
            padding_tokens=sum(batch.padding_tokens for batch in window),
            text_tokens=text_tokens,
            examples=sum(len(batch.example_ids) for batch in window),
            rows=sum(len(batch.input_ids) for batch in window),
            micro_batches=len(window),
            seconds=seconds,
            peak_memory_bytes=peak_memory_bytes(self.device),
            exchanged_bytes=self.group.exchanged_bytes - exchanged,
            utilization=self.gauge(window, seconds) if self.gauge else None,
            objective=objective if self.settings.minimizes_more else None,
            router_aux_loss=taken.sums[2] if self.settings.router_aux_loss else None,
        )

    def _launch_update(
        self, window: Sequence[Batch], sums: torch.Tensor, rng: RngState
    ) -> Callable[[], Taken]:
        """Launch the update behind the pass over ``window``, before which the random numbers were ``rng``; return what finishes it."""
        release = self.release
        if release is None or not release.is_for(window):
            return launch_update(
                self.weights,
                self.optimizer,
                sums,
                max_norm=self.settings.clips_to,
                asks_device=self.asks_device,
            )

        def compute_again() -> None:
            restore_rng(rng)
            self._backward(window)

        return partial(release.finish, sums, compute_again=compute_again)

    def _accumulate(self, rng: RngState) -> tuple[Sequence[Batch], torch.Tensor]:
        """Sum the gradients of the next step; where memory runs out, from the start in a way that needs less of it.

        With float16 products a step whose gradients leave the range is computed again too, from a loss of a smaller scale.
        """
        while True:
            window = self._ahead.take(self.plan, self.state.step)
            lower = None
            try:
                with self.release.listening(window) if self.release else nullcontext():
                    sums = self._backward(window)
            except Exception as error:
                self.discard_gradients()
                is_over = is_out_of_memory(error) and self._can_take_again()
                lower = self.ladder.below(self.state) if is_over else None
                if lower is None:
                    raise
            # Out here nothing holds the tensors of a failed pass any more.
            if self._agree_to_ease(lower is not None):
                lower = lower or self.ladder.below(self.state)
                if lower is None:
                    raise MemoryError("another process is out of memory")
                self.ease(lower, why="ran out of memory")
            else:
                sums = self.weights.gather(sums, self.group)
                self.state, holds = self.scaler.settle(self.state, sums)
                if holds:
                    return window, sums
                self.discard_gradients()
            restore_rng(rng)

    def ease(self, lower: TrainState, *, why: str) -> None:
        """Go on in ``lower``, a rung further down the ladder, and say ``why`` of the next step."""
        self.state, self.plan = lower, self.ladder.plan(lower)
        release_memory(self.device)
        self.emit(self.ladder.event(lower, self.plan, why=why))

    def _can_take_again(self) -> bool:
        """Return whether the step that has broken off can be taken again, in all processes."""
        has_begun = self.release is not None and self.release.has_begun
        return not has_begun and self.weights.can_give_up(self.group)

    def _agree_to_ease(self, is_short: bool) -> bool:
        """Return whether memory ran out in one of the processes, in this one if it ``is_short``; then gradients are gone."""
        if is_short:
            release_memory(self.device)
            self.weights.give_up_exchange()  # others wait for it
        any_is = self.group.any(is_short)
        if any_is:
            self.weights.give_up_exchange()
            self.discard_gradients()
        return any_is

    def _backward(self, window: Sequence[Batch]) -> torch.Tensor:
        """Add up the gradients of this process's share of ``window``; return its sums, as ``three_sums`` has them."""
        response_tokens = sum(batch.response_tokens for batch in window)
        total = torch.zeros(3, device=self.device)
        scale = self.scaler.scale(self.state)
        if self.before_step:
            self.before_step(window)
        for batch, weight in self.weights.micro_batches(window, self.group):
            sums = self.batch_loss(batch.to(self.device)) * weight
            (scale * (minimized(sums) / response_tokens)).backward()
            self.weights.collect()
            total += three_sums(sums.detach())
        return total

    def discard_gradients(self) -> None:
        """Forget the gradients that were summed for a step."""
        self.optimizer.zero_grad(set_to_none=True)
        self.weights.model.zero_grad(
            set_to_none=True
        )  # copies of lower precision have gradients of their own

    def tried(self) -> str:
        """Return in words how much memory a step was given."""
        return self.ladder.tried(self.state, self.plan)

    def way_down(self) -> str:
        """Return the setting that lowers the memory of a run that ran out of it, or nothing."""
        return self.ladder.way_down(self.state, self.plan)

    def measure_heldout(self, stop: StopFlag) -> None:
        """Score the held-out examples, unless there are none or ``stop`` is set meanwhile."""
        if self.heldout_loss is None:
            return
        begin = self.clock()
        self.weights.model.eval()
        scored = self.heldout_loss(stop)
        if scored is None:
            return
        after_loss = self.clock()
        answers = self._answers(stop)
        if answers is None and self.answer is not None and self.state.asks:
            return
        first = self.state.first_heldout_rows
        score = None if answers is None else answers.score
        self.state = with_heldout(self.state, scored, self.settings, score=score)
        end = self.clock()
        self.emit(
            HeldoutDone(
                step=self.state.step,
                loss=scored.loss,
                response_tokens=scored.response_tokens,
                seconds=end - begin,
                rows=scored.rows,
                fall_error=None if first is None else scored.fall_error(first),
                experts={layer: asdict(load) for layer, load in scored.experts.items()},
                answers={} if answers is None else answers.as_fields(),
                answer_seconds=0.0 if answers is None else end - after_loss,
                by_check=self.settings.metric_for_best is BestBy.CHECK,
            )
        )

    def _answers(self, stop: StopFlag) -> HeldoutAnswers | None:
        """Answer held-out prompts, if this run does; None where it does not, or ``stop`` is set meanwhile.

        Whether it does is decided once, and stays: a run that goes on does as it did. No random stream moves.
        """
        if self.answer is None or (self.state.asks is False and self.settings.answers_if_cheap):
            return None
        rng = capture_rng()
        if not self.state.asks:  # open, or asked for since
            every = self.settings.eval_every_steps
            evaluations = 1 + (-(-self.settings.max_steps // every) if every else 1)
            self.state = replace(self.state, asks=self.answer.is_cheap(evaluations=evaluations))
        answers = self.answer(stop) if self.state.asks else None
        restore_rng(rng)
        return answers

    def save(self) -> None:
        """Hand a snapshot to the store and wait until it is durable."""
        self.weights.refuse_nonfinite(self.state.step)
        snapshot = self.snapshot()
        self._saver.save_now(self.state.step, lambda: self.store.save(snapshot), is_last=True)

    def _save_and_go_on(self) -> None:
        self._timed.begun_at = self.clock()
        self._saver.finish(wait=True)  # so that no two snapshots are there at once
        self.weights.refuse_nonfinite(self.state.step)
        snapshot, step = self.snapshot(), self.state.step
        if self.checkpoint.in_background and self.weights.is_sharded:  # what is gathered is a copy already
            self._saver.begin(step, lambda: self.store.save(snapshot))
        elif self.checkpoint.in_background:
            copies = self.make_copies(self.device, [*snapshot.weights.values(), *snapshot.optimizer.values()])
            copy = snapshot.copied(copies)
            self._copies.append(copies)
            if self.weights.has_buffers:  # which a pass may change
                self._hold_for_copies()

            def save() -> str:
                copies.wait()
                return self.store.save(copy)

            self._saver.begin(step, save)
        else:
            self._saver.save_now(step, lambda: self.store.save(snapshot), is_last=False)

    def _hold_for_copies(self) -> None:
        """Let what changes the weights from here on come after the copies of them that are under way."""
        for copies in self._copies:
            copies.hold()
        self._copies.clear()

    def snapshot(self) -> TrainingSnapshot:
        """Return the full state, or this process's part of it. Its tensors are the live ones: write them out before the next step.

        Every process has to ask for it at the same time. Of weights that are shared out they are copies.
        """
        rng, *peers = collect_rng(self.group)
        return TrainingSnapshot(
            state=self.state,
            weights=self.weights.tensors(),
            optimizer=self.weights.gathered_state(optimizer_tensors(self.optimizer, self.weights.masters)),
            rng=rng,
            peers=tuple(peers),
            part=Part(number=self.group.rank, of=self.group.size) if self.weights.saves_parts else Part(),
        )

    def take_part_in_snapshot(self) -> None:
        """Contribute this process's shard to a snapshot that rank 0 takes."""
        self.snapshot()

    def restore(self, snapshot: TrainingSnapshot) -> None:
        """Go back to ``snapshot``: the next step is the one that would have followed it."""
        self._hold_for_copies()
        self.weights.restore(snapshot.weights)
        restore_optimizer(self.optimizer, self.weights.masters, snapshot.optimizer)
        restore_stream(snapshot, self.group, seed=self.settings.seed)
        self.state = snapshot.state
        self.plan = self.ladder.plan(self.state)
        self._saver.saved_step = snapshot.state.step

    def _is_due(self, every_steps: int) -> bool:
        """True every ``every_steps`` steps and at the last step; ``every_steps`` 0 means at the last step only."""
        step = self.state.step
        return step == self.settings.max_steps or (every_steps > 0 and step % every_steps == 0)

    def _owes_heldout(self) -> bool:
        is_due = self.state.step == 0 or self._is_due(self.settings.eval_every_steps)
        return self.heldout_loss is not None and is_due and self.state.last_heldout_step != self.state.step

    def name_rows(self, step: int) -> str:
        """Return in words which rows made step ``step``, counted from 1."""
        return named_rows(self.plan.window(step - 1), self.name_row)
