"""Each event in words, the same for every view."""

from math import isfinite
from typing import assert_never

from sftcli.cli.terminal.text import clean, loss_text, norm_text
from sftcli.cli.views.measures import TrainingMeasures
from sftcli.events import (
    DataPrepared,
    EarlierDone,
    ExpertLoad,
    FitEnded,
    HeldoutAnswers,
    HeldoutDone,
    Judged,
    MemoryEased,
    ModelLoaded,
    ModelSaved,
    Notice,
    Progressed,
    RunStarted,
    StepDone,
    Warned,
)
from sftcli.figures import count, duration, flop_rate, percent, rate_text, short_count, size, whole_duration


def stop_text(*, trains: bool) -> str:
    """Return what is said when a stop was asked for: in a training a step is still taken, elsewhere there is none."""
    return f"stopping{' after this step' if trains else ''}; press Ctrl-C again to quit now"


Told = (
    Notice
    | Warned
    | Judged
    | RunStarted
    | DataPrepared
    | ModelLoaded
    | MemoryEased
    | EarlierDone
    | ModelSaved
)  # alone says all


def message(event: Told) -> tuple[str, str]:
    """Return the line of an event that is the same in every view: a word before it that may stand out, and its text."""
    match event:
        case Notice() | MemoryEased():
            return "", clean(event.text)
        case Warned():
            return "warning: ", clean(event.text)
        case Judged():
            return f"{event.kind}: ", f"{clean(event.reason)}. Advice: {clean(event.advice)}"
        case RunStarted():
            return "", f"run {clean(event.run)} in {clean(event.path)}"
        case DataPrepared():
            return "", _data_line(event)
        case ModelLoaded():
            return "", _model_line(event)
        case EarlierDone():
            return "", _earlier_line(event)
        case ModelSaved():
            return "", f"saved {clean(event.path)}"
        case _:
            assert_never(event)


def _data_line(event: DataPrepared) -> str:
    """Return what became of the rows, in one line."""
    parts = [f"{count(event.kept)} of {count(event.rows)} rows kept"]
    if event.rejected:
        reasons = ", ".join(
            f"{count(rows)} {clean(reason)}" for reason, rows in sorted(event.rejected.items())
        )
        parts[0] += f" (rejected: {reasons})"
    heldout = f"{count(event.heldout_examples)} held-out"
    # Rows that a model is only scored on are none to train on.
    parts.append(f"{count(event.train_examples)} train, {heldout}" if event.train_examples else heldout)
    if event.train_tokens:
        share = event.response_tokens / event.train_tokens
        parts.append(f"{short_count(event.train_tokens)} tokens, {percent(share)} of them trained")
    cached = " (from cache)" if event.cached else ""
    return f"data {clean(event.source)} [{clean(event.schema)}]{cached}: " + "; ".join(parts)


def _model_line(event: ModelLoaded) -> str:
    """Return which model is where, in one line."""
    # A model that only answers trains nothing, which goes without saying.
    is_all_or_nothing = event.trainable in {0, event.parameters}
    trainable = "" if is_all_or_nothing else f", {short_count(event.trainable)} trained"
    size = f"{short_count(event.parameters)} parameters{trainable}"
    peak = f", {flop_rate(event.peak_flops)} measured" if event.peak_flops else ""
    why = f" ({clean(event.precision_why)})" if event.precision_why else ""
    return (
        f"model {clean(event.name)}: {size}, on {clean(event.device)} in {clean(event.precision)}{why}{peak}"
    )


def _earlier_line(event: EarlierDone) -> str:
    """Return ``rows of first: held-out loss 0.031, right 48 of 60  (0.4s)``."""
    right = f", right {count(event.right)} of {count(event.answered)}" if event.answered else ""
    loss = loss_text(event.loss, event.rows)
    return f"rows of {clean(event.run)}: held-out loss {loss}{right}  ({duration(event.seconds)})"


def heldout_line(event: HeldoutDone) -> str:
    """Return one evaluation."""
    load, given = ExpertLoad.worst(event.experts), event.given
    parts = [
        f"step {event.step}",
        f"held-out loss {loss_text(event.loss, event.rows)}",
        *([clean(given.in_words())] if given else []),
        f"({duration(event.seconds)})",
        *([f"experts: {load}"] if load else []),
    ]
    return "  ".join(parts)


_SAID = 30  # characters of an answer in a line


def says_text(answers: HeldoutAnswers) -> str:
    """Return ``says "refund" where "billing" is expected``, of the first prompt; nothing where no answer was kept."""
    if not answers.given:
        return ""
    first = answers.given[0]
    if first.text == first.expected:
        return f"says {_quoted(first.text)}, as expected"
    return f"says {_quoted(first.text)} where {_quoted(first.expected)} is expected"


def _quoted(text: str) -> str:
    line = " ".join(clean(text).split())
    if not line:
        return "nothing"
    return f'"{line if len(line) <= _SAID else f"{line[:_SAID].rstrip()}..."}"'


def end_line(event: FitEnded, measures: TrainingMeasures) -> str:
    """Return how training ended, and what part of the measured peak of matrix products it made use of."""
    used = measures.whole_utilization
    at = "" if used is None else f" at {percent(used)} of the machine's peak"
    return f"training {event.ending.message(f'at step {event.step}{at}')}"


def step_line(measures: TrainingMeasures, step: StepDone) -> str:
    """Return one training step as ``step 20/90  loss 1.234  lr 2.0e-04  grad 1.9  2.3k tok/s  2.1 GB  eta 1m20s``.

    It fits into 80 columns. The speed is in tokens without padding, as everywhere; the memory is the peak so far. Steps that are
    replayed have no end that is known.
    """
    remaining = measures.remaining_seconds if measures.last_step else None
    parts = [
        f"step {step.step}/{measures.last_step}" if measures.last_step else f"step {step.step}",
        f"loss {loss_text(step.loss)}",
        *([] if step.objective is None else [f"objective {loss_text(step.objective)}"]),
        *([] if step.router_aux_loss is None else [f"router aux {loss_text(step.router_aux_loss)}"]),
        f"lr {rate_text(step.learning_rate)}",
        f"grad {norm_text(step.grad_norm)}",
        f"{short_count(round(measures.tokens_per_second))} tok/s",
        *([size(step.peak_memory_bytes)] if step.peak_memory_bytes else []),
        *(
            [f"eta {whole_duration(remaining) if remaining is not None else '?'}"]
            if measures.last_step
            else []
        ),
    ]
    return "  ".join(parts) + ("  text" if step.text_tokens else "") + ("" if step.applied else "  skipped")


def seconds_left(event: Progressed, seconds: float) -> float | None:
    """Return how long a command still takes, whose task has taken ``seconds``; None where that is not known."""
    if not event.done or not isfinite(event.later_seconds):
        return None
    return seconds * (event.total - event.done) / event.done + event.later_seconds


def progress_line(event: Progressed, seconds: float) -> str:
    """Return ``preparing rows.jsonl 1,200/5,000 rows, 240/s, 16s left``, of work that has taken ``seconds``."""
    if not event.total and not event.done:  # nothing to count: a wait
        return f"{clean(event.task)}, {whole_duration(seconds)}"
    amount = size if event.unit == "bytes" else count
    unit = "" if event.unit == "bytes" else f" {clean(event.unit)}"
    total = f"/{amount(event.total)}" if event.total else ""
    parts = [f"{clean(event.task)} {amount(event.done)}{total}{unit}"]
    if event.done and seconds > 0:
        parts.append(f"{amount(event.done / seconds)}/s")
        if event.done < event.total and (left := seconds_left(event, seconds)) is not None:
            parts.append(f"{whole_duration(left)} left")
    return ", ".join(parts)
