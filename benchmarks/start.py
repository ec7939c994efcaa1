"""How long a person waits at the prompt: from the start of ``sft`` to its first line, and to the offers of the Tab key.

    python benchmarks/start.py

Run it in a folder that holds a few runs under runs/. The best of five starts counts: others measure the machine's mood.
"""

import os
import subprocess
import sys
import tempfile
import time

ROUNDS = 5
PROGRAM = [sys.executable, "-m", "sftcli"]
LINES = [
    "sft train --preset ",
    "sft show ",
    "sft generate --checkpoint runs/",
    "sft prepare ",
    "sft train --set tr",
]


def first_line_seconds() -> float:
    """Start a training and return when its first line was there; the training is ended before it begins."""
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        process = subprocess.Popen(
            [*PROGRAM, "train", "--set", f"run.root={folder}"], stderr=subprocess.PIPE, text=True
        )
        assert process.stderr is not None
        process.stderr.readline()
        seconds = time.perf_counter() - began
        process.kill()
        process.communicate()
    return seconds


def tab_seconds(line: str) -> float:
    """Return how long the shell waits for what can stand at the end of ``line``."""
    asked = {
        "_SFT_COMPLETE": "complete_bash",
        "COMP_WORDS": line,
        "COMP_CWORD": str(len(line.split(" ")) - 1),
    }
    began = time.perf_counter()
    subprocess.run(PROGRAM, env=os.environ | asked, capture_output=True, check=True)
    return time.perf_counter() - began


def command_seconds(*arguments: str) -> float:
    """Return how long a whole command takes."""
    began = time.perf_counter()
    subprocess.run([*PROGRAM, *arguments], capture_output=True, check=False)
    return time.perf_counter() - began


def main() -> None:
    """Print the times."""
    command_seconds("--version")  # compiles what is not compiled yet
    print(f"first line of sft train   {min(first_line_seconds() for _ in range(ROUNDS)):.2f} s")
    for arguments in (["--help"], ["train", "--help"], ["trian"]):
        best = min(command_seconds(*arguments) for _ in range(ROUNDS))
        print(f"{'sft ' + ' '.join(arguments):<25} {best:.2f} s")
    for line in LINES:
        print(f"Tab after {line!r:<34} {min(tab_seconds(line) for _ in range(ROUNDS)):.2f} s")


if __name__ == "__main__":
    main()
