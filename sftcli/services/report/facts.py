"""What the page says about a run before its curves: a summary of two sentences, its main settings, and what was measured."""

from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import PurePath

from sftcli.config.schema.settings import Settings
from sftcli.events import DataPrepared, ExpertLoad, FitEnded, ModelLoaded
from sftcli.figures import (
    count,
    counted,
    duration,
    flop_rate,
    loss_figure,
    percent,
    rate_text,
    share_of,
    short_count,
    size,
)
from sftcli.services.report.evaluation import Evaluation
from sftcli.services.runs.record import RunRecord
from sftcli.services.runs.summary import RunHistory, not_since

_OPEN = "not decided yet"


def summary_of(history: RunHistory, settings: Settings, evaluation: Evaluation | None) -> str:
    """Return in two sentences what was trained on what, and what came of it."""
    return " ".join(filter(None, (_story(history), _outcome(history, settings, evaluation))))


def _story(history: RunHistory) -> str:
    model, data = history.last(ModelLoaded), history.last(DataPrepared)
    if not history.steps or model is None or data is None:
        return "No step was taken yet."
    step = history.steps[-1]
    steps, name = counted(step.step, "step"), PurePath(model.name)
    return (
        f"{name.name if name.is_absolute() else model.name} ({short_count(model.parameters)} parameters) was trained for {steps} on {count(data.train_examples)} "
        f"rows, {step.epoch:.2g} epochs, in {duration(history.seconds)}."
    )


def _outcome(history: RunHistory, settings: Settings, evaluation: Evaluation | None) -> str:
    loss = heldout_text(history, takes_best=settings.training.early_stopping_evals > 0)
    parts = [f"held-out loss {loss}"] if loss else []
    if evaluation is not None:
        tuned, base = evaluation.tuned, evaluation.base
        of_base = f", {share_of(base.matched, base.answered)} by the base" if base is not None else ""
        parts.append(f"{share_of(tuned.matched, tuned.answered)} answered exactly right{of_base}")
    text = "; ".join(parts)
    return f"{text[0].upper()}{text[1:]}." if text else ""


def main_settings(settings: Settings, history: RunHistory) -> Iterator[tuple[str, str]]:
    """Yield what one asks about first of the settings of a run."""
    training, adapter = settings.training, settings.adapter
    rate = training.learning_rate
    yield "learning rate", _OPEN if rate is None else f"{rate_text(rate)}, {training.schedule}"
    yield "batch", _OPEN if training.batch_size is None else f"{count(training.batch_size)} rows a step"
    yield "length", _length(settings, history)
    yield "adapter", adapter.described() if adapter.is_on else "none"
    if model := history.last(ModelLoaded):
        yield "trained weights", f"{short_count(model.trainable)} of {short_count(model.parameters)}"
    yield "longest row", f"at most {count(settings.data.max_tokens)} tokens"


def _length(settings: Settings, history: RunHistory) -> str:
    steps, epochs = settings.training.max_steps, settings.training.epochs
    if not steps:
        return _OPEN if epochs is None else f"{epochs:g} epochs"
    so_far = f", {history.steps[-1].epoch:.2g} epochs" if history.steps else ""
    return f"{count(steps)} steps{so_far}"


def measured(history: RunHistory, *, takes_best: bool) -> Iterator[tuple[str, str]]:
    """Yield what the log tells about model, machine, rows and steps."""
    if model := history.last(ModelLoaded):
        yield "model", f"{model.name}, {short_count(model.parameters)} parameters"
        yield "machine", f"{model.device}, {model.precision}{_measured_peak(model)}"
    if data := history.last(DataPrepared):
        yield "data", f"{data.source} ({data.schema})"
        yield "rows", f"{count(data.train_examples)} to train, {count(data.heldout_examples)} held out"
    if steps := history.steps:
        speed = f"{short_count(history.tokens_per_second or 0)} tok/s"
        yield "steps", f"{count(steps[-1].step)} in {duration(history.seconds)}, {speed}"
        if (used := history.utilization) is not None:
            yield "utilization", f"{percent(used)} of the rate of large matrix products"
        if peak := max(step.peak_memory_bytes for step in steps):  # 0 where the machine cannot tell
            yield "peak memory", size(peak)
    ended = history.last(FitEnded)
    if ended and ended.ending.reason:
        yield "ended", f"early, at step {ended.step}: {ended.ending.reason}"
    if message := heldout_text(history, takes_best=takes_best):
        yield "held-out loss", message
    if message := answers_text(history, takes_best=takes_best):
        yield "held-out answers", message
    if history.router_aux_loss is not None:
        yield "load-balancing loss", f"{loss_figure(history.router_aux_loss)} at the last step"
    yield from _expert_facts(history)


def started(record: RunRecord) -> str:
    """Return when and by what a run was started."""
    when = record.started_at
    with suppress(ValueError):  # of a folder of another's making: as it stands there
        when = f"{datetime.fromisoformat(when).astimezone(UTC):%Y-%m-%d %H:%M} UTC"
    return f"{when} with sft {record.version}, torch {record.torch}"


def _expert_facts(history: RunHistory) -> list[tuple[str, str]]:
    """Return how even each layer with routed experts used them at the first and the last held-out loss."""
    if not history.heldout:
        return []
    loads = [history.heldout[0].experts, history.heldout[-1].experts]
    worst = list(filter(None, map(ExpertLoad.worst, loads)))
    if len(worst) < len(loads):
        return []
    facts = [("experts", f"{worst[0]} before, {worst[1]} after, each in the least even layer")]
    for layer, last in loads[1].items():
        pair = [ExpertLoad.worst({layer: load}) for load in (loads[0].get(layer, {}), last)]
        facts.append((f"experts of layer {layer}", f"{pair[0]} before, {pair[1]} after"))
    return facts


def heldout_text(history: RunHistory, *, takes_best: bool) -> str:
    """Return held-out loss before training and of the final model, with its number of rows; empty for none.

    ``takes_best`` tells that the final model is that of the best evaluation behind the start, where there is one. A loss
    that was measured before the last step is not said to be the final one.
    """
    at = [(event.step, event.loss) for event in history.heldout]
    if not at:
        return ""
    best = _best_of(history)
    step, last = best if takes_best and best[0] else at[-1]
    steps, rows = history.steps, history.heldout_rows
    texts = loss_figure(at[0][1], rows), loss_figure(last, rows)
    is_behind = at[-1][0] < (steps[-1].step if steps else 0)
    of = f", of {counted(rows, 'row')}" if rows else ""
    if is_behind or len(at) == 1:
        return not_since(*texts, step) + of
    where = f" (step {step})" if step != at[-1][0] else ""
    return f"{texts[0]} before, {texts[1]} after{where}{of}"


def _best_of(history: RunHistory) -> tuple[int, float]:
    best = min(history.heldout, key=lambda event: event.rank)
    return best.step, best.loss


def answers_text(history: RunHistory, *, takes_best: bool) -> str:
    """Return how many held-out answers were right before training and with the final model; empty where none were given."""
    heldout = [(event.step, event.given) for event in history.heldout if event.given]
    if not heldout:
        return ""
    best = _best_of(history)[0]
    final = next((pair for pair in heldout if takes_best and best and pair[0] == best), heldout[-1])
    (begin, first), (step, last) = heldout[0], final
    texts = [
        f"{given.right} of {given.rows} right at step {count(at)}"
        for at, given in ((begin, first), (step, last))
    ]
    return f"{last.measure}: {', '.join(texts if step != begin else texts[:1])}"


def _measured_peak(model: ModelLoaded) -> str:
    peak = model.peak_flops
    return f"; {flop_rate(peak)} measured in large matrix products" if peak else ""
