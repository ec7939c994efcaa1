"""The README.md of an exported model: what was trained on what, how, and how well. It names no machine and no path."""

import re
from collections.abc import Iterator
from pathlib import Path

import tomli_w

from sftcli import __version__
from sftcli.config.resolve import DEFAULT_ORIGIN, Resolved
from sftcli.config.schema.settings import Settings
from sftcli.events import DataPrepared
from sftcli.figures import NOTHING
from sftcli.services.models.choose import ModelChoice
from sftcli.services.report.html import heldout_text, measures_of
from sftcli.services.report.measures import MEASURES
from sftcli.services.runs.event_log import read_events
from sftcli.services.runs.folder import RunFolder, resolve_run
from sftcli.services.runs.summary import RunHistory, read_scores

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_FILE_NAME = re.compile(
    r"\.(jsonl?|csv|tsv|parquet|arrow|txt|toml|jinja|gguf|pt)(\.gz)?([:@#].*)?$", re.IGNORECASE
)
_LICENSE = re.compile(r"---\n(?:(?!---\n).*\n)*?license:[ \t]*['\"]?(?P<name>[\w.+-]+)")
_NAMES = ("model.name", "model.tokenizer", "data.sources", "data.heldout_sources", "data.template")
_OF_TEXT = {"opener": "AutoModelForCausalLM", "pipeline": "text-generation"}
_OF_IMAGES = {"opener": "AutoModelForImageTextToText", "pipeline": "image-text-to-text"}
_CARD = """\
---
library_name: transformers
pipeline_tag: {pipeline}
tags:
- sft
- conversational
{head}---

# {name}

{story}
## Use

```python
from transformers import {opener}, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(FOLDER)
model = {opener}.from_pretrained(FOLDER)
messages = [{{"role": "user", "content": "your prompt"}}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=256)[0], skip_special_tokens=True))
```

The chat template and the stop tokens in this folder are those that it was trained with.
"""


def model_card(name: str, choice: ModelChoice, *, kind: str) -> str:
    """Return the card of ``choice`` under the name ``name``; ``kind`` is the class that its folder says it is of."""
    opened = _OF_IMAGES if kind.endswith("ForConditionalGeneration") else _OF_TEXT
    license_head = f"license: {found}\n" if (found := license_of(choice)) else ""
    if choice.run is None:
        story = f"A copy of {portable(choice.name)}, written by `sft export` {__version__}.\n"
        return _CARD.format(name=name, head=license_head, story=story, **opened)
    resolved = resolve_run(choice.run)
    base = portable(resolved.settings.model.name)
    head = f"base_model: {base}\n" if _HUB_NAME.fullmatch(base) else ""
    return _CARD.format(
        name=name, head=license_head + head, story="\n".join(_story(choice.run, resolved, base)), **opened
    )


def license_of(choice: ModelChoice) -> str:
    """Return the license that the card of a model, or of an adapter's base, names in its head; "" where none does."""
    for folder in (choice.folder, choice.weights_folder):
        card = folder / "README.md"
        if card.is_file() and (found := _LICENSE.match(card.read_text(encoding="utf-8", errors="replace"))):
            return found["name"]
    return ""


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
        yield "| | base | tuned | rows |\n|---|---|---|---|"
        for row in measures_of(evaluation):
            yield f"| {row.measure.label} | {row.base_text} | {row.tuned_text} | {row.rows or NOTHING} |"
        yield ""
        return
    history = RunHistory(read_events(run))
    if message := heldout_text(history, takes_best=settings.training.early_stopping_evals > 0):
        yield f"{MEASURES[0].label.capitalize()}: {message}.\n"


def _settings(resolved: Resolved) -> str:
    """Return the settings that differ from the defaults, as TOML; where a run is kept is left out."""
    defaults = Settings()
    tables: dict[str, dict[str, object]] = {}
    for row in resolved.rows():
        section, _, key = row.key.partition(".")
        if row.origin == DEFAULT_ORIGIN or section in {"run", "sampling"} or row.value is None:
            continue
        value = list(row.value) if isinstance(row.value, tuple) else row.value
        if row.value == getattr(getattr(defaults, section), key):
            continue
        if row.key in _NAMES:
            value = [portable(one) for one in value] if isinstance(value, list) else portable(str(value))
        tables.setdefault(section, {})[key] = value
    return tomli_w.dumps(tables)


def portable(name: str) -> str:
    """Return a name without local paths: of a path only its last part."""
    if name.startswith("preset:"):
        return name
    is_path = name.startswith((".", "~")) or Path(name).is_absolute() or _FILE_NAME.search(name)
    if not is_path and (_HUB_NAME.match(name) or "/" not in name) and not Path(name).exists():
        return name
    return Path(name).name
