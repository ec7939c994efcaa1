"""One HTML page about a run, or several on one page: model, data, losses and answers.

The page is one file. It loads nothing, runs no script, and follows the reader's light or dark setting. It is made from
the run folder alone: no model is needed.
"""

import math
import shlex
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from sftcli import storage
from sftcli.config.schema.settings import Settings
from sftcli.errors import OutputError, StorageError
from sftcli.events import (
    DataPrepared,
    EarlierDone,
    ExpertLoad,
    FitEnded,
    Judged,
    MemoryEased,
    ModelLoaded,
    Warned,
)
from sftcli.figures import change, interval, loss_figure
from sftcli.json_files import read_json
from sftcli.services.diagnosis.judge import judge_run
from sftcli.services.report.charts import Series, draw
from sftcli.services.report.measures import Compared, compare_scores
from sftcli.services.runs.earlier import kept_of
from sftcli.services.runs.event_log import read_events
from sftcli.services.runs.folder import RunFolder, resolve_run
from sftcli.services.runs.lineage import recorded_lineage
from sftcli.services.runs.summary import RunHistory, can_be_scored, not_since, read_scores
from sftcli.services.runs.trained_rows import TrainedRows

Fields = Mapping[str, object]

SMOOTHING = 0.7  # share of the past in the smoothed loss


def write_report(runs: Sequence[RunFolder], out: Path) -> Path:
    """Write the page about ``runs`` to ``out``, atomically.

    Raises:
        OutputError: The place cannot be written.
        StorageError: Its disk is full.
    """
    source = files("sftcli.services.report").joinpath("report.html.jinja").read_text(encoding="utf-8")
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    pages = [_describe(run) for run in runs]
    page = environment.from_string(source).render(
        runs=pages, charts=_charts(runs), title=", ".join(run.name for run in runs)
    )
    try:
        storage.replace_file(out, page.encode())
    except OSError as error:
        if error.errno in storage.FULL_DISK:
            raise StorageError(
                f"the disk that holds {out} is full", hint="free space, or choose another --out"
            ) from error
        raise OutputError(f"cannot write {out}: {error.strerror}", hint="choose another --out") from error
    return out


def _describe(run: RunFolder) -> dict[str, object]:
    """Return what the page says about one run."""
    history = RunHistory(read_events(run))
    verdict = judge_run(run, history)
    evaluation = read_scores(run)
    resolved, is_scorable = resolve_run(run), can_be_scored(run)
    return {
        "name": run.name,
        "argument": run.argument,
        "about": run.read_about(),
        "facts": [
            *_facts(history, takes_best=resolved.settings.training.early_stopping_evals > 0),
            *_earlier_facts(run, history),
            *_adapter_facts(resolved.settings, history),
        ],
        "verdict": verdict,
        "audits": [(split, audit) for split, audit in _audits(run) if audit.get("rows")],
        "rows": resolved.rows(),
        "evaluation": evaluation,
        "measures": measures_of(evaluation) if evaluation else [],
        "loss_difference": difference_of(evaluation) if evaluation else "",
        "trained_on": _trained_on(evaluation),
        "can_be_scored": is_scorable,
        "samples": evaluation.get("samples", []) if evaluation else [],
        "base": _name(evaluation, "base"),
        "tuned": _name(evaluation, "tuned"),
        "judgements": history.of(Judged),
        "warnings": [event.text for event in history.events if isinstance(event, Warned | MemoryEased)],
        "commands": [
            str(run.read_about().get("command", "")),
            f"sft train --config {shlex.quote(str(run.config))}",
            *([f"sft eval {run.argument}"] if is_scorable else []),
            f'sft generate "your prompt" --checkpoint {run.argument}',
        ],
    }


def _earlier_facts(run: RunFolder, history: RunHistory) -> list[tuple[str, str]]:
    """Return from which runs this one trained on, how many of their rows were replayed, and what became of the others."""
    lineage = recorded_lineage(run) or ()
    facts = [("trained on from", ", before that ".join(one.run for one in lineage))] if lineage else []
    replayed = dict(_audits(run)).get("replayed", {})
    sources = replayed.get("sources") or {}
    if isinstance(sources, dict) and sources:
        counts = [f"{counted['kept']:,} rows {source}" for source, counted in sources.items()]
        facts.append(("replay", ", ".join(counts)))
    return facts + [("earlier rows", kept.in_words()) for kept in kept_of(history.of(EarlierDone))]


def _adapter_facts(settings: Settings, history: RunHistory) -> list[tuple[str, str]]:
    if not settings.adapter.is_on:
        return []
    model = history.last(ModelLoaded)
    trained = f"; {model.trainable:,} weights train" if model else ""
    return [("adapter", settings.adapter.described() + trained)]


def _facts(history: RunHistory, *, takes_best: bool) -> list[tuple[str, str]]:
    facts = []
    if model := history.last(ModelLoaded):
        facts.append(("model", f"{model.name}, {model.parameters:,} parameters"))
        facts.append(("machine", f"{model.device}, {model.precision}{_measured_peak(model)}"))
    if data := history.last(DataPrepared):
        facts.append(("data", f"{data.source} ({data.schema})"))
        facts.append(("rows", f"{data.train_examples:,} to train, {data.heldout_examples:,} held out"))
    if steps := history.steps:
        speed = f"{history.tokens_per_second or 0:,.0f} tokens/s"
        facts.append(("steps", f"{steps[-1].step} in {history.seconds:,.0f} s, {speed}"))
        if (used := history.utilization) is not None:
            facts.append(("utilization", f"{used:.0%} of the rate of large matrix products"))
        if peak := max(step.peak_memory_bytes for step in steps):  # 0 where the machine cannot tell
            facts.append(("peak memory", f"{peak / 1e9:.2f} GB"))
    ended = history.last(FitEnded)
    if ended and ended.ending.reason:
        facts.append(("ended", f"early, at step {ended.step}: {ended.ending.reason}"))
    if message := heldout_text(history, takes_best=takes_best):
        facts.append(("held-out loss", message))
    if history.router_aux_loss is not None:
        facts.append(("load-balancing loss", f"{loss_figure(history.router_aux_loss)} at the last step"))
    return facts + _expert_facts(history)


def _expert_facts(history: RunHistory) -> list[tuple[str, str]]:
    """Return how even each layer with routed experts used them at the first and the last held-out loss."""
    if not history.heldout:
        return []
    measured = [history.heldout[0].experts, history.heldout[-1].experts]
    worst = list(filter(None, map(ExpertLoad.worst, measured)))
    if len(worst) < len(measured):
        return []
    facts = [("experts", f"{worst[0]} before, {worst[1]} after, each in the least even layer")]
    for layer, last in measured[1].items():
        loads = [ExpertLoad.worst({layer: load}) for load in (measured[0].get(layer, {}), last)]
        facts.append((f"experts of layer {layer}", f"{loads[0]} before, {loads[1]} after"))
    return facts


def heldout_text(history: RunHistory, *, takes_best: bool) -> str:
    """Return held-out loss before training and of the final model, with its number of rows; empty for none.

    ``takes_best`` tells that the final model is that of the best evaluation behind the start, where there is one. A loss
    that was measured before the last step is not said to be the final one.
    """
    at = [(event.step, event.loss) for event in history.heldout]
    if not at:
        return ""
    best = min(at, key=lambda pair: pair[1])
    step, last = best if takes_best and best[0] else at[-1]
    steps, rows = history.steps, history.heldout_rows
    texts = loss_figure(at[0][1], rows), loss_figure(last, rows)
    is_behind = at[-1][0] < (steps[-1].step if steps else 0)
    of = f", of {rows:,} rows" if rows else ""
    if is_behind or len(at) == 1:
        return not_since(*texts, step) + of
    where = f" (step {step})" if step != at[-1][0] else ""
    return f"{texts[0]} before, {texts[1]} after{where}{of}"


def _measured_peak(model: ModelLoaded) -> str:
    peak = model.peak_flops
    return f"; {peak / 1e12:.2g} TFLOP/s measured in large matrix products" if peak else ""


def _charts(runs: Sequence[RunFolder]) -> list[tuple[str, str]]:
    """Return titles and SVG of the charts, every run a color."""
    loss: list[Series] = []
    rate: list[Series] = []
    speed: list[Series] = []
    memory: list[Series] = []
    for number, run in enumerate(runs):
        history = RunHistory(read_events(run))
        steps = [step for step in history.steps if math.isfinite(step.loss)]
        x, x_of_rows = [one.step for one in steps], [one.step for one in steps if not one.text_tokens]
        name = f"{run.name}: " if len(runs) > 1 else ""
        color = 2 * number
        loss.append(Series(name="", x=x_of_rows, y=history.losses, color=color, kind="faint"))
        loss.append(Series(name=f"{name}training", x=x_of_rows, y=_smoothed(history.losses), color=color))
        if heldout := history.heldout:
            at = [one.step for one in heldout]
            loss.append(
                Series(
                    name=f"{name}held out",
                    x=at,
                    y=[one.loss for one in heldout],
                    color=color + 1,
                    kind="dots",
                )
            )
        rate.append(Series(name=run.name, x=x, y=[one.learning_rate for one in steps], color=color))
        per_second = [one.tokens / max(one.seconds, 1e-9) for one in steps]
        speed.append(Series(name=run.name, x=x, y=per_second, color=color))
        gigabytes = [one.peak_memory_bytes / 1e9 for one in steps]
        memory.append(Series(name=run.name, x=x, y=gigabytes, color=color))
    if not any(series.x for series in loss):
        return []
    plan = (
        ("Loss", loss, "nats per token"),
        ("Learning rate", rate, "rate"),
        ("Throughput", speed, "tokens per second"),
        ("Peak memory", memory, "GB"),
    )
    return [
        (title, draw(title, series, x_label="step", y_label=unit, identity=f"c{place}"))
        for place, (title, series, unit) in enumerate(plan)
    ]


def _smoothed(values: Sequence[float]) -> list[float]:
    """Return an exponential average, corrected for its start."""
    total = weight = 0.0
    smooth = []
    for value in values:
        total, weight = SMOOTHING * total + value, SMOOTHING * weight + 1
        smooth.append(total / weight)
    return smooth


def measures_of(evaluation: Fields) -> list[Compared]:
    """Return the scores of ``eval.json`` side by side."""
    base, tuned, rows = evaluation["base"], evaluation["tuned"], evaluation["rows"]
    if not isinstance(tuned, dict) or not isinstance(rows, int):
        return []
    return compare_scores(base if isinstance(base, dict) else None, tuned, rows=rows)


def difference_of(evaluation: Fields) -> str:
    """Describe how the loss differs from the base's; empty if not compared."""
    found, rows = evaluation.get("loss_difference"), evaluation["rows"]
    if not isinstance(found, dict) or not isinstance(rows, int):
        return ""
    bounds = interval(found["low"], found["high"], 3, rows)
    return f"Loss changed by {change(found['value'], 3, rows)} against the base; {bounds}"


def _trained_on(evaluation: Fields | None) -> str:
    found = evaluation.get("trained_on") if evaluation else None
    return str(TrainedRows(**found)).capitalize() if isinstance(found, dict) else ""


def _name(evaluation: Fields | None, which: str) -> str:
    model = evaluation.get(which) if evaluation else None
    return str(model["model"]) if isinstance(model, dict) else ""


def _audits(run: RunFolder) -> list[tuple[str, Fields]]:
    audit = read_json(run.data).get("audit") if run.data.is_file() else None
    return list(audit.items()) if isinstance(audit, dict) else []
