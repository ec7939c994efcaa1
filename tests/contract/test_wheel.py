"""What the built wheel holds, seen by an interpreter that knows nothing of the source tree."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]


@pytest.mark.slow  # builds in an environment of its own, which downloads the build backend
def test_wheel_lists_its_presets_and_carries_their_rows(tmp_path: Path):
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "-w", tmp_path, REPO], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("sftcli-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    assert (tmp_path / "site" / "sftcli" / "_presets" / "quick" / "train.jsonl").is_file()
    listed = subprocess.run(
        [sys.executable, "-m", "sftcli", "presets"],
        cwd=tmp_path / "site",
        check=True,
        capture_output=True,
        text=True,
    )
    assert "quick" in listed.stdout
    assert "gpu-smoke" in listed.stdout
