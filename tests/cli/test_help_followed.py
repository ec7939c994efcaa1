"""The help of a refusal, typed as it stands: the rows are kept then, or the next help is followed."""

import json
import re
import shlex
from pathlib import Path

import pytest
from transformers import LlamaForCausalLM

from tests.models.rows import read_rows
from tests.models.tokens import HABITS, tokens_of
from tests.support.tiny_model import tiny_config
from tests.support.tiny_tokenizer import FAMILIES, TEMPLATES, build_family_tokenizer, build_tiny_tokenizer

SHARED = Path(__file__).parents[2].parent / "shared" / "data"
GOLDEN = Path(__file__).parents[1] / "golden" / "masks"
OTHER_TEMPLATE = TEMPLATES / "qwen3.jinja"  # shows tools, thinking and system text, in any order of roles
MOST_STEPS = 4
REFUSED = 65
SLOW = 120_000  # bytes


def model_folder(folder: Path) -> Path:
    config = tiny_config()
    config.vocab_size, config.max_position_embeddings = 640, 20_000
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def flags_in(help_: str) -> list[str]:
    """Return the first way out that ``help_`` names as it would be typed, or nothing."""
    if "choose a --template" in help_ or "choose another --template" in help_:
        return ["--template", str(OTHER_TEMPLATE)]
    way = re.search(r"--[a-z-]+ \S+(?: --[a-z-]+ \S+)*", help_)
    return shlex.split(way[0].rstrip(";,")) if way else []


def add_stop_token(model: Path, token: int) -> None:
    path = model / "generation_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(config | {"eos_token_id": [config["eos_token_id"], token]}), encoding="utf-8")


def follow(sft, rows: Path, model: Path) -> list[str]:
    """Return what was typed behind `sft prepare ROWS` until rows were kept; a file that a help names is edited."""
    typed: list[str] = []
    for _ in range(MOST_STEPS):
        code, out, _ = sft("prepare", rows, "--model", model, "--json", *typed)
        if code == 0:
            assert json.loads(out)["audit"]["train"]["kept"] > 0
            return typed
        assert code == REFUSED, out
        help_ = json.loads(out)["error"]["hint"]
        if stop := re.search(r"add its id (\d+) to eos_token_id", help_):
            add_stop_token(model, int(stop[1]))
            continue
        way = flags_in(help_)
        assert way, f"{rows.name}: {help_!r} leads nowhere"
        typed += way
    raise AssertionError(f"{rows.name}: still refused with {typed}")


HABIT_NAMES = sorted(file.stem for file in HABITS.glob("habit-*.jinja"))


def refused_rows(habit: str) -> dict[str, str]:
    """Return a row for each help that rows get under a template of ``habit``, by that help."""
    lines = (GOLDEN / f"help-{habit.removeprefix('habit-')}.txt").read_text("utf-8").splitlines()
    told = (line.split(": ", 2) for line in lines if line.count(": ") > 1)
    return {help_: name for name, _, help_ in told}


@pytest.mark.parametrize("habit", [*filter(refused_rows, HABIT_NAMES)])
def test_help_of_rows_under_each_habit_is_followed_until_they_are_kept(sft, tmp_path: Path, habit: str):
    tokens = tokens_of(habit)
    assert tokens
    model = build_tiny_tokenizer(
        model_folder(tmp_path / "model"),
        template=(HABITS / f"{habit}.jinja").read_text("utf-8"),
        bos_token="<|turn|>",
        eos_token=tokens["eos"],
        pad_token=None,
        stop_token=tokens.get("stop", [tokens["eos"]])[-1],
        extra_special=tuple(tokens["special"]),
        swallowing=tuple(tokens.get("swallowing", ())),
    )
    rows = {row.name: row for row in read_rows()}
    for name in refused_rows(habit).values():
        path = tmp_path / f"{name}.jsonl"
        path.write_text(json.dumps(rows[name].fields) + "\n", encoding="utf-8")
        assert follow(sft, path, model)


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data files are not here")
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_help_of_real_files_is_followed_until_rows_are_kept(sft, tmp_path: Path, family: str):
    model = build_family_tokenizer(model_folder(tmp_path / "model"), family)
    files = [file for file in SHARED.glob("*/*.json*") if file.stat().st_size < SLOW]
    assert len(files) > 7
    for file in files:
        follow(sft, file, model)
