"""No command removes, renames, writes or touches a file that this program has not made, and printed commands run as printed."""

import os
import re
import shlex
import shutil
import time
from pathlib import Path

import pytest

from tests.cli.conftest import flags, rows, sft, tiny_model  # noqa: F401 - fixtures

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


def test_no_command_removes_or_changes_files_of_others(sft, rows, flags, tiny_model, tmp_path):  # noqa: F811
    short = ["--max-new-tokens", "2"]
    train = ["train", "--data", rows, *flags, "--run", "one", "--set", "checkpoint.every_steps=2"]
    assert sft(*train)[0] == 0
    for place in PLACES:
        plant(tmp_path / place)
    others = [path for place in PLACES for path in planted(tmp_path / place)]
    others += [rows, *tiny_model.iterdir()]
    before = seen(others)
    assert len(before) == len(others)
    commands = [
        ["prepare", rows, "--model", tiny_model],
        ["prepare", rows, "--model", tiny_model, "--out", "out/prepared", "--set", "data.heldout_fraction=0.3"],
        [*train, "--resume", "auto"],
        ["resume", "one", "--checkpoint", "2"],
        ["resume", "one"],
        ["resume", "one", "--verify"],
        ["train", "--data", rows, *flags, "--run", "two"],
        ["train", "--data", rows, *flags, "--plan"],
        ["generate", "a", "--checkpoint", "one", *short],
        ["generate", "--file", rows, "--out", "out/answers.jsonl", "--checkpoint", "one", *short],
        ["eval", "one", "--max-rows", "3"],
        ["export", "one", "--to", "hf", "--out", "out/hf"],
        ["export", "one", "--to", "gguf", "--out", "out/one.gguf"],
        ["report", "one", "--out", "out/r.html"],
        ["report", "one"],
        ["runs"],
        ["show", "one"],
        ["presets"],
        ["env"],
    ]  # fmt: skip
    for command in commands:
        code, _, err = sft(*command)
        assert code == 0, (command, err)
        after = seen(others)
        assert {path for path in others if before[path] != after.get(path)} == set(), command


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
