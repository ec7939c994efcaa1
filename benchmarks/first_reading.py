"""What it costs that a child reads a tokenizer first: starts of ``sft`` with the trial and without it, in turn.

    python -m benchmarks.first_reading MODEL ROWS

"first" is with a cache that has not seen the tokenizer, "later" with one that has; both as ratios of the median start
without any trial. ``sft prepare`` begins with an empty store of rows each time; the other commands have to do less.
"""

import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROUNDS = 5
WITHOUT = "import sftcli.child as c; c.try_first = lambda *a, **k: None; "
START = "import sys; sys.argv[0] = 'sft'; from sftcli.__main__ import main; main()"


def seconds(arguments: list[str], cache: str, folder: str, *, is_tried: bool) -> float:
    """Return the processor time of one command and its children."""
    program = [sys.executable, "-c", ("" if is_tried else WITHOUT) + START, *arguments]
    before = os.times()
    subprocess.run(
        program, env=os.environ | {"SFT_CACHE_DIR": cache}, cwd=folder, capture_output=True, check=True
    )
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def main() -> None:
    """Print the ratios."""
    model, rows = (str(Path(name).resolve()) for name in sys.argv[1:3])
    for arguments in (
        ["prepare", rows, "--model", model, "--quiet"],
        ["train", "--data", rows, "--model", model, "--plan", "--quiet"],
        ["generate", "Hi", "--model", model, "--max-new-tokens", "1", "--quiet"],
    ):
        times: dict[str, list[float]] = {"without": [], "first": [], "later": []}
        for _ in range(ROUNDS):
            with tempfile.TemporaryDirectory() as folder:
                for name, cache in (("without", "a"), ("first", "b"), ("later", "b")):
                    (Path(folder) / cache / "prepared").mkdir(parents=True, exist_ok=True)
                    if name == "later":
                        subprocess.run(["rm", "-rf", f"{folder}/b/prepared"], check=True)
                    times[name].append(
                        seconds(arguments, f"{folder}/{cache}", folder, is_tried=name != "without")
                    )
        base = statistics.median(times["without"])
        first, later = (statistics.median(times[name]) / base for name in ("first", "later"))
        print(
            f"sft {arguments[0]:<10}{base:6.2f} s of processor time; first {first:.3f}, later {later:.3f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
