"""The Python API: ``prepare``, ``train`` and ``generate``, by the services that the commands use. ``docs/python.md`` shows it.

What is wrong is raised as an error of ``sftcli.errors``. Nothing is printed unless ``progress`` is set, and the process never
ends here. In the main thread signals stop a call as they stop a command, and Ctrl-C twice is a ``KeyboardInterrupt``;
elsewhere they are left alone. ``stop`` is asked between steps and tokens.

Settings are a TOML file's path, a mapping of sections, or ``Settings``, and single keys are keyword arguments with ``__``
for the dot: ``training__max_steps=20``. They count as what is typed on a command line, on top of ``preset`` and of the
environment variables ``SFT_...``, which ``Settings`` alone leave out.
"""

import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from sftcli.cli.session.signals import SignalStop, stop_on_signals
from sftcli.environment import set_defaults
from sftcli.errors import UsageError
from sftcli.events import Event, Session, fan_out
from sftcli.memory_faults import MemoryErrors

if TYPE_CHECKING:
    from sftcli.cli.session.session import View
    from sftcli.config.layers import Override
    from sftcli.config.resolve import Resolved
    from sftcli.config.schema.settings import Settings
    from sftcli.data.prepared.store import PreparedDataset
    from sftcli.data.quality.audit_summary import AuditSummary
    from sftcli.services.generate.answerer import Completion
    from sftcli.services.prepare.prepare import ShownRow
    from sftcli.services.train.run import TrainOutcome

SettingsLike: TypeAlias = "Mapping[str, object] | str | Path | Settings"
Prompt: TypeAlias = str | Sequence[Mapping[str, str]]
EventReceiver: TypeAlias = Callable[[Event], None]
Asked: TypeAlias = Callable[[], bool]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """Rows that a training would take. ``audit`` has ``train``, ``heldout`` and, where there is some, ``text``."""

    folder: Path
    audit: "Mapping[str, AuditSummary]"
    dataset: "PreparedDataset"  # ``train`` and ``heldout``: examples with ``input_ids`` and ``loss_mask``
    shown: "tuple[ShownRow, ...]"
    out: Path | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """A run and where it stands. Losses are nats per response token, by the number of finished steps, from the run's start."""

    run: Path
    final: Path | None  # the tuned model; None where the training was stopped
    losses: Mapping[int, float]  # of steps on rows
    heldout_losses: Mapping[int, float]
    audit: "Mapping[str, AuditSummary]"
    outcome: "TrainOutcome"


def prepare(
    settings: "SettingsLike | None" = None,
    /,
    *,
    preset: str | None = None,
    show: int = 0,
    out: str | Path | None = None,
    on_event: EventReceiver | None = None,
    progress: bool = False,
    stop: Asked | None = None,
    **keys: object,
) -> Prepared:
    """Read, check and tokenize rows as ``train`` would, and hand back the first ``show`` of them token by token.

    Args:
        settings: See the module.
        preset: Name of a preset to start from.
        show: How many rows to hand back as ``shown``.
        out: Folder to write Parquet files to, or a name in ``.jsonl`` for the rows as messages.
        on_event: Called with every event of ``sftcli.events``.
        progress: Whether to show progress: a bar in a notebook or a terminal, else lines on stderr.
        stop: Asked whether to stop.
        keys: Single settings, such as ``data__sources="rows.jsonl"``.

    Raises:
        SftError: Whatever ``sft prepare`` ends with, by the same exit codes.
    """
    set_defaults()
    resolved = _resolved_for_training(settings, preset, keys)
    from sftcli.services.prepare.prepare import PrepareRequest, run_prepare

    out = None if out is None else Path(out)
    request = PrepareRequest(
        settings=resolved.settings,
        show=show,
        out=out,
        as_messages=out is not None and out.suffix == ".jsonl",
    )
    with _session(on_event, stop, progress=progress) as session:
        outcome = run_prepare(request, session)
    outcome.fitness.require()
    return Prepared(
        folder=Path(outcome.folder),
        audit=outcome.data.audit,
        dataset=outcome.data.dataset,
        shown=outcome.shown,
        out=None if outcome.out is None else Path(outcome.out),
    )


def train(
    settings: "SettingsLike | None" = None,
    /,
    *,
    preset: str | None = None,
    resume: bool = False,
    on_event: EventReceiver | None = None,
    progress: bool = False,
    stop: Asked | None = None,
    **keys: object,
) -> Trained:
    """Fine-tune a model in this process. torch's random generators are seeded by it.

    Args:
        settings: See the module.
        preset: Name of a preset to start from.
        resume: Whether to go on with the run of the name ``run.name`` where there is one.
        on_event: Called with every event of ``sftcli.events``; what it raises ends the training.
        progress: Whether to show progress: a bar in a notebook or a terminal, else lines on stderr.
        stop: Asked between steps whether to save and end.
        keys: Single settings, such as ``training__max_steps=200``.

    Raises:
        SftError: Whatever ``sft train`` ends with, by the same exit codes.
    """
    set_defaults()
    resolved = _resolved_for_training(settings, preset, keys)
    from sftcli.services.train.start.early import check_start

    check_start(resolved.settings, auto=resume)
    _require_one_process(resolved.settings.training.processes)
    with _session(
        on_event, stop, progress=progress, every_steps=resolved.settings.training.log_every_steps
    ) as session:
        from sftcli.services.train.lead import TrainRequest, run_training

        label = preset or (Path(settings).stem if isinstance(settings, str | Path) else "run")
        request = TrainRequest(resolved=resolved, label=label, command="sftcli.train()", auto=resume)
        outcome = run_training(request, session)
    return _trained(outcome)


def generate(
    prompts: str | Sequence[Prompt],
    settings: "SettingsLike | None" = None,
    /,
    *,
    model: str | Path | None = None,
    system: str = "",
    base_model: str | None = None,
    tokenizer: str | None = None,
    on_event: EventReceiver | None = None,
    progress: bool = False,
    stop: Asked | None = None,
    **keys: object,
) -> "list[Completion]":
    """Answer a prompt, or several with the model loaded once; completions are in the order of the prompts.

    Args:
        prompts: A text, or a list of prompts: texts, or conversations as lists of ``{"role": ..., "content": ...}``.
        settings: See the module; ``sampling``, ``training.precision`` and ``run.root`` are read.
        model: Run, checkpoint, folder or model name; the newest finished run of ``run.root`` without it.
        system: System message of prompts that bring none.
        base_model: Base of an adapter, if it is not where the adapter says.
        tokenizer: As ``--tokenizer``.
        on_event: Called with every event of ``sftcli.events``; of a single text also with its answer as it grows.
        progress: Whether to show progress: a bar in a notebook or a terminal, else lines on stderr.
        stop: Asked between tokens; what it cuts has ``finish`` "stopped".
        keys: Single settings, such as ``sampling__temperature=0.7``.

    Raises:
        SftError: Whatever ``sft generate`` ends with, by the same exit codes.
    """
    set_defaults()
    chosen = _resolved(settings, None, keys).settings
    with _session(on_event, stop, progress=progress) as session:
        from sftcli.data.reading.record import Origin
        from sftcli.services.generate.prompt import run_prompts
        from sftcli.services.generate.prompt_file import messages_of_row
        from sftcli.services.generate.request import GenerateRequest

        asked = [prompts] if isinstance(prompts, str) else prompts
        questions = [
            messages_of_row(
                {"prompt": one} if isinstance(one, str) else {"messages": list(one)},
                system,
                Origin(path="prompts", line=number),
            )
            for number, one in enumerate(asked, start=1)
        ]
        request = GenerateRequest(
            prompt="",
            sampling=chosen.sampling,
            root=Path(chosen.run.root),
            precision=chosen.training.precision,
            checkpoint=None if model is None else str(model),
            tokenizer=tokenizer,
            base_model=base_model,
        )
        return run_prompts(request, questions, session)


def _resolved_for_training(
    settings: "SettingsLike | None", preset: str | None, keys: Mapping[str, object]
) -> "Resolved":
    from sftcli.services.train.start.going_on import resolved_with_start

    return resolved_with_start(lambda last: _resolved(settings, preset, keys, last=last))


def _resolved(
    settings: "SettingsLike | None",
    preset: str | None,
    keys: Mapping[str, object],
    *,
    last: "Sequence[Override]" = (),
) -> "Resolved":
    from sftcli.config.resolve import resolve
    from sftcli.config.schema.settings import Settings

    path = Path(settings) if isinstance(settings, str | Path) else None
    values: Mapping[str, object] = {}
    if isinstance(settings, Settings):
        values = _flat(settings.model_dump(exclude_unset=True))
    elif settings is not None and not isinstance(settings, str | Path):
        values = _untrusted(settings)
    named = {name.replace("__", ".", 1): value for name, value in keys.items()}
    return resolve(
        preset=preset,
        config_file=path,
        overrides=[*_overrides(values, "settings"), *_overrides(named, "keyword argument")],
        environ={} if isinstance(settings, Settings) else os.environ,
        last=last,
    )


def _untrusted(tables: Mapping[str, object]) -> Mapping[str, object]:
    """Return the keys of sections that may come from a file, which cannot say that foreign code may run.

    Raises:
        UsageError: They say it, or are no sections.
    """
    from sftcli.config.resolve import TYPED_KEYS

    if not isinstance(tables, Mapping):
        raise UsageError(
            f"settings are a path, a mapping of sections or Settings, not {type(tables).__name__}",
            hint='as in train({"data": {"sources": ["rows.jsonl"]}}) or train(data__sources="rows.jsonl")',
        )
    values = _flat(tables)
    for key, value in values.items():
        if key in TYPED_KEYS and value is not False:
            raise UsageError(
                f"{key} is not taken from a mapping",
                hint=f"for a model whose code you have read: {key.replace('.', '__')}=True, model__revision=COMMIT",
            )
    return values


def _flat(tables: Mapping[str, object]) -> dict[str, object]:
    """Return the keys of sections, dotted."""
    found: dict[str, object] = {}
    for section, values in tables.items():
        if isinstance(values, Mapping):
            found |= {f"{section}.{name}": value for name, value in values.items()}
        else:
            found[section] = values
    return found


def _overrides(values: Mapping[str, object], origin: str) -> "list[Override]":
    from sftcli.config.fields import kinds
    from sftcli.config.layers import Override
    from sftcli.config.schema.settings import FIELDS

    found = []
    for key, given in values.items():
        value = str(given) if isinstance(given, Path) else given
        if isinstance(value, str) and key in FIELDS and tuple in kinds(FIELDS[key]):
            value = [value]
        elif isinstance(value, list | tuple):
            value = [str(one) if isinstance(one, Path) else one for one in value]
        found.append(Override(key=key, value=value, origin=origin))
    return found


def _require_one_process(processes: int) -> None:
    from sftcli.cli.session.processes import is_one_of_several

    if processes > 1 and not is_one_of_several():
        raise UsageError(
            f"training.processes is {processes}, and a call trains in its own process",
            hint=f"start the program with torchrun --nproc-per-node {processes}, or use sft train --processes {processes}",
        )


def _trained(outcome: "TrainOutcome") -> Trained:
    from sftcli.services.runs.event_log import read_events
    from sftcli.services.runs.folder import RunFolder
    from sftcli.services.runs.summary import RunHistory

    run = RunFolder(Path(outcome.path))
    history, rows = RunHistory(read_events(run)), run.rows()
    return Trained(
        run=run.path,
        final=None if outcome.final is None else Path(outcome.final),
        losses={step.step: step.loss for step in history.row_steps},
        heldout_losses={event.step: event.loss for event in history.heldout},
        audit={} if rows is None else rows.audit,
        outcome=outcome,
    )


@dataclass(slots=True)
class _Stop:
    """Set by a signal or by the caller, and never unset."""

    asked: Asked | None
    signals: SignalStop = field(default_factory=SignalStop)
    is_set: bool = False

    def requested(self) -> bool:
        self.is_set = self.is_set or self.signals.requested() or (self.asked is not None and self.asked())
        return self.is_set

    def save_requested(self) -> bool:
        return self.signals.save_requested()


@contextmanager
def _session(
    on_event: EventReceiver | None, stop: Asked | None, *, progress: bool, every_steps: int = 10
) -> Iterator[Session]:
    flag, view = _Stop(stop), _open_view(every_steps) if progress else None
    sinks: list[EventReceiver] = [sink for sink in (view, on_event) if sink is not None]
    told = (lambda: None) if view is None else view.show_stopping
    with _warnings_as_before(), stop_on_signals(flag.signals, told):
        if view is not None:
            view.open()
        try:
            with MemoryErrors():
                yield Session(fan_out(*sinks), flag)
        finally:
            if view is not None:
                view.close()


def _open_view(every_steps: int) -> "View":
    from rich.console import Console

    if Console().is_jupyter:
        from sftcli.cli.views.notebook import notebook_view

        return notebook_view()
    from sftcli.cli.options.shared import Output
    from sftcli.cli.session.session import open_view

    return open_view(Output(), every_steps=every_steps)


@contextmanager
def _warnings_as_before() -> Iterator[None]:
    """Give warnings back to the caller's program, which the services hand to ``logging`` while they work."""
    before = warnings.showwarning
    try:
        yield
    finally:
        if warnings.showwarning is not before:
            logging.captureWarnings(capture=False)
