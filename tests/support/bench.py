"""A machine in a folder, and commands on its disk: what each makes, and what has to hold once it had announced something."""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from sftcli import storage
from sftcli.data.prepared.store import open_prepared
from sftcli.services.runs.event_log import read_lines
from sftcli.services.runs.folder import RunFolder
from sftcli.training.checkpoint import background_saver
from sftcli.training.checkpoint.format import newest_good, verify
from sftcli.training.checkpoint.names import list_checkpoints, list_set_aside, step_of
from tests.support.commands import Said, import_all, run_command
from tests.support.faulty_disk import TellingDisk
from tests.support.runs import numbers_in, tensors_of
from tests.support.tiny_model import build_tiny_model

STEPS = 4
EVENTS = ("--log-format", "jsonl")
TRAIN = (
    "train", "--data", "rows.jsonl", "--model", "model", "--max-steps", str(STEPS), *EVENTS,
    "--set", "training.batch_size=4", "--set", "training.learning_rate=1e-2", "--set", "data.heldout_fraction=0.3",
    "--set", "checkpoint.every_steps=1", "--set", "training.eval_every_steps=2", "--set", "training.precision=fp32",
    "--set", "checkpoint.in_background=false",
)  # fmt: skip
ASIDE = ("--set", "checkpoint.in_background=true")
ANSWER = (
    "generate", "--file", "few.jsonl", "--checkpoint", "one", "--max-new-tokens", "3", "--out", "out.jsonl",
    "--min-confidence", "0.02", "--rest", "rest.jsonl",
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A command, what it makes, how often it is chosen, and what follows from what it had announced."""

    name: str
    arguments: tuple[str, ...]
    makes: tuple[str, ...]
    weight: int
    check: "Callable[[Path, Case, str], None]"
    run: str = ""  # that it trains


def events_in(text: str, kind: str) -> list[Mapping[str, object]]:
    """Return the events of one kind that reached the user; the cut may have torn the last line."""
    found = []
    for line in text.splitlines():
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict) and event.get("event") == kind:
            found.append(event)
    return found


def check_run(place: Path, case: Case, text: str) -> None:
    """See that the run is there, its newest announced checkpoint or a newer one, and its final model."""
    run = RunFolder(place / "runs" / case.run)
    if events_in(text, "RunStarted"):
        run.record()
    saved = [int(str(event["step"])) for event in events_in(text, "CheckpointSaved")]
    if saved:
        newest = newest_good(run.checkpoints, warn=lambda text: None)
        found = -1 if newest is None else step_of(newest)
        assert found >= max(saved), f"step {max(saved)} was announced, the newest is {found}"
    if events_in(text, "ModelSaved"):
        assert run.is_finished
        assert (run.final / "model.safetensors").is_file()


def check_taken_back(place: Path, case: Case, text: str) -> None:
    """See that no checkpoint of before is lost until a newer one than the run was taken back to was announced."""
    check_run(place, case, text)
    run = RunFolder(place / "runs" / case.run)
    whole = set()
    for path in [*list_checkpoints(run.checkpoints), *list_set_aside(run.checkpoints)]:
        verify(path)
        whole.add(step_of(path))
    if not events_in(text, "CheckpointSaved"):
        assert whole >= {1, 2, 3, 4} or max(step_of(path) for path in list_checkpoints(run.checkpoints)) > 2


def check_output(place: Path, case: Case, text: str) -> None:
    """See that what was named as made is there."""
    if set(case.makes[:1]) & set(text.splitlines()[-1:]):
        assert all((place / one).exists() for one in case.makes)


def check_store(place: Path, case: Case, text: str) -> None:
    """See that each store of prepared rows opens, and that there is one once it was announced."""
    check_output(place, case, text)
    stores = place / "cache" / "prepared"
    found = [path for path in stores.iterdir() if not path.name.startswith(".")] if stores.is_dir() else []
    for path in found:
        open_prepared(path)
    if "rows" in text:
        assert found


CASES = (
    Case("train", (*TRAIN, "--run", "new", "--resume", "auto"), ("runs/new",), 6, check_run, "new"),
    Case("train, saves in the background", (*TRAIN, "--run", "new", "--resume", "auto", *ASIDE), ("runs/new",), 3, check_run, "new"),
    Case("resume", ("resume", "half", *EVENTS), ("runs/half",), 4, check_run, "half"),
    Case("resume --checkpoint", ("resume", "one", "--checkpoint", "2", *EVENTS), ("runs/one",), 5, check_taken_back, "one"),
    Case("generate", ANSWER, ("out.jsonl", "rest.jsonl"), 3, check_output),
    Case("prepare", ("prepare", "rows.jsonl", "--model", "model"), (), 3, check_store),
    Case("prepare to Parquet", ("prepare", "rows.jsonl", "--model", "model", "--out", "new/out"), ("new/out",), 2, check_store),
    Case("prepare to messages", ("prepare", "rows.jsonl", "--model", "model", "--out", "out.jsonl"), ("out.jsonl",), 2, check_store),
    Case("export to hf", ("export", "one", "--to", "hf", "--out", "out"), ("out",), 2, check_output),
    Case("export to gguf", ("export", "one", "--to", "gguf", "--out", "out.gguf"), ("out.gguf",), 1, check_output),
    Case("export to ollama", ("export", "one", "--to", "ollama", "--out", "out"), ("out",), 2, check_output),
    Case("eval", ("eval", "one", "--max-rows", "2"), ("runs/one/eval.json", "runs/one/report.html"), 1, check_output),
    Case("report", ("report", "one", "--out", "out.html"), ("out.html",), 1, check_output),
)  # fmt: skip


@dataclass
class Bench:
    """A machine in ``root``: what is on its disk before each command is in ``origin``."""

    root: Path
    logs: dict[str, list[str]] = field(default_factory=dict)  # the operations of each command
    golden: dict[str, dict[str, object]] = field(default_factory=dict)

    @property
    def origin(self) -> Path:
        return self.root / "origin"

    @property
    def place(self) -> Path:
        return self.root / "place"

    def set_up(self) -> None:
        """Train a run to its end, and one that lacks its last two steps."""
        import_all()
        self.place.mkdir(parents=True)
        build_tiny_model(self.place / "model", dropout=0.1)
        rows = [{"question": f"What is {n} plus {n}?", "answer": f"It is {2 * n}."} for n in range(24)]
        for name, count in (("rows", 24), ("few", 4)):
            lines = [json.dumps(row) + "\n" for row in rows[:count]]
            (self.place / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        keep = ("--set", "checkpoint.keep_last=9")
        for name in ("one", "half"):
            done = self.run((*TRAIN, "--run", name, *keep))
            assert done.code == 0, done.text
        half = self.place / "runs" / "half"
        for late in (half / "final", *sorted((half / "checkpoints").iterdir())[-2:]):
            shutil.rmtree(late)
        self.place.rename(self.origin)

    def fresh(self, case: Case) -> None:
        """Put the disk back to what it was; rows are prepared anew where that is what is done."""
        shutil.rmtree(self.place, ignore_errors=True)
        shutil.copytree(self.origin, self.place)
        if case.check is check_store:
            shutil.rmtree(self.place / "cache")

    def run(self, arguments: tuple[str, ...], disk: Callable[[], object] = lambda: None) -> Said:
        """Run ``sft`` on the disk that ``disk`` makes."""

        def install() -> None:
            os.environ |= {
                "SFT_CACHE_DIR": str(self.place / "cache"),
                "XDG_STATE_HOME": str(self.root / "state"),
            }
            os.chdir(self.place)
            background_saver.step_aside = lambda: None  # beside other programs it would wait for minutes
            storage.disk = disk() or storage.disk

        return run_command(arguments, self.root / "said.txt", install)

    def measure(self, case: Case) -> None:
        """Run it undisturbed."""
        log = self.root / "operations.txt"
        log.unlink(missing_ok=True)
        self.fresh(case)
        done = self.run(case.arguments, lambda: TellingDisk(log))
        assert done.code == 0, done.text
        self.logs[case.name] = log.read_text(encoding="utf-8").splitlines()
        self.golden[case.name] = self.result(case)

    def result(self, case: Case) -> dict[str, object]:
        """Return what a command has left, without what a clock decides."""
        if case.run:
            run = self.place / "runs" / case.run
            # Behind the last step of a finished run a line may be torn: whoever reads the log leaves it out.
            log = [event for _, event in read_lines(run / "events.jsonl").found]
            final = (run / "final" / "model.safetensors").read_bytes()
            return {"state": tensors_of(run, STEPS), "log": numbers_in(log), "final": final}
        files = [path for one in case.makes for path in (self.place / one, *(self.place / one).rglob("*"))]
        found: dict[str, object] = {}
        for path in files:
            if path.is_file():
                found[path.relative_to(self.place).as_posix()] = timeless(path)
        return found

    def differences(self, case: Case) -> str:
        """Return which results are others than those of the undisturbed command."""
        found, golden = self.result(case), self.golden[case.name]
        return ", ".join(f"{name} differs" for name in golden if found.get(name) != golden[name])


def timeless(path: Path) -> object:
    """Return the content of a file without durations."""
    if path.name == "eval.json":
        found = json.loads(path.read_text(encoding="utf-8"))
        return {key: found[key] for key in ("rows", "answers", "samples", "confidence")}
    if path.suffix == ".html":
        return path.read_text(encoding="utf-8").rstrip().endswith("</html>")
    return path.read_bytes()
