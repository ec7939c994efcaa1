"""No command removes, renames, writes or touches a file that this program has not made, and printed commands run as printed."""

import os
import re
import shlex
import shutil
import socket
import time
from pathlib import Path

import pytest

from sftcli import storage
from tests.cli.conftest import flags, rows, sft, tiny_model  # noqa: F401 - fixtures
from tests.support.faulty_disk import CountingDisk

ODD_FILES = (
    ".tmp-precious", ".tmp-r.html", ".tmp-step-mine", ".tmp-config", ".trash-step-old", ".lock-mine", ".lock.txt", ".sft-notes",
    ".sft-0123456789abcdef", ".sft-tmp-0123456789abcdef", ".sft-0123456789ABCDEF-tmp", ".aside-mine", ".partial", "step-final",
    "step-00000001.bak", "thesis.tmp", "model.safetensors.part",
)  # fmt: skip
ODD_FOLDERS = (".trash-mine", ".tmp-folder", ".sft-cache", "step-mine", ".aside-final-draft")
PLACES = (".", "out", "runs", "runs/one", "runs/one/checkpoints", "cache", "cache/prepared", "cache/models")


def plant(place: Path) -> None:
    """Put files of somebody else into ``place``, 25 hours old."""
    place.mkdir(parents=True, exist_ok=True)
    for name in ODD_FILES:
        (place / name).write_text(name, encoding="utf-8")
    for name in ODD_FOLDERS:
        (place / name).mkdir()
        (place / name / "doc.txt").write_text(name, encoding="utf-8")
    old = time.time() - 25 * 3600
    for path in planted(place):
        os.utime(path, (old, old))


def planted(place: Path) -> list[Path]:
    folders = [place / name for name in ODD_FOLDERS]
    return [*(place / name for name in ODD_FILES), *(folder / "doc.txt" for folder in folders), *folders]


def seen(paths: list[Path]) -> dict[Path, tuple[int, ...]]:
    """Return what tells whether a file is what it was: any writing, renaming or touching of it gives it another ``ctime``."""
    stats = {path: path.lstat() for path in paths if path.exists()}
    return {path: (one.st_ino, one.st_size, one.st_mtime_ns, one.st_ctime_ns) for path, one in stats.items()}


class TracingDisk(CountingDisk):
    """Keeps the paths that operations write, rename, remove or touch."""

    def __init__(self) -> None:
        super().__init__()
        self.paths: set[Path] = set()

    def before(self, what: str, path: object) -> None:
        super().before(what, path)
        if what != "sync":
            self.paths.add(Path(os.path.normpath(Path(str(path)).absolute())))

    def rename(self, source: Path, target: Path) -> None:
        super().rename(source, target)
        self.paths.add(Path(os.path.normpath(target.absolute())))


def is_scratch(path: Path) -> bool:
    """Return whether a path is of something that we have made, and that has no name yet."""
    kinds = (storage.TEMPORARY, storage.TRASH, storage.OUTPUT)
    return any(storage.scratch_label(part, kind) is not None for part in path.parts for kind in kinds)


def strangers(paths: set[Path], place: Path, own: str) -> list[Path]:
    """Return the paths that are none of ``own`` below ``place``, a list of paths in words, nor scratch of ours."""
    owned = [place / name for name in own.split()]
    return [
        path for path in paths if not is_scratch(path) and not any(path.is_relative_to(one) for one in owned)
    ]


def test_no_command_removes_or_changes_files_of_others(sft, rows, flags, tiny_model, tmp_path, monkeypatch):  # noqa: F811
    short = ["--max-new-tokens", "2"]
    train = ["train", "--data", rows, *flags, "--run", "one", "--set", "checkpoint.every_steps=2"]
    assert sft(*train)[0] == 0
    for place in PLACES:
        plant(tmp_path / place)
    others = [path for place in PLACES for path in planted(tmp_path / place)]
    others += [rows, *tiny_model.iterdir()]
    before = seen(others)
    assert len(before) == len(others)
    eval_files = (
        "runs/one/eval.json runs/one/report.html runs/one/.lock-eval runs/one/.lock-eval-guard cache/prepared"
    )
    for own, command in [
        ("cache", ["prepare", rows, "--model", tiny_model]),
        ("cache out/prepared", ["prepare", rows, "--model", tiny_model, "--out", "out/prepared", "--set", "data.heldout_fraction=0.3"]),
        ("out/rows.jsonl cache", ["prepare", rows, "--model", tiny_model, "--out", "out/rows.jsonl"]),
        ("runs/one", [*train, "--resume", "auto"]),
        ("runs/one", ["resume", "one", "--checkpoint", "2"]),
        ("runs/one", ["resume", "one"]),
        ("runs/one", ["resume", "one", "--max-steps", "6"]),
        ("", ["resume", "one", "--verify"]),
        ("runs/two", ["train", "--data", rows, *flags, "--run", "two"]),
        ("cache", ["train", "--data", rows, *flags, "--plan"]),
        ("runs/all cache", ["train", "--data", rows, *flags, "--run", "all", "--compare", "rows=50%,100%", "--max-steps", "1"]),
        ("", ["generate", "a", "--checkpoint", "one", *short]),
        ("out/answers.jsonl out/.answers.jsonl.partial", ["generate", "--file", rows, "--out", "out/answers.jsonl", "--checkpoint", "one", *short]),
        (eval_files, ["eval", "one", "--max-rows", "3"]),
        ("out/tests.xml cache", ["eval", "one", "--data", rows, "--max-rows", "3", "--junit", "out/tests.xml"]),
        ("cache", ["try", rows, "--model", tiny_model, "--max-rows", "2"]),
        ("out/hf", ["export", "one", "--to", "hf", "--out", "out/hf"]),
        ("out/one.gguf", ["export", "one", "--to", "gguf", "--out", "out/one.gguf"]),
        ("out/ollama", ["export", "one", "--to", "ollama", "--out", "out/ollama"]),
        ("", ["push", "me/one", "one", "--dry-run"]),
        ("out/r.html", ["report", "one", "--out", "out/r.html"]),
        ("runs/one/report.html", ["report", "one"]),
        ("", ["diff", "one", "two"]),
        ("", ["runs"]),
        ("", ["show", "one"]),
        ("", ["presets"]),
        ("", ["env"]),
    ]:  # fmt: skip
        disk, there = TracingDisk(), seen(list(tmp_path.rglob("*")))
        with monkeypatch.context() as patch:
            patch.setattr(storage, "disk", disk)
            code, _, err = sft(*command)
        assert code == 0, (command, err)
        after = seen(others)
        assert {path for path in others if before[path] != after.get(path)} == set(), command
        assert strangers(disk.paths, tmp_path, own) == [], command
        now = seen(list(tmp_path.rglob("*")))
        changed = {
            path
            for path in there.keys() | now.keys()
            if there.get(path) != now.get(path) and not (path.is_dir() and path in there)
        }
        assert strangers(changed, tmp_path, own) == [], command
        assert [path for path in now if is_scratch(path) and path not in others] == [], command


def printed(text: str) -> list[list[str]]:
    """Return the commands in what was printed."""
    found = re.findall(
        r"\bsft (?:resume|eval|generate|train)\b(?: \"[^\"]*\"| '[^']*'| (?!or\b)[^\s,;]+)*", text
    )
    return [shlex.split(one)[1:] for one in found]


@pytest.mark.parametrize("root", ["a place/of runs", "runs"])
def test_printed_commands_run_as_printed(sft, rows, flags, tmp_path, root):  # noqa: F811
    here = [*flags[: flags.index("--set")], *flags[flags.index("--set") + 2 :], "--set", f"run.root={root}"]
    code, _, err = sft("train", "--data", rows, *here, "--run", "one")
    assert code == 0, err
    commands = printed(err.splitlines()[-1] + "\n" + sft("show", "one", "--runs", root)[2])
    assert [command[0] for command in commands] == ["generate", "eval", "eval"]
    shutil.rmtree(tmp_path / root / "one" / "final")  # as after a kill before the end
    taken = sft("train", "--data", rows, *here, "--run", "one")
    assert taken[0] == 73
    going_on = (
        printed(taken[2]) + printed(sft("show", "one", "--runs", root)[2]) + printed(sft("runs", root)[2])
    )
    assert [command[0] for command in going_on] == ["resume", "resume", "resume"]
    for command in going_on[:1] + commands:
        short = ["--max-new-tokens", "2"] if command[0] == "generate" else []
        code, _, err = sft(*command, *short)
        assert code == 0, (command, err)
    assert {tuple(command) for command in going_on} == {tuple(going_on[0])}


def test_what_is_no_file_stays_what_it_is(sft, rows, flags, tmp_path):  # noqa: F811
    assert sft("train", "--data", rows, *flags, "--run", "one")[0] == 0
    pipe, stdout = tmp_path / "pipe", tmp_path / "stdout"
    os.mkfifo(pipe)
    stdout.symlink_to("/proc/self/fd/1")
    before = seen([pipe, stdout])
    for words in (
        ["report", "one", "--out"],
        ["eval", "one", "--max-rows", "2", "--junit"],
        ["export", "one", "--to", "gguf", "--out"],
        ["prepare", rows, "--model", "model", "--out"],
        ["generate", "--file", rows, "--checkpoint", "one", "--max-new-tokens", "2", "--out"],
    ):
        for place in (pipe, stdout, "/dev/null"):
            code, _, err = sft(*words, place)
            assert code == 73, (words, place, err)
            assert str(place) in err
            assert seen([pipe, stdout]) == before, words
    assert Path(os.devnull).is_char_device()


@pytest.mark.parametrize("make", ["mkfifo", "socket", "link"])
def test_no_rename_takes_the_place_of_what_is_no_file(make: str, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the name of a socket is short
    source, target = Path("source"), Path("target")
    source.write_bytes(b"new")
    if make == "mkfifo":
        os.mkfifo(target)
    elif make == "link":
        target.symlink_to("/dev/null")
    else:
        with socket.socket(socket.AF_UNIX) as one:
            one.bind(str(target))
    kind = target.lstat().st_mode
    with pytest.raises(OSError, match="and no file"):
        storage.disk.rename(source, target)
    assert (target.lstat().st_mode, source.read_bytes()) == (kind, b"new")
