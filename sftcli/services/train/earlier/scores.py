"""What a training does to the rows that earlier runs held out: scored before the first step and with the final model."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from sftcli.data.batches.batch import batches_in_order_of_length
from sftcli.data.batches.progress import with_progress
from sftcli.data.prepared.subset import ChosenRows
from sftcli.events import EarlierDone, EventSink, StopFlag
from sftcli.runtime import monotonic
from sftcli.services.train.earlier.rows import EarlierRows
from sftcli.training.loss import ratio_standard_error
from sftcli.training.row_scores import RowScore, score_rows_together
from sftcli.training.trainer import Trainer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MOST_ROWS = 200  # of each run, evenly spread
_BATCH_TOKENS = 1024  # positions scored at once: their logits are whole


@dataclass(frozen=True, slots=True, kw_only=True)
class EarlierScorer:
    """Scores the rows that earlier runs held out with the model in training; all processes of it have a part."""

    earlier: EarlierRows
    model: "PreTrainedModel"
    trainer: Trainer
    pad_id: int
    computes_all: bool  # each process needs the others for a pass
    emit: EventSink

    def begin(self, stop: StopFlag) -> None:
        """Score them before the first step; ``stop`` leaves it."""
        state = self.trainer.state
        if state.step or state.first_earlier_rows is not None:
            return
        measured = self._measure(stop)
        if measured is None:
            return
        for run, scores, answers, seconds in measured:
            self.emit(_event(run, scores, answers, seconds))
        self.trainer.state = replace(
            state,
            first_earlier_rows=[[score.nll for score in scores] for _, scores, _, _ in measured],
            first_earlier_right=[_right(scores, answers) for _, scores, answers, _ in measured],
        )

    def end(self, stop: StopFlag) -> None:
        """Score them once more, beside what they were before the first step; nothing where that is not known."""
        state = self.trainer.state
        if not state.first_earlier_rows or state.first_earlier_right is None:
            return
        before = zip(state.first_earlier_rows, state.first_earlier_right, strict=True)
        for (run, scores, answers, seconds), (nll, right) in zip(
            self._measure(stop) or (), before, strict=False
        ):
            found = _event(run, scores, answers, seconds)
            rises = [score.nll - one for score, one in zip(scores, nll, strict=True)]
            tokens = [score.tokens for score in scores]
            pairs = list(zip(right, _right(scores, answers), strict=True))
            self.emit(
                replace(
                    found,
                    step=state.step,
                    is_end=True,
                    lost=pairs.count((True, False)),
                    gained=pairs.count((False, True)),
                    rise=sum(rises) / sum(tokens),
                    rise_error=ratio_standard_error(rises, tokens),
                )
            )

    def _measure(self, stop: StopFlag) -> list[tuple[str, list[RowScore], list[bool], float]] | None:
        """Return of each run: its name, the scores of its rows, which of these have an answer, and the seconds it took."""
        measured = []
        self.trainer.weights.model.eval()
        for run, places in self.earlier.heldout():
            begin, rows = monotonic(), ChosenRows(self.earlier.dataset.heldout, spread(places))
            batches = batches_in_order_of_length(
                rows, rows=range(len(rows)), max_batch_tokens=_BATCH_TOKENS, pad_id=self.pad_id
            )
            scores = score_rows_together(
                self.model,
                with_progress(batches, self.emit, task=f"rows of {run}", total=len(rows)),
                num_rows=len(rows),
                stop=stop,
                group=self.trainer.group,
                device=self.trainer.device,
                computes_all=self.computes_all,
            )
            if scores is None:
                return None
            answers = [rows[index].kind != "text" for index in range(len(rows))]
            measured.append((run, scores, answers, monotonic() - begin))
        return measured


def spread(places: range, most: int = MOST_ROWS) -> list[int]:
    """Return at most ``most`` of ``places``, evenly spread."""
    count = min(most, len(places))
    return [places[index * len(places) // count] for index in range(count)]


def _right(scores: Sequence[RowScore], answers: Sequence[bool]) -> list[bool]:
    return [
        is_answer and score.correct == score.tokens for score, is_answer in zip(scores, answers, strict=True)
    ]


def _event(run: str, scores: Sequence[RowScore], answers: Sequence[bool], seconds: float) -> EarlierDone:
    tokens = sum(score.tokens for score in scores)
    return EarlierDone(
        run=run,
        step=0,
        is_end=False,
        loss=sum(score.nll for score in scores) / tokens,
        response_tokens=tokens,
        seconds=seconds,
        rows=len(scores),
        answered=sum(answers),
        right=sum(_right(scores, answers)),
    )
