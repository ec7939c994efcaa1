"""Whole comparisons of the service on the tiny model, in this process."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from sftcli.config.layers import Override
from sftcli.config.resolve import Resolved, parse_set, resolve
from sftcli.events import Session
from sftcli.services.compare.run import run_comparison
from sftcli.services.compare.start import CompareRequest, Comparison, check_comparison, find_comparison
from sftcli.services.compare.summary import CompareReport
from tests.support.runs import StopAtStep

NEVER = 10_000


def comparison_of(asked: str, *changes: str, seeds: int = 1) -> Comparison:
    """Runs of six steps of 4 on ``rows.jsonl`` in the working directory, of which a fifth is held out.

    A change ``-KEY`` leaves a key to its default.
    """
    sets = (
        "data.sources=rows.jsonl", "model.name=model", "training.max_steps=6", "training.batch_size=4",
        "training.learning_rate=1e-2", "data.heldout_fraction=0.2", "run.name=all", "checkpoint.every_steps=2",
        "checkpoint.in_background=false", "training.precision=fp32", *changes,
    )  # fmt: skip

    def made(more: Sequence[Override]) -> Resolved:
        left = {change[1:] for change in changes if change.startswith("-")}
        asked_for = [one for one in sets if not one.startswith("-")]
        overrides = tuple(one for one in map(parse_set, asked_for) if one.key not in left)
        return resolve(preset=None, config_file=None, overrides=overrides, environ={}, last=more)

    return find_comparison(CompareRequest(asked=asked, seeds=seeds, resolve=made))


def compare(
    asked: str, *changes: str, seeds: int = 1, auto: bool = False, flag: StopAtStep | None = None
) -> CompareReport:
    """Train and score all that is asked for."""
    flag = flag or StopAtStep(NEVER)
    comparison = comparison_of(asked, *changes, seeds=seeds)
    check_comparison(comparison, auto=auto, plans=False)
    return run_comparison(comparison, Session(flag, flag), command="sft train --compare")


def table_of(report: CompareReport) -> dict[str, object]:
    """Return what a comparison has found, without what a clock decides and where it is kept."""
    found = asdict(report)
    folder = found.pop("folder")
    for value in found["values"]:
        del value["seconds"]
        value["runs"] = [Path(run).relative_to(folder).as_posix() for run in value["runs"]]
    return found
