"""The README.md of an exported model: what was trained on what, how, and how well. It names no machine and no path."""

import re
from collections.abc import Iterator
from pathlib import Path

import tomli_w

from sftcli.config.auto import value_of
from sftcli.config.resolve import DEFAULT_ORIGIN, Resolved
from sftcli.config.schema.settings import Settings
from sftcli.config.toml_file import tables_of
from sftcli.events import DataPrepared
from sftcli.figures import NOTHING
from sftcli.input_files import read_whole
from sftcli.modeling.locate.default_model import ALIAS, HUB_NAME, LICENSE
from sftcli.modeling.locate.locate import known_folder
from sftcli.paths import as_path
from sftcli.services.models.choose import ModelChoice, recorded_base
from sftcli.services.report.checks import checks_of
from sftcli.services.report.evaluation import read_scores
from sftcli.services.report.facts import heldout_text
from sftcli.services.report.measures import MEASURES, has_base, measures_of
from sftcli.services.report.usage import Usage
from sftcli.services.runs.event_log import read_events
from sftcli.services.runs.folder import RunFolder, resolve_run
from sftcli.services.runs.summary import RunHistory
from sftcli.version import __version__

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_FILE_NAME = re.compile(
    r"\.(jsonl?|csv|tsv|parquet|arrow|txt|toml|jinja|gguf|pt)(\.gz)?([:@#].*)?$", re.IGNORECASE
)
_HEAD = re.compile(r"---\n(?:(?!---\n).*\n)*")
_LICENSE = re.compile(r"^(license|license_name|license_link):[ \t]*['\"]?([\w.+:/-]+)", re.MULTILINE)
_NAMES = ("model.name", "model.tokenizer", "data.sources", "data.heldout_sources", "data.template")
_CARD = """\
---
{head}tags:
{tags}---

# {name}

{story}
## Use

{use}"""


def model_card(name: str, choice: ModelChoice, usage: Usage) -> str:
    """Return the card of ``choice`` under the name ``name``."""
    hub_base = base_of(choice)
    told = {
        "library_name": usage.library,
        "pipeline_tag": usage.pipeline,
        **_license_keys(choice),
        "base_model": hub_base,
    }
    if choice.run is None:
        story = f"A copy of {portable(choice.name)}, written by `sft export` {__version__}.\n"
    else:
        resolved = resolve_run(choice.run)
        base = hub_base or portable(resolved.settings.model.name)
        story = "\n".join(_story(choice.run, resolved, base))
    return _CARD.format(
        head="".join(f"{key}: {value}\n" for key, value in told.items() if value),
        tags="".join(f"- {tag}\n" for tag in ("sft", "conversational", *usage.tags)),
        name=name,
        story=story,
        use=usage.text,
    )


def base_of(choice: ModelChoice) -> str:
    """Return the hub name of the model that ``choice`` was tuned from; "" where it has none."""
    name = recorded_base(choice)[0]
    if name == ALIAS:
        return HUB_NAME
    base = portable(name)
    return base if _HUB_NAME.fullmatch(base) else ""


def license_of(choice: ModelChoice) -> str:
    """Return the license that the card of a model, or of its base, names in its head; "" where none does."""
    return _license_keys(choice).get("license", "")


def _license_keys(choice: ModelChoice) -> dict[str, str]:
    """Return what the head of the first card that names a license says about it: its own, or that of its base."""
    name, revision = recorded_base(choice)
    base = known_folder(name, revision)
    for folder in (choice.folder, choice.weights_folder, *([] if base is None else [base])):
        card = folder / "README.md"
        if card.is_file() and (
            head := _HEAD.match(read_whole(card).decode("utf-8", "replace").replace("\r\n", "\n"))
        ):
            found = dict(_LICENSE.findall(head[0]))
            if "license" in found:
                return found
    return {"license": LICENSE} if ALIAS in (name, choice.name) else {}


def _story(run: RunFolder, resolved: Resolved, base: str) -> Iterator[str]:
    yield f"{base}, fine-tuned on instruction data with `sft` {__version__}.\n"
    yield "## Data\n"
    yield from _data(run, resolved.settings)
    if scores := list(_scores(run, resolved.settings)):
        yield "## Scores\n"
        yield from scores
    yield "## Settings\n\nAll others are the defaults of `sft`.\n"
    yield f"```toml\n{_settings(resolved)}```\n"


def _data(run: RunFolder, settings: Settings) -> Iterator[str]:
    for source in settings.data.sources:
        yield f"- {portable(source)}"
    for source in settings.data.heldout_sources:
        yield f"- {portable(source)}, held out"
    if prepared := RunHistory(read_events(run)).last(DataPrepared):
        yield (
            f"\n{prepared.train_examples} rows were trained on, with {prepared.response_tokens} response tokens; "
            f"{prepared.heldout_examples} rows were held out.\n"
        )
    else:
        yield ""


def _scores(run: RunFolder, settings: Settings) -> Iterator[str]:
    """Yield the scores of ``sft eval`` where it has run, else the held-out loss that training measured."""
    if evaluation := read_scores(run):
        yield "On held-out rows; the last column is the number of rows that each number is of:\n"
        measures = measures_of(evaluation)
        with_base = has_base(measures)
        yield (
            "| | base | tuned | rows |\n|---|---|---|---|"
            if with_base
            else "| | tuned | rows |\n|---|---|---|"
        )
        for row in measures:
            base = f" {row.base_text} |" if with_base else ""
            yield f"| {row.measure.label} |{base} {row.tuned_text} | {row.rows or NOTHING} |"
        yield ""
        for check in checks_of(evaluation.checks):
            yield f"Check `{check.title}`: {check.line}.\n"
        if evaluation.confidence and evaluation.confidence.choices:
            yield f"{evaluation.confidence.sentence}.\n"
        return
    history = RunHistory(read_events(run))
    if message := heldout_text(history, takes_best=settings.training.early_stopping_evals > 0):
        yield f"{MEASURES[0].label.capitalize()}: {message}.\n"


def _settings(resolved: Resolved) -> str:
    """Return the settings that differ from the defaults, as TOML; where a run is kept is left out."""
    defaults = Settings()
    found: dict[str, object] = {}
    for row in resolved.rows():
        if row.origin == DEFAULT_ORIGIN or row.value is None or row.key.startswith(("run.", "sampling.")):
            continue
        value = list(row.value) if isinstance(row.value, tuple) else row.value
        if row.value == value_of(defaults, row.key):
            continue
        if row.key in _NAMES:
            value = [portable(one) for one in value] if isinstance(value, list) else portable(str(value))
        found[row.key] = value
    return tomli_w.dumps(tables_of(found))


def portable(name: str) -> str:
    """Return a name without local paths: of a path only its last part."""
    if name.startswith("preset:"):
        return name
    is_path = name.startswith((".", "~")) or Path(name).is_absolute() or _FILE_NAME.search(name)
    if not is_path and (_HUB_NAME.match(name) or "/" not in name) and not as_path(name).exists():
        return name
    return Path(name).name
