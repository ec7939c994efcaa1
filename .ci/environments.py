"""Runs the fast tests in an environment of its own: the lowest direct versions, or the newest that pip finds.

``make lowest`` takes each dependency at the floor that pyproject.toml names, but torch as in constraints.txt, because
older releases come as CUDA builds of gigabytes on Linux. What is used of those can be looked up without them: mypy finds
it in the Python files of a macOS wheel (80 MB; `pip download --platform macosx_11_0_arm64 --no-deps torch==2.10.0`, its
`*.py` and `*.pyi` in MYPYPATH), where no line about our own files may come out. ``make newest`` takes whatever pip finds. Neither is part of CI: they download, and the world moves.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]


def floors() -> list[str]:
    """Return a pin of each direct dependency and development tool at the lowest version that is allowed."""
    project = tomllib.loads((REPO / "pyproject.toml").read_text("utf-8"))["project"]
    required = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    pins = dict(re.fullmatch(r"([\w-]+)>=([\w.]+)", text).groups() for text in required)  # type: ignore[union-attr]
    return [f"{name}=={version}" for name, version in (pins | {"torch": _tested_torch()}).items()]


def _tested_torch() -> str:
    found = re.search(r"^torch==(.+)$", (REPO / "constraints.txt").read_text("utf-8"), re.MULTILINE)
    assert found is not None  # a test compares the two files
    return found[1]


def main() -> int:
    """Make the environment, run the tests with the rest of the arguments, and return pytest's exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("versions", choices=["lowest", "newest"])
    parser.add_argument(
        "--folder",
        type=Path,
        help="keep the environment there; one that is there is brought to the versions and to this checkout",
    )
    asked, rest = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = asked.folder or Path(scratch, "environment")
        python = folder / "bin" / "python"
        _make(folder, Path(scratch, "floors.txt"), versions=asked.versions)
        subprocess.run([python, "-m", "pip", "list"], check=True)
        path = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
        return subprocess.run(
            [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *rest],
            cwd=REPO,
            env={**os.environ, "PATH": path},
            check=False,
        ).returncode


def _make(folder: Path, pins: Path, *, versions: str) -> None:
    if not folder.exists():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    chosen = ["--upgrade"]
    if versions == "lowest":
        pins.write_text("\n".join(floors()) + "\n", "utf-8")
        chosen = ["--constraint", str(pins)]
    subprocess.run(
        [folder / "bin" / "python", "-m", "pip", "install", "-q", *chosen, "-e", f"{REPO}[dev]"], check=True
    )


if __name__ == "__main__":
    sys.exit(main())
