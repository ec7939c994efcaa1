"""Runs cases in forked children: what they need is imported already, so that a case costs what its command does.

A child has 30 s and 2 GB of addresses beyond those that it starts with. What it leaves is judged by the parent.
"""

import atexit
import gc
import importlib
import os
import pkgutil
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from sftcli.storage import TEMPORARY, TRASH, scratch_label
from tests.fuzz.damage import damaged
from tests.fuzz.targets import Target

MEMORY = 2 << 30  # bytes of addresses beyond those of the parent
_NOT_MADE = 98  # exit code of a child that could not make its case
_OUT_OF_MEMORY = 71
_OUTPUT, _SCRATCH = ".output", ".tmp"  # in the folder of a case
_ASIDE = (
    "torch",
    "transformers.models.llama.modeling_llama",
    "peft",
    "pandas",
    "matplotlib.figure",
    "accelerate",
    "gguf",
)


@dataclass(frozen=True, slots=True)
class Case:
    """One damage to one target, by its seed; none where ``command`` names one that is to be tried on the whole sample.

    With ``is_good`` that command has to end with 0.
    """

    target: Target
    seed: int
    command: str | None = None
    is_good: bool = False

    def make(self, sample: Path, folder: Path) -> tuple[str, str]:
        """Copy ``sample`` to ``folder`` and damage it; return the name of the damage, and the command to run there."""
        shutil.copytree(sample, folder, symlinks=True)
        if self.command is not None:
            return "none", self.command
        random = Random(f"{self.target.name} {self.seed}")
        command = random.choice(self.target.commands)
        path = self.target.path(folder)
        name, content = damaged(path.read_bytes(), path.suffix, random)
        path.unlink()
        if content is not None:
            path.write_bytes(content)
        return name, command


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """How a case ended; ``fault`` is empty where that is how it may end."""

    case: Case
    code: int
    seconds: float
    fault: str
    damage: str = ""
    command: str = ""
    last_line: str = ""


@dataclass
class Runner:
    """Runs cases below ``root``, ``jobs`` at a time; those that fail are kept in ``kept``."""

    root: Path
    kept: Path
    jobs: int = 1
    seconds: float = 30.0  # that a case may take; more on a machine with other work
    samples: dict[Callable[[Path], object], Path] = field(default_factory=dict)

    def build(self, targets: Iterable[Target]) -> None:
        """Build the samples of ``targets``."""
        for target in targets:
            if target.make not in self.samples:
                folder = self.root / f"sample-{len(self.samples)}"
                folder.mkdir()
                self.samples[target.make] = folder

                def work(make: Callable[[Path], object] = target.make, folder: Path = folder) -> None:
                    _settle(folder)
                    make(folder)

                if _end(_fork(work, folder / _OUTPUT)):
                    raise SystemExit(f"the sample of {target.name} failed:\n{_text(folder / _OUTPUT)}")
                shutil.rmtree(folder / _SCRATCH)
            target.path(self.samples[target.make])  # is there

    def run(self, cases: Iterable[Case]) -> Iterator[Result]:
        """Run ``cases`` and yield their results as they end; who stops asking ends those that run."""
        running: dict[int, tuple[Case, Path, float]] = {}
        try:
            yield from self._run(cases, running)
        finally:
            for child in running:
                _kill(child)
                os.waitpid(child, 0)

    def _run(self, cases: Iterable[Case], running: dict[int, tuple[Case, Path, float]]) -> Iterator[Result]:
        ahead, number = iter(cases), 0
        while True:
            while len(running) < self.jobs and (case := next(ahead, None)):
                number += 1
                folder = self.root / f"case-{number}"
                output = folder.with_suffix(".txt")
                child = _fork(lambda case=case, folder=folder: self._child(case, folder), output)
                running[child] = (case, folder, time.monotonic())
            if not running:
                return
            for child in list(running):
                case, folder, start = running[child]
                done, status = os.waitpid(child, os.WNOHANG)
                is_late = not done and time.monotonic() - start > self.seconds
                if is_late:
                    _kill(child)
                    done, status = os.waitpid(child, 0)
                if done:
                    _kill(child)  # what it has started and left
                    del running[child]
                    code = os.waitstatus_to_exitcode(status)
                    yield self._judged(case, folder, code, time.monotonic() - start, is_late=is_late)
            time.sleep(0.002)

    def _child(self, case: Case, folder: Path) -> None:
        try:
            _, command = case.make(self.samples[case.target.make], folder)
            _settle(folder)
            _limit()
        except BaseException:  # noqa: BLE001 - told apart from what the program raises
            traceback.print_exc()
            os._exit(_NOT_MADE)
        run_sft(command)

    def _judged(self, case: Case, folder: Path, code: int, seconds: float, *, is_late: bool) -> Result:
        output = folder.with_suffix(".txt")
        text = _text(output)
        if code == _NOT_MADE:
            raise SystemExit(f"the case {case.seed} of {case.target.name} could not be made:\n{text}")
        fault = (
            f"over {self.seconds:.0f} s"
            if is_late
            else fault_of(code, text, folder, self.samples[case.target.make], is_good=case.is_good)
        )
        shutil.rmtree(folder, ignore_errors=True)
        if not fault:
            output.unlink()
            return Result(case=case, code=code, seconds=seconds, fault="")
        kept = self.kept / f"{case.target.name}-{case.seed}".replace("/", "_").replace(" ", "_")
        shutil.rmtree(kept, ignore_errors=True)
        damage, command = case.make(self.samples[case.target.make], kept)
        shutil.move(output, kept / "output.txt")
        (kept / "command.txt").write_text(
            f"sft {command}\n# damage: {damage}\n# {case.target.path(kept) if damage != 'missing' else case.target.file}\n"
        )
        last = next((line for line in reversed(text.splitlines()) if line.strip()), "")
        return Result(
            case=case,
            code=code,
            seconds=seconds,
            fault=fault,
            damage=damage,
            command=command,
            last_line=last[:300],
        )


def fault_of(code: int, text: str, folder: Path, sample: Path, *, is_good: bool = False) -> str:
    """Say what is wrong with how a command in ``folder``, a copy of ``sample``, has ended; nothing where it may end so."""
    if code < 0:
        return f"died of {signal.Signals(-code).name}"
    named = {1: "exit 1", _OUT_OF_MEMORY: "out of memory"}
    if code in named:
        return named[code]
    if "hit a bug" in text or "Traceback" in text:
        return "hit a bug"
    if "\x1b" in text:
        return "escape character"
    if left := sorted(_scratch(folder) - _scratch(sample)):
        return f"left {left[0]}"
    return f"exit {code} without damage" if is_good and code else ""


def _scratch(folder: Path) -> set[str]:
    found = (*folder.rglob(".sft-*"), *folder.glob(f"{_SCRATCH}/*"))
    return {path.relative_to(folder).as_posix() for path in found if _is_scratch(path)}


def _is_scratch(path: Path) -> bool:
    kinds = (TEMPORARY, TRASH)
    return path.parent.name == _SCRATCH or any(scratch_label(path.name, kind) is not None for kind in kinds)


def run_sft(command: str) -> None:
    """Run a command line of ``sft`` in this process, which ends with it."""
    import shlex

    from sftcli.cli.app import main

    sys.argv = ["sft", *shlex.split(command)]
    main()


def start_sft(command: str) -> int:
    """Start a command line of ``sft`` in a child, with the working directory of this process; return its number."""
    return _fork(lambda: run_sft(command), None)


def sft_in_child(command: str) -> None:
    """Run a command line of ``sft`` in a child, with the working directory of this process.

    Raises:
        SystemExit: It failed.
    """
    if code := _end(start_sft(command)):
        raise SystemExit(f"sft {command} ended with {code}")


def load() -> None:
    """Import all that commands use, with one thread, so that children need not."""
    os.environ |= {
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "NO_COLOR": "1",
        "COLUMNS": "100",
    }
    os.environ |= {
        "HF_DEACTIVATE_ASYNC_LOAD": "1"
    }  # a thread started in a child finds torch's pool broken by the fork
    for name in [name for name in os.environ if name.startswith("SFT_")]:
        del os.environ[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torch

        torch.set_num_threads(1)
        for name in _ASIDE:
            importlib.import_module(name)
        import sftcli

        for found in pkgutil.walk_packages(sftcli.__path__, "sftcli."):
            if not found.name.endswith("__main__"):
                with suppress(ModuleNotFoundError):  # of an extra
                    importlib.import_module(found.name)
        _make_tables()
    gc.collect()
    gc.freeze()  # so that children copy fewer pages


def _make_tables() -> None:
    """Make what libraries keep from their first call on."""
    import torch

    from sftcli.modeling.load import load_model
    from sftcli.services.report.html import page_template
    from tests.support.tiny_model import build_tiny_model

    page_template()
    with tempfile.TemporaryDirectory() as folder:
        load_model(build_tiny_model(Path(folder)), dtype=torch.float32, device=torch.device("cpu"))


def _settle(folder: Path) -> None:
    """Work in ``folder``, with its cache and scratch files."""
    (folder / _SCRATCH).mkdir(exist_ok=True)
    os.chdir(folder)
    os.environ |= {"SFT_CACHE_DIR": str(folder / "cache"), "TMPDIR": str(folder / _SCRATCH)}
    tempfile.tempdir = None


def _limit() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _fork(work: Callable[[], object], output: Path | None) -> int:
    """Run ``work`` in a child that leads a group of its own and writes to ``output``; return its number."""
    sys.stdout.flush()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside threads
        child = os.fork()
    if child:
        return child
    code = 1
    atexit._clear()  # what the parent has to do at its end is not the child's
    try:
        if output is not None:
            os.setsid()
            file = os.open(output, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o644)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.dup2(file, 1)
            os.dup2(file, 2)
        work()
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
        if not isinstance(error.code, int | None):
            sys.stderr.write(f"{error.code}\n")
    except BaseException:  # noqa: BLE001 - the child must not return
        traceback.print_exc()
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _end(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _kill(group: int) -> None:
    try:
        os.killpg(group, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        return


def _text(path: Path) -> str:
    return path.read_text("utf-8", "replace") if path.exists() else ""


@dataclass
class Tally:
    """What has come out, by target."""

    codes: dict[str, Counter[int]] = field(default_factory=dict)
    faults: list[Result] = field(default_factory=list)

    def add(self, result: Result) -> None:
        """Count ``result``."""
        self.codes.setdefault(result.case.target.name, Counter())[result.code] += 1
        if result.fault:
            self.faults.append(result)

    def table(self) -> str:
        """Return a line for each target: cases, faults, and how often each exit code came."""
        failed = Counter(result.case.target.name for result in self.faults)
        lines = [f"{'target':32} {'cases':>6} {'faults':>6}  exit codes"]
        for name, codes in sorted(self.codes.items()):
            counts = "  ".join(f"{code}: {count}" for code, count in sorted(codes.items()))
            lines.append(f"{name:32} {sum(codes.values()):6} {failed[name]:6}  {counts}")
        total = sum(sum(codes.values()) for codes in self.codes.values())
        return "\n".join([*lines, f"{'all':32} {total:6} {len(self.faults):6}"])
