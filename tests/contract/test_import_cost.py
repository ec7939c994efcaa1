"""What a person waits for on every start: no heavy module is imported before a command does its work."""

import json
import subprocess
import sys

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
    import os

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
