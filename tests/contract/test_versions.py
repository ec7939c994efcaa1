"""Versions: true floors, no ceilings, and the set that is tested, which README's two commands install."""

import re
import tomllib
from pathlib import Path

import pytest
import torch
import transformers

REPO = Path(__file__).parents[2]
PROJECT = tomllib.loads((REPO / "pyproject.toml").read_text("utf-8"))["project"]
REQUIRED = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"]]
FLOORS = {name: floor for name, _, floor in (text.partition(">=") for text in REQUIRED)}
TESTED = dict(
    re.findall(r"^([\w-]+)==([\w.]+)$", (REPO / "constraints.txt").read_text("utf-8"), re.MULTILINE)
)
SOURCE = "\n".join(path.read_text("utf-8") for path in sorted((REPO / "sftcli").rglob("*.py")))

# What is used of torch that older releases than 2.5 lack, and the release that it came in.
NEWER_TORCH = {
    "torch.nn.attention.varlen": "2.10",
    "clip_grads_with_norm_": "2.6",
    "get_total_norm": "2.6",
    "fully_shard": "2.6",
    "torch.OutOfMemoryError": "2.5",
}


def number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version))


@pytest.mark.parametrize("text", REQUIRED)
def test_a_dependency_has_a_floor_and_no_ceiling(text):
    assert re.fullmatch(r"[\w-]+>=[\d.]+", text)


@pytest.mark.parametrize("name", FLOORS)
def test_what_is_tested_is_allowed(name):
    assert number(TESTED[name]) >= number(FLOORS[name])


def test_both_commands_of_the_readme_install_what_is_tested_and_ci_finds_the_second():
    readme = (REPO / "README.md").read_text("utf-8")
    commands = re.findall(r"^python -m pip install .*$", readme, re.MULTILINE)
    assert commands == [
        "python -m pip install . -c constraints.txt && sft train",
        'python -m pip install -e ".[dev]" -c constraints.txt && pytest -n 2',
    ]
    assert "s/^python -m pip install -e .*/&/p" in (REPO / ".ci" / "run").read_text("utf-8")


def test_nothing_of_torch_is_used_that_the_floor_lacks():
    used = {name: since for name, since in NEWER_TORCH.items() if name in SOURCE}
    assert used
    assert all(number(since) <= number(FLOORS["torch"]) for since in used.values())
    assert number(torch.__version__) >= number(FLOORS["torch"])
    assert number(transformers.__version__) >= number(FLOORS["transformers"])
