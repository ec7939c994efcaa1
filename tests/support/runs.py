"""Whole runs of the service on the tiny model, in this process."""

import hashlib
import json
import shutil
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from sftcli.config.resolve import Resolved, parse_set, resolve
from sftcli.events import Event, Session, StepDone
from sftcli.services.train.lead import TrainRequest, run_training
from sftcli.services.train.run import TrainOutcome

CLOCKS = {"time", "seconds", "answer_seconds", "peak_memory_bytes", "peak_flops", "utilization"}


def copied_here(origin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a copy of ``origin``, which is the working directory now and has a cache of its own."""
    copy = Path(shutil.copytree(origin, tmp_path / "copy"))
    monkeypatch.chdir(copy)
    monkeypatch.setenv("SFT_CACHE_DIR", str(copy / "cache"))
    return copy


@dataclass
class StopAtStep:
    """A stop flag that is raised when step ``step`` is done, and the sink that watches for it."""

    step: int
    is_raised: bool = False
    events: list[Event] = field(default_factory=list)

    def __call__(self, event: Event, /) -> None:
        self.events.append(event)
        self.is_raised |= isinstance(event, StepDone) and event.step >= self.step

    def requested(self) -> bool:
        return self.is_raised or self.step == 0

    def save_requested(self) -> bool:
        return False


def write_rows(path: Path, count: int = 25) -> Path:
    lines = [
        json.dumps({"question": f"What is {n} plus {n}?", "answer": f"It is {2 * n}."}) for n in range(count)
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def settings_of(folder: Path, model: Path, *changes: str) -> Resolved:
    """Two epochs of 20 rows in steps of 4: ten steps, shuffled."""
    rows = folder / "rows.jsonl"
    sets = (
        f"run.root={folder / 'runs'}", f"model.name={model}", "training.epochs=2", "training.batch_size=4",
        "training.micro_batch_size=3", "training.learning_rate=1e-2", "training.eval_every_steps=4",
        "data.heldout_fraction=0.2", "checkpoint.every_steps=3", "training.eval_answers=0", *changes,
    )  # fmt: skip
    data = parse_set(f"data.sources={rows}")
    return resolve(preset=None, config_file=None, overrides=(data, *map(parse_set, sets)), environ={})


def train(resolved: Resolved, flag, *, auto: bool = False) -> TrainOutcome:
    return run_training(
        TrainRequest(resolved=resolved, label="run", command="sft train", auto=auto), Session(flag, flag)
    )


def events_of(run: Path, kind: str | None = None) -> list[dict]:
    """Return the events in the log of a run, those of one kind where it is named."""
    events = [json.loads(line) for line in (run / "events.jsonl").read_text(encoding="utf-8").splitlines()]
    return [event for event in events if kind in (None, event["event"])]


def numbers_of(run: Path) -> list[dict[str, object]]:
    """Return the events of steps and of held-out losses, those of earlier runs too, without what a clock or the machine decides."""
    return numbers_in(events_of(run))


def numbers_in(events: Iterable[Mapping[str, object]]) -> list[dict[str, object]]:
    """Return the same of events that were read already."""
    kept = [event for event in events if event["event"] in {"StepDone", "HeldoutDone", "EarlierDone"}]
    return [{key: value for key, value in event.items() if key not in CLOCKS} for event in kept]


def left_by(run: Path, step: int, logged: Collection[str]) -> tuple[dict[str, str], list[dict[str, object]]]:
    """Return hashes of the tensors that a finished run has left, of its last ``step`` too, and its ``logged`` events without times."""
    last = run / "checkpoints" / f"step-{step:08d}"
    files = [*sorted(last.glob("*.safetensors")), *sorted((run / "final").glob("*.safetensors"))]
    hashes = {str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    kept = [event for event in events_of(run) if event["event"] in logged]
    return hashes, [{key: value for key, value in event.items() if key not in CLOCKS} for event in kept]


def tensors_of(run: Path, step: int) -> dict[str, bytes]:
    """Return the bytes of weights, optimizer and random state of a checkpoint."""
    folder = run / "checkpoints" / f"step-{step:08d}"
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}
