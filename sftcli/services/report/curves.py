"""The charts of one run or several: which curve of a log is drawn where."""

import math
from collections.abc import Sequence

from sftcli.services.report.charts import Series, draw
from sftcli.services.runs.summary import RunHistory

SMOOTHING = 0.7  # share of the past in the smoothed loss


def charts_of(runs: Sequence[tuple[str, RunHistory]]) -> list[tuple[str, str]]:
    """Return titles and SVG of the charts of named runs, every run a color; none where no step was taken."""
    loss: list[Series] = []
    rate: list[Series] = []
    speed: list[Series] = []
    memory: list[Series] = []
    for number, (name, history) in enumerate(runs):
        color = 2 * number
        loss += _losses(f"{name}: " if len(runs) > 1 else "", history, color)
        steps = [step for step in history.steps if math.isfinite(step.loss)]
        x = [one.step for one in steps]
        rate.append(Series(name=name, x=x, y=[one.learning_rate for one in steps], color=color))
        per_second = [one.tokens / max(one.seconds, 1e-9) for one in steps]
        speed.append(Series(name=name, x=x, y=per_second, color=color))
        peaks = [one.peak_memory_bytes / 1e9 for one in steps]
        memory.append(Series(name=name, x=x, y=peaks, color=color))
    if not any(series.x for series in loss):
        return []
    has_memory = any(any(series.y) for series in memory)  # 0 where the machine cannot tell
    plan = (
        ("Loss", loss, "nats per token", False),
        ("Learning rate", rate, "rate", True),
        ("Throughput", speed, "tokens per second", True),
        *([("Peak memory", memory, "GB", True)] if has_memory else []),
    )
    return [
        (title, draw(title, series, y_label=unit, from_zero=from_zero, identity=f"c{place}"))
        for place, (title, series, unit, from_zero) in enumerate(plan)
    ]


def _losses(prefix: str, history: RunHistory, color: int) -> list[Series]:
    """Return the training loss of rows, as it is and smoothed, and the held-out loss."""
    x = [one.step for one in history.steps if math.isfinite(one.loss) and not one.text_tokens]
    series = [
        Series(name="", x=x, y=history.losses, color=color, kind="faint"),
        Series(name=f"{prefix}training", x=x, y=_smoothed(history.losses), color=color),
    ]
    if heldout := history.heldout:
        at, y = [one.step for one in heldout], [one.loss for one in heldout]
        series.append(Series(name=f"{prefix}held-out", x=at, y=y, color=color + 1, kind="dots"))
    return series


def _smoothed(values: Sequence[float]) -> list[float]:
    """Return an exponential average, corrected for its start."""
    total = weight = 0.0
    smooth = []
    for value in values:
        total, weight = SMOOTHING * total + value, SMOOTHING * weight + 1
        smooth.append(total / weight)
    return smooth
