"""The picture of a running command as rows of styled text, for any width. Knows no terminal, no clock, no lock.

From 58 columns on, values stand in columns, so that a number that changes moves nothing else. Below, they follow one
another and the last ones go first. Below 36 there is one line.
"""

from dataclasses import dataclass
from math import ceil, isfinite

from sftcli.cli.terminal.text import Signs, clean, loss_text, norm_text, sparkline
from sftcli.cli.views.measures import TrainingMeasures
from sftcli.cli.views.wording import says_text, seconds_left
from sftcli.events import HeldoutDone, Progressed
from sftcli.figures import count, duration, percent, rate_text, size, whole_duration

LABEL_COLUMNS = 10
CELL_COLUMNS = 18
MAX_BAR_COLUMNS = 60
MAX_CURVE_COLUMNS = 44
MAX_CELLS = 4
MIN_GRID_COLUMNS = 58
MIN_ROWS_COLUMNS = 36
MIN_SPEED_COLUMNS = 80  # of work other than training
_TIME_COLUMNS, _SPEED_COLUMNS = 14, 12
_BESIDE_BAR = LABEL_COLUMNS + 2 + len("100%  ") + _TIME_COLUMNS  # gap, share, time

Span = tuple[str, str]  # text, Rich style
Row = list[Span]

LABEL, UNIT, VALUE, BAR, REST, GOOD, BAD, NOTE = (
    "dim",
    "dim",
    "bold",
    "cyan",
    "dim",
    "green",
    "bold red",
    "yellow",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A piece of work other than training, and for how many seconds it has run."""

    event: Progressed
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """All that a panel shows besides the measures.

    ``note`` is a sentence that asks for attention; ``final`` freezes the panel as the record of a run that ended.
    """

    elapsed_seconds: float = 0.0
    since_step_seconds: float = 0.0  # since the last step or evaluation ended
    checkpoint_age_seconds: float = 0.0
    is_training: bool = False
    final: bool = False
    note: str = ""
    tasks: tuple[Task, ...] = ()


def build_panel(measures: TrainingMeasures, frame: Frame, *, columns: int, signs: Signs) -> list[Row]:
    """Return the rows of a panel, each at most ``columns`` wide."""
    if columns < MIN_ROWS_COLUMNS:
        rows = [_one_line(measures, frame)] if frame.is_training else []
    else:
        rows = _training_rows(measures, frame, columns, signs) if frame.is_training else []
    rows += [_task_row(task, columns, signs) for task in frame.tasks]
    if frame.note:
        rows.append([(frame.note, NOTE)])
    return [_crop(row, columns, signs) for row in rows]


def row_width(row: Row) -> int:
    """Return how many columns a row takes, for text without wide characters."""
    return sum(len(text) for text, _ in row)


def _training_rows(measures: TrainingMeasures, frame: Frame, columns: int, signs: Signs) -> list[Row]:
    rows = [_bar_row(measures, frame, columns, signs)]
    if measures.last is None:
        return rows + _heldout_rows(measures, columns)
    step = measures.last
    rows.append(_epoch_row(measures, step.epoch, columns, signs))
    loss_style = VALUE if isfinite(step.loss) else BAD
    losses = [
        ((loss_text(step.loss), loss_style), "now"),
        ((loss_text(measures.smooth_loss), VALUE), "smoothed"),
    ]
    if step.objective is not None:
        losses.append(((loss_text(step.objective), VALUE), "objective"))
    if step.router_aux_loss is not None:
        losses.append(((loss_text(step.router_aux_loss), VALUE), "router aux"))
    if measures.skipped_steps:
        losses.append(((count(measures.skipped_steps), BAD), "skipped"))
    loss_rows = _cells("loss", losses, columns)
    loss_row = loss_rows[0]
    room = min(columns - row_width(loss_row) - 1, MAX_CURVE_COLUMNS)
    if room >= 6:
        loss_row.append((" " + sparkline(measures.losses.points, room - 1, signs.levels), BAR))
    norm_style = VALUE if isfinite(step.grad_norm) else BAD
    update = [
        ((rate_text(step.learning_rate), VALUE), "lr"),
        ((norm_text(step.grad_norm), norm_style), "grad norm"),
        ((duration(measures.step_seconds), VALUE), "each"),
    ]
    if step.peak_memory_bytes:
        update.append(((size(step.peak_memory_bytes), VALUE), "memory"))
    speed = [
        ((count(measures.response_tokens_per_second), VALUE), "response"),
        ((count(measures.tokens_per_second), VALUE), "all"),
        ((percent(measures.padding_fraction), VALUE), "padding"),
    ]
    if measures.utilization is not None:
        speed.append(((percent(measures.utilization), VALUE), "of peak"))
    rows += [*loss_rows, *_heldout_rows(measures, columns)]
    rows += _cells("step", update, columns) + _cells("tokens/s", speed, columns)
    if measures.checkpoint is not None:
        age = "" if frame.final else f", {whole_duration(frame.checkpoint_age_seconds)} ago"
        rows.append(
            [*_label("saved"), ("step ", UNIT), (count(measures.checkpoint.step), VALUE), (age, UNIT)]
        )
    return rows


def _heldout_rows(measures: TrainingMeasures, columns: int) -> list[Row]:
    last, best, first = measures.last_heldout, measures.best_heldout, measures.first_heldout
    if last is None or first is None:
        return []
    style = BAD if not isfinite(last.loss) else GOOD if last is best and last is not first else VALUE
    cells = [((loss_text(last.loss, last.rows), style), _at("last", last))]
    if last is not first:
        # Where there is no room for all three, the last that is also the best is not worth two of them.
        if best is not None and (best is not last or _cells_in_row(columns) > 2):
            cells.append(((loss_text(best.loss, best.rows), VALUE), _at("best", best)))
        cells.append(((loss_text(first.loss, first.rows), VALUE), _at("first", first)))
    return _cells("held-out", cells, columns)[:1] + _answer_rows(last)


def _answer_rows(last: HeldoutDone) -> list[Row]:
    """Return how many held-out answers are right, and what the first prompt is answered now."""
    given = last.given
    if given is None:
        return []
    says = says_text(given)
    return [[*_label("answers"), (clean(given.in_words()), VALUE), (f"; {says}" if says else "", UNIT)]]


def _at(name: str, event: HeldoutDone) -> str:
    return f"{name} @{event.step}"


def _bar_row(measures: TrainingMeasures, frame: Frame, columns: int, signs: Signs) -> Row:
    bar, steps = _bar_and_steps(measures, columns)
    done = f"{percent(measures.fraction):>4}  "
    time = f"{_time_left(measures, frame):<14}"
    return [
        *_label("train"),
        *_bar(measures.fraction, bar, signs),
        ("  " + steps, VALUE),
        (done, ""),
        (time, UNIT),
    ]


def _bar_and_steps(measures: TrainingMeasures, columns: int) -> tuple[int, str]:
    """Return the width of the bars and the text behind the first one, which is empty where there is no room."""
    total = count(measures.last_step)
    steps = f"{count(measures.step):>{len(total)}}/{total}  "
    if columns - _BESIDE_BAR - len(steps) < 8:
        steps = ""
    return min(MAX_BAR_COLUMNS, columns - _BESIDE_BAR - len(steps)), steps


def _epoch_row(measures: TrainingMeasures, epoch: float, columns: int, signs: Signs) -> Row:
    """Return how far the present pass over the rows is, under the bar of the whole."""
    bar, _ = _bar_and_steps(measures, columns)
    in_pass = epoch - ceil(epoch) + 1 if epoch else 0.0
    return [
        *_label("epoch"),
        *_bar(in_pass, bar, signs),
        (f"  {epoch:.2f}/{measures.last_epoch:.2f}", VALUE),
    ]


def _time_left(measures: TrainingMeasures, frame: Frame) -> str:
    if frame.final:
        return f"in {duration(frame.elapsed_seconds)}"
    remaining = measures.remaining_seconds
    if remaining is None:
        return f"started {whole_duration(frame.elapsed_seconds)}"
    return f"{whole_duration(max(0.0, remaining - frame.since_step_seconds))} left"


def _bar(fraction: float, columns: int, signs: Signs) -> Row:
    full = round(max(0.0, min(1.0, fraction)) * columns)
    return [(signs.bar * full, BAR), (signs.rest * (columns - full), REST)]


def _task_row(task: Task, columns: int, signs: Signs) -> Row:
    event = task.event
    label = clean(event.task)
    amount = size if event.unit == "bytes" else count
    unit = "" if event.unit == "bytes" else f" {clean(event.unit)}"
    is_measured = task.seconds >= 2 and event.done > 0
    speed = f"  {amount(event.done / task.seconds)}/s" if is_measured else ""
    if event.total <= 0:
        begin = (f"{label:<{LABEL_COLUMNS - 1}} ", LABEL)
        if not event.done:  # nothing to count: a wait
            return [begin, (whole_duration(task.seconds), VALUE)]
        return [begin, (amount(event.done), VALUE), (unit, UNIT), (speed, UNIT)]
    numbers = f"  {amount(event.done)}/{amount(event.total)}"
    left = seconds_left(event, task.seconds) if is_measured else None
    time = "" if left is None else f"  {whole_duration(left)} left"
    label_columns = max(LABEL_COLUMNS, min(len(label) + 2, columns // 3))
    used = label_columns + len(numbers) + len(unit)
    if columns < MIN_GRID_COLUMNS:
        time = ""
    behind = 0 if columns < MIN_GRID_COLUMNS else _TIME_COLUMNS
    if columns >= MIN_SPEED_COLUMNS:
        behind += _SPEED_COLUMNS
    else:
        speed = ""
    bar = max(0, min(MAX_BAR_COLUMNS, columns - used - behind))
    shown = label if len(label) < label_columns else label[: label_columns - 2] + signs.ellipsis[:1]
    return [
        (f"{shown:<{label_columns}}", LABEL),
        *_bar(event.done / event.total, bar if bar >= 4 else 0, signs),
        (numbers, VALUE),
        (unit, UNIT),
        (speed, UNIT),
        (time, UNIT),
    ]


def _one_line(measures: TrainingMeasures, frame: Frame) -> Row:
    loss = f" loss {loss_text(measures.last.loss)}" if measures.last else ""
    return [
        (f"{measures.step}/{measures.last_step}", VALUE),
        (loss, ""),
        (f" {_time_left(measures, frame)}", UNIT),
    ]


def _label(text: str) -> Row:
    return [(f"{text:<{LABEL_COLUMNS}}", LABEL)]


def _cells(label: str, cells: list[tuple[Span, str]], columns: int) -> list[Row]:
    """Lay ``(value, unit)`` cells out as rows under one label: in columns where there is room, else what fits."""
    if columns < MIN_GRID_COLUMNS:
        row = _label(label)
        for (value, style), unit in cells:
            gap = "  " if len(row) > 1 else ""
            if row_width(row) + len(gap) + len(value) + 1 + len(unit) > columns:
                break
            row += [(gap + value, style), (f" {unit}", UNIT)]
        return [row]
    per_row = _cells_in_row(columns)
    rows = []
    for start in range(0, len(cells), per_row):
        row = _label(label if start == 0 else "")
        for (value, style), unit in cells[start : start + per_row]:
            row += [(value, style), (f" {unit}".ljust(CELL_COLUMNS - len(value)), UNIT)]
        rows.append(row)
    return rows


def _cells_in_row(columns: int) -> int:
    return min(MAX_CELLS, (columns - LABEL_COLUMNS) // CELL_COLUMNS)


def _crop(row: Row, columns: int, signs: Signs) -> Row:
    """Return ``row`` without what goes beyond ``columns`` and without blanks at its end."""
    cropped: Row = []
    for text, style in row:
        room = columns - row_width(cropped)
        if len(text) > room:
            cropped.append((text[: room - 1] + signs.ellipsis[:1] if room else "", style))
            break
        cropped.append((text, style))
    while cropped and not cropped[-1][0].strip():
        cropped.pop()
    if cropped:
        cropped[-1] = (cropped[-1][0].rstrip(), cropped[-1][1])
    return cropped
