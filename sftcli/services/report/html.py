"""One HTML page about a run, or several on one page: summary, settings, losses, scores, answers and data.

The page is one file. It loads nothing and follows the reader's light or dark setting. It runs no script but its own, which
filters the rows of a ledger and writes down what is decided about them. It is made from the run folder alone: no model is needed.
"""

import base64
import hashlib
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, FunctionLoader, StrictUndefined, Template
from markupsafe import Markup, escape

from sftcli import storage
from sftcli.config.presets import REFERENCE_PREFIX, preset_folder
from sftcli.config.resolve import DEFAULT_ORIGIN, Resolved
from sftcli.data.quality.audit import TITLES
from sftcli.data.quality.audit_summary import AuditSummary
from sftcli.events import EarlierDone, Judged, MemoryEased, Warned
from sftcli.figures import count, loss_figure, setting_text
from sftcli.services.diagnosis.judge import judge_run
from sftcli.services.report.answers import answers_by_step
from sftcli.services.report.checks import checks_of
from sftcli.services.report.comparison import facts_side_by_side, scores_side_by_side, settings_that_differ
from sftcli.services.report.confidence import COLUMNS
from sftcli.services.report.curves import charts_of
from sftcli.services.report.evaluation import Evaluation, read_scores
from sftcli.services.report.facts import main_settings, measured, started, summary_of
from sftcli.services.report.ledger import MOST_SHOWN, Ledger, read_ledger
from sftcli.services.report.measures import differences_of, has_base, measures_of
from sftcli.services.report.samples import samples_of
from sftcli.services.report.tried import tried_of
from sftcli.services.runs.earlier import kept_of
from sftcli.services.runs.event_log import read_events
from sftcli.services.runs.folder import RunFolder, resolve_run
from sftcli.services.runs.summary import RunHistory, can_be_scored
from sftcli.training.checkpoint.names import list_checkpoints

Fields = Mapping[str, object]

RENEWED_EVERY = 30  # seconds, of an open page about a run that goes on

# Where a path, a name or JSON without spaces may go on in the next line; never inside a number.
_BREAKS = re.compile(r"(?<=[/_=])(?=\w)|(?<=[.:])(?=[a-zA-Z])|(?<=[,:])(?=[^\s\d])")

_FLAGS = re.compile(r"(?<!\S)--?[a-z][\w-]*")  # a browser would begin a line behind a hyphen


@dataclass(frozen=True, slots=True, kw_only=True)
class _Read:
    """A run with what its files hold."""

    run: RunFolder
    history: RunHistory
    resolved: Resolved
    evaluation: Evaluation | None
    ledger: Ledger | None

    @classmethod
    def of(cls, run: RunFolder) -> "_Read":
        return cls(
            run=run,
            history=RunHistory(read_events(run)),
            resolved=resolve_run(run),
            evaluation=read_scores(run),
            ledger=read_ledger(run),
        )


def write_report(runs: Sequence[RunFolder], out: Path, *, goes_on: bool = False) -> Path:
    """Write the page about ``runs`` to ``out``, atomically; one that is open renews itself where the run ``goes_on``.

    Raises:
        OutputError: The place cannot be written.
        StorageError: Its disk is full.
    """
    found = [_Read.of(run) for run in runs]
    pages = [{"number": number, **_describe(one)} for number, one in enumerate(found)]
    script = _template("rows.js") if any(one.ledger and one.ledger.shown for one in found) else ""
    page = page_template().render(
        script=Markup(script),
        script_hash=_script_hash(script),
        runs=pages,
        together=_together(found, pages) if len(found) > 1 else None,
        charts=charts_of([(one.run.name, one.history) for one in found]),
        title=", ".join(run.name for run in runs),
        renewed_every=RENEWED_EVERY if goes_on else 0,
        now=f"{datetime.now(tz=UTC):%H:%M:%S} UTC",
    )
    with storage.writing(out, "choose another --out"):
        storage.replace_file(out, page.encode(), kind=storage.OUTPUT)
    return out


@cache
def page_template() -> Template:
    """Return the template of the page, compiled once in a process: that takes longer than to fill it."""
    environment = Environment(
        loader=FunctionLoader(_template),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"words": _words, "breaks": _breakable, "count": count, "loss": loss_figure}
    environment.filters["split_name"] = lambda split: TITLES.get(split, split)
    return environment.get_template("report.html.jinja")


def _template(name: str) -> str:
    return files("sftcli.services.report").joinpath("templates", name).read_text(encoding="utf-8")


def _script_hash(script: str) -> str:
    """Return what lets a browser run ``script`` and no other one."""
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _words(text: object) -> Markup:
    """Return ``text`` for a cell: flags stay whole, and files of presets are named as in settings."""
    named = str(text).replace(f"{preset_folder()}/", REFERENCE_PREFIX)
    return Markup(_FLAGS.sub(r'<span class="flag">\g<0></span>', str(_breakable(named))))


def _breakable(text: str) -> Markup:
    """Return ``text`` that may break at the parts of its long names."""
    return Markup("<wbr>").join(escape(part) for part in _BREAKS.split(text))


def _describe(one: _Read) -> dict[str, object]:
    """Return what the page says about one run."""
    run, history, evaluation = one.run, one.history, one.evaluation
    measures = measures_of(evaluation) if evaluation else []
    samples = samples_of(evaluation.samples, evaluation.misses) if evaluation else samples_of((), ())
    confidence = evaluation.confidence if evaluation else None
    rows = list(_settings(one))
    takes_best = one.resolved.settings.training.early_stopping_evals > 0
    return {
        "name": run.name,
        "argument": run.argument,
        "command": run.record().command,
        "started": started(run.record()),
        "summary": summary_of(history, one.resolved.settings, evaluation),
        "main": list(main_settings(one.resolved.settings, history)),
        "facts": [*measured(history, takes_best=takes_best), *_earlier_facts(run, history)],
        "verdict": judge_run(run, history),
        "audits": [(TITLES.get(split, split), audit) for split, audit in _audits(run).items() if audit.rows],
        "chosen": [row for row in rows if row[2] != DEFAULT_ORIGIN],
        "defaults": [row for row in rows if row[2] == DEFAULT_ORIGIN],
        "measures": measures,
        "has_base": has_base(measures),
        "differences": list(differences_of(*evaluation.differences)) if evaluation else [],
        "trained_on": str(evaluation.trained_on).capitalize() if evaluation and evaluation.trained_on else "",
        "checks": checks_of(evaluation.checks) if evaluation else [],
        "tried": tried_of(evaluation.tried) if evaluation else [],
        "confidence": confidence if confidence and confidence.choices else None,
        "confidence_columns": COLUMNS,
        "can_be_scored": can_be_scored(run),
        "samples": samples,
        "ledger": one.ledger,
        "most_rows_shown": MOST_SHOWN,
        "during": answers_by_step(history.heldout),
        "base": evaluation.base.model if evaluation and evaluation.base else "",
        "judgements": history.of(Judged),
        "warnings": [event.text for event in history.events if isinstance(event, Warned | MemoryEased)],
        "commands": list(_commands(run)),
    }


def _settings(one: _Read) -> Iterator[tuple[str, str, str]]:
    """Yield every setting, its value, and where it was set: by the start of the run, or by a later one."""
    first = one.run.first_origins()
    for row in one.resolved.rows():
        origin = row.origin if row.origin == RunFolder.ABOUT else first.get(row.key, row.origin)
        yield (
            row.key,
            setting_text(row.value),
            "changed on resume" if origin == RunFolder.ABOUT else origin,
        )


def _earlier_facts(run: RunFolder, history: RunHistory) -> list[tuple[str, str]]:
    """Return from which runs this one trained on, how many of their rows were replayed, what became of the others, and of fixes."""
    lineage = run.record().lineage or ()
    facts = [("trained on from", ", before that ".join(one.run for one in lineage))] if lineage else []
    replayed = _audits(run).get("replayed")
    if replayed is not None and replayed.sources:
        counts = [f"{counted.kept:,} rows {source}" for source, counted in replayed.sources.items()]
        facts.append(("replay", ", ".join(counts)))
    if (rows := run.rows()) is not None and rows.fixes is not None:
        facts.append(("fixes", rows.fixes.in_words()))
    return facts + [("earlier rows", kept.in_words()) for kept in kept_of(history.of(EarlierDone))]


def _commands(run: RunFolder) -> Iterator[tuple[str, str]]:
    """Yield what one may do next and the command for it, which runs as it is printed."""
    has_checkpoint = bool(list_checkpoints(run.checkpoints))
    if run.is_finished and can_be_scored(run):
        yield "score the model and its base on the held-out rows", f"sft eval {run.argument}"
    if has_checkpoint and not run.is_finished:
        yield "go on with the training", f"sft resume {run.argument}"
    if has_checkpoint or run.is_finished:
        yield "ask the model", f'sft generate "your prompt" --checkpoint {run.argument}'
    again = f"--config {shlex.quote(str(run.config))} --run {shlex.quote(f'{run.name}-again')}"
    yield "train once more with these settings", f"sft train {again}"


def _together(found: Sequence[_Read], pages: Sequence[Fields]) -> dict[str, object]:
    """Return what the page compares of several runs."""
    facts = [[*one["main"], *one["facts"]] for one in pages]  # type: ignore[misc]
    prints = {one.run.data_fingerprint() for one in found}
    scores = [measures_of(one.evaluation) if one.evaluation else [] for one in found]
    return {
        "facts": list(facts_side_by_side(facts)),
        "settings": list(settings_that_differ([one.resolved for one in found])),
        "scores": list(scores_side_by_side(scores)),
        "unscored": [one.run.argument for one in found if not one.evaluation and can_be_scored(one.run)],
        "has_same_rows": len(prints) == 1,
    }


def _audits(run: RunFolder) -> Mapping[str, AuditSummary]:
    rows = run.rows()
    return {} if rows is None else rows.audit
