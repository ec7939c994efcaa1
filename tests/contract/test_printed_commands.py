"""Every command, flag and setting that the program names in a text is one that it takes."""

import re
from pathlib import Path

import pytest

import sftcli
from tests.support.printed import FLAGS, commands_in, faults_in, texts_of

ROOT = Path(sftcli.__file__).parent
SOURCES = sorted(ROOT.rglob("*.py"))
TEXTS = [(f"{path.relative_to(ROOT)}:{line}", text) for path in SOURCES for line, text in texts_of(path)]
# Of pip, hf, torchrun, cp, vllm and Slurm.
OTHERS = {"--no-deps", "--repo-type", "--local-dir", "--nproc-per-node", "--remove-destination", "--max-lora-rank", "--enable-lora",
          "--lora-modules", "--ntasks", "--signal", "--no-input", "--disable-pip-version-check", "--progress-bar", "--only-binary",
          "--dest", "--help", "--version", "--show-completion", "--install-completion"}  # fmt: skip


def test_commands_are_found():
    assert sum(len(list(commands_in(text))) for _, text in TEXTS) > 50


def test_every_named_command_can_be_typed():
    assert [f"{place}: {fault}" for place, text in TEXTS for fault in faults_in(text)] == []


def test_every_named_flag_is_one_of_some_command():
    found = [
        f"{place}: {flag}"
        for place, text in TEXTS
        for flag in re.findall(r"(?<![\w(-])--[a-z][a-z-]*[a-z](?![-\w{])", text)
        if flag not in FLAGS | OTHERS
    ]
    assert found == []


@pytest.mark.parametrize(
    "text",
    [
        "next: sft eval NAME --nothing",
        "help: start it again: sft trian",
        "upload it: sft push",
        "sft train --set training.nothing=1",
        "lower training.nothing",
        "resume it: sft resume one two",
        "sft resume RUN --checkpoint",
    ],
)
def test_what_cannot_be_typed_is_found(text):
    assert list(faults_in(text))
