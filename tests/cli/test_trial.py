"""`sft try`: the model that a training would start from is asked as transformers asks it, and its right answers are counted."""

import json
import re
import shlex
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support.tiny_model import build_tiny_model

TURN = re.compile(r"<\|im_start\|>(\w+)\n(.*?)<\|im_end\|>\n", re.DOTALL)
WAYS = ("alone", "random", "nearest")


def write_pairs(path: Path, numbers: range) -> Path:
    """Write rows of which every second one is answered as the tuned model answers all."""
    answers = ("ok", "Nine pears.")
    lines = [{"question": f"{number * 37} of what?", "answer": answers[number % 2]} for number in numbers]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def certain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that answers `ok`, whatever it is asked: it looks at the last token alone, and knows what follows these."""
    folder = build_tiny_model(tmp_path_factory.mktemp("model") / "certain", tie=False)
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "?"}], add_generation_prompt=True, return_dict=False
    )
    path = [asked[-1], *tokenizer("ok<|im_end|>", add_special_tokens=False).input_ids]
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.lm_head.weight.zero_()
        for token, following in pairwise(path):
            model.lm_head.weight[following] = model.model.embed_tokens.weight[token]
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", ["tiny_model", "certain"])
def test_answers_and_counts_are_those_of_transformers_on_prompts_made_by_hand(sft, tmp_path, request, name):
    folder = request.getfixturevalue(name)
    rows = write_pairs(tmp_path / "rows.jsonl", range(40))
    ask = ("--model", folder, "--shots", "3", "--set", "data.heldout_fraction=0.5")
    code, out, err = sft("try", rows, *ask, "--json")
    assert code == 0, err
    found = json.loads(out)
    pairs = {row["question"]: row["answer"] for row in map(json.loads, rows.read_text().splitlines())}
    held = {turns_in(sample["prompts"]["alone"])[-1]["content"] for sample in found["samples"][:3]}
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    expected = [tokenizer(sample["expected"], add_special_tokens=False) for sample in found["samples"]]
    most = max(len(one.input_ids) for one in expected) + 9
    for sample in found["samples"][:3]:
        for way in WAYS:
            turns = turns_in(sample["prompts"][way])
            examples = [(turns[n]["content"], turns[n + 1]["content"]) for n in range(0, len(turns) - 1, 2)]
            assert len(set(examples)) == (0 if way == "alone" else 3)
            assert all(pairs[question] == answer for question, answer in examples)
            assert held.isdisjoint(question for question, _ in examples)
            assert pairs[turns[-1]["content"]] == sample["expected"]
            assert by_hand(model, tokenizer, turns, most) == sample["answers"][way]
    assert_counts(found)
    alone = found["ways"][0]
    assert (0 < alone["matched"] < alone["answered"]) == (folder.name == "certain")


def turns_in(prompt: str) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in TURN.findall(prompt)]


def by_hand(model, tokenizer, turns: list[dict[str, str]], most: int) -> str:
    ids = tokenizer.apply_chat_template(
        turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    made = model.generate(**ids, max_new_tokens=most, do_sample=False)[0, ids["input_ids"].shape[1] :]
    text = tokenizer.decode(made)
    return text.partition("<|im_end|>")[0].strip()


def assert_counts(found: dict[str, object]) -> None:
    """See that each way's numbers are those of its answers."""
    samples = found["samples"]
    for way in found["ways"]:
        right = [sample["answers"][way["name"]] == sample["expected"] for sample in samples]
        assert (way["matched"], way["answered"]) == (sum(right), len(samples))
        assert way["match_fraction"] == sum(right) / len(right)
        assert way["mean_shots"] == (0 if way["name"] == "alone" else 3)
    alone, *others = found["ways"]
    assert alone["difference"] is None
    for way in others:
        assert way["difference"]["value"] == pytest.approx(
            (way["matched"] - alone["matched"]) / way["answered"]
        )
        assert way["mean_prompt_tokens"] > alone["mean_prompt_tokens"]
    best = max(way["matched"] for way in found["ways"])
    assert {way["name"]: way["matched"] for way in found["ways"]}[found["best"]] == best


def test_the_screen_ends_with_the_figure_to_beat_and_a_command_that_trains_on_the_same(
    sft, tiny_model, rows, tmp_path
):
    held = write_pairs(tmp_path / "held out.jsonl", range(6))
    flags = ("--heldout", held, "--model", tiny_model, "--train-on", "last", "--seed", "7", "--allow-leak")
    code, out, err = sft("try", rows, *flags, "--shots", "2", "--set", "training.batch_size=4")
    assert code == 0, err
    assert [line.split("  ")[0] for line in out.splitlines()] == [
        "prompt", "no examples", "random examples", "nearest examples",
    ]  # fmt: skip
    *_, figure, following = err.splitlines()
    assert figure.startswith("a tuned model has to beat 0 of 6")
    train, _, score = following.removeprefix("next: ").partition(", then ")
    assert score == "sft eval --max-rows 60"
    words = shlex.split(train)[1:]
    settings = json.loads(sft(*words, "--print-config", "--json")[1])["settings"]
    wanted = {
        "data.sources": [str(rows)],
        "data.heldout_sources": [str(held)],
        "model.name": str(tiny_model),
        "data.train_on": "last",
        "training.seed": 7,
        "data.allow_leak": True,
        "training.batch_size": 4,
    }
    assert {key: settings[key]["value"] for key in wanted} == wanted
    assert sft("try", rows, *flags, "--shots", "0", "--quiet")[2] == ""


def test_without_rows_the_command_to_train_has_none_either(sft, tiny_model):
    code, out, err = sft("try", "--model", tiny_model, "--shots", "0", "--max-rows", "2", "--json")
    assert code == 0, err
    assert json.loads(out)["train_command"] == f"sft train --model {tiny_model}"
    assert json.loads(out)["samples"][0]["origin"].partition(":")[0].endswith("heldout.jsonl")


def test_eval_sets_the_base_with_examples_beside_the_tuned_model(sft, tmp_path, certain):
    rows = write_pairs(tmp_path / "rows.jsonl", range(40))
    same = ("--model", certain, "--set", "data.heldout_fraction=0.5", "--set", "data.split_seed=3")
    assert (
        sft("train", "--data", rows, *same, "--run", "one", "--max-steps", "1", "--learning-rate", "1e-9")[0]
        == 0
    )
    ways = json.loads(sft("try", rows, *same, "--shots", "3", "--json")[1])["ways"]
    code, out, err = sft("eval", "one", "--try", "--shots", "3", "--json")
    assert code == 0, err
    found = json.loads(out)
    tried = found["tried"]
    assert [way["name"] for way in tried] == [*WAYS, "tuned"]
    for way, expected in zip(tried, ways, strict=False):
        for key in ("matched", "answered", "mean_shots", "mean_prompt_tokens", "cut"):
            assert way[key] == expected[key]
        assert way["difference"]["value"] == (tried[-1]["matched"] - way["matched"]) / way["answered"]
    assert tried[0]["matched"] == found["base"]["matched"]
    assert (tried[-1]["matched"], tried[-1]["difference"]) == (found["tuned"]["matched"], None)
    code, out, err = sft("eval", "one", "--try", "--shots", "3")
    assert re.search(r"^base, nearest examples +\d+ of 20", out, re.MULTILINE)
    assert "tuned, label: " in err
    page = (tmp_path / "runs" / "one" / "report.html").read_text(encoding="utf-8")
    assert "base, random examples" in page


@pytest.mark.parametrize(
    "other",
    [("--no-base",), ("--data", "rows.jsonl"), ("--shots", "0"), ("--processes", "2"), ("--text", "a.txt")],
)
def test_what_does_not_go_with_examples_in_prompts_is_refused_by_name(sft, other):
    code, _, err = sft("eval", "--try", *other)
    assert code == 2
    assert f"--try and {' '.join(other) if other[0] == '--shots' else other[0]} exclude each other" in err
