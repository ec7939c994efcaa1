"""What a person waits for on every start: no heavy module is imported before a command does its work."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = {"torch", "transformers", "tokenizers", "datasets", "numpy", "pyarrow", "jinja2", "huggingface_hub"}
PROGRAM = """
import json, sys
sys.argv = ["sft", *sys.argv[1:]]
from sftcli.__main__ import main
try:
    main()
except SystemExit as end:
    code = end.code
json.dump({"code": code, "modules": sorted({name.partition(".")[0] for name in sys.modules})}, open(3, "w"))
"""


def start(*arguments: str) -> tuple[int, set[str]]:
    """Run ``sft`` in a new interpreter; return its exit code and the modules it has loaded."""

    reader, writer = os.pipe()
    script = f"import os; os.dup2({writer}, 3)\n" + PROGRAM
    subprocess.run(
        [sys.executable, "-c", script, *arguments],
        pass_fds=[writer],
        check=True,
        capture_output=True,
        timeout=60,
    )
    os.close(writer)
    with os.fdopen(reader) as file:
        seen = json.load(file)
    return seen["code"], set(seen["modules"])


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        ["train", "--help"],
        ["generate", "--help"],
        ["try", "--help"],
        ["presets"],
        ["presets", "gpu"],
        ["train", "--print-config", "--preset", "gpu", "--max-steps", "3"],
        ["trian"],
        ["train", "--preset", "qick"],
    ],
)
def test_start_loads_nothing_heavy(arguments: list[str]):
    code, modules = start(*arguments)
    assert not modules & HEAVY
    assert code == (2 if "trian" in arguments or "qick" in arguments else 0)


GATE = """
import os, sys
class Gate:
    def find_spec(self, name, path=None, target=None):
        if name in ("torch", "transformers"):
            sys.stderr.flush()
            os._exit(99)
sys.meta_path.insert(0, Gate())
sys.argv = ["sft", *sys.argv[1:]]
from sftcli.__main__ import main
main()
"""


@pytest.mark.parametrize(
    "arguments",
    [["try"], ["train"], ["train", "--plan"], ["resume", "one"], ["generate", "a prompt"], ["eval"], ["export", "--to", "hf", "--out", "x"]],
    ids=" ".join,
)  # fmt: skip
def test_a_line_says_what_is_slow_before_it_begins(arguments: list[str], tmp_path: Path):
    """The process ends where it asks for torch: what a person has read by then is all there is."""
    run = tmp_path / "runs" / "one"
    (run / "final").mkdir(parents=True)
    for name in ("run.json", "config.toml", "final/config.json"):
        text = "{}" if name.endswith("json") else "[training]\nseed = 1\n"
        (run / name).write_text(text, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-c", GATE, *arguments],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 99, done.stderr
    assert done.stderr == "loading torch and transformers\n"


@pytest.mark.parametrize("statement", ["import sftcli", "from sftcli import generate, prepare, train"])
def test_importing_the_calls_loads_nothing_heavy(statement: str):
    listing = f"{statement}\nimport sys\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run(
        [sys.executable, "-c", listing], capture_output=True, text=True, check=True, timeout=60
    )
    modules = set(done.stdout.split())
    assert "sftcli" in modules
    assert not modules & (HEAVY | {"rich", "pydantic", "typer"})
