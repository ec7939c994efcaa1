"""What a model has forgotten: general text beside the base, caught by a limit where a learning rate is far too high."""

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from sftcli.cli.app import app
from sftcli.data.general.general import general_texts
from sftcli.errors import ThresholdError, UsageError
from sftcli.modeling.tokenizer.files import read_tokenizer_files

LIMIT = ("--fail-above", "forgetting=0.1")


def invoke(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def runs(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs ``gentle`` and ``violent``, which differ in the learning rate alone."""
    place = tmp_path_factory.mktemp("forgetting")
    rows = place / "rows.jsonl"
    rows.write_text(
        "\n".join(
            json.dumps({"question": f"What is {n} plus {n}?", "answer": f"It is {2 * n}."}) for n in range(60)
        ),
        encoding="utf-8",
    )
    for name, rate in (("gentle", 1e-4), ("violent", 1.0)):
        done = invoke(
            "train", "--data", rows, "--model", tiny_model, "--run", name, "--max-steps", 8, "--learning-rate", rate,
            "--set", f"run.root={place / 'runs'}", "--set", "training.batch_size=8", "--set", "data.heldout_fraction=0.2",
        )  # fmt: skip
        assert done.exit_code == 0, (done.stderr, done.exception)
    return place / "runs"


def evaluate(name: str, runs: Path, *flags: object):
    return invoke("eval", name, "--runs", runs, "--max-rows", 1, *flags)


def test_a_rate_that_is_far_too_high_is_caught_and_a_gentle_one_is_not(runs: Path) -> None:
    caught = evaluate("violent", runs, *LIMIT)
    assert isinstance(caught.exception, ThresholdError), caught.exception
    assert "forgetting is" in caught.exception.message
    passed = evaluate("gentle", runs, *LIMIT)
    assert passed.exit_code == 0, passed.exception
    assert "general text: " in passed.stderr


def test_the_numbers_are_those_of_the_models_own_logits(runs: Path, tiny_model: Path) -> None:
    done = evaluate("gentle", runs, "--forgetting", "--json", "--quiet")
    assert done.exit_code == 0, done.exception
    found = json.loads(done.stdout)["forgetting"]
    tokenizer = read_tokenizer_files(tiny_model).tokenizer
    assert found["texts"] == len(general_texts()) == 80
    expected, tokens = {}, 0
    for name, folder in (("base", tiny_model), ("tuned", runs / "gentle" / "final")):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        nll, tokens = [], 0
        for text in general_texts():
            prompt = f"Question: {text.question}\nAnswer:" if text.question else ""
            ids = tokenizer.encode(f"{prompt} {text.text}" if prompt else text.text).ids
            first = max(1, len(tokenizer.encode(prompt).ids)) if prompt else 1
            ids = ids[: model.config.max_position_embeddings]
            with torch.no_grad():
                logprobs = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
            nll += [-logprobs[place - 1, ids[place]].item() for place in range(first, len(ids))]
            tokens += len(ids) - first
        expected[name] = math.fsum(nll) / tokens
    assert found["tokens"] == tokens
    assert found["base"] == pytest.approx(expected["base"], abs=1e-5)
    assert found["tuned"] == pytest.approx(expected["tuned"], abs=1e-5)
    difference = found["difference"]
    assert difference["value"] == pytest.approx(expected["tuned"] - expected["base"], abs=1e-5)
    assert difference["low"] < difference["value"] < difference["high"]


def test_the_page_says_what_was_forgotten(runs: Path) -> None:
    assert evaluate("violent", runs, "--forgetting").exit_code == 0
    assert "General text: +" in (runs / "violent" / "report.html").read_text(encoding="utf-8")


def test_without_a_base_nothing_can_be_said(runs: Path) -> None:
    refused = evaluate("gentle", runs, "--no-base", *LIMIT)
    assert isinstance(refused.exception, UsageError)
    assert "--base MODEL" in refused.exception.hint


def test_the_general_text_is_of_many_kinds_and_no_text_stands_twice() -> None:
    texts = general_texts()
    passages = [text for text in texts if not text.question]
    assert len(passages) == 40
    assert {"prose", "advice", "facts", "arithmetic", "code", "German", "French", "Spanish"} <= {
        text.kind for text in passages
    }
    assert (
        len({text.text for text in passages}) == len({text.question for text in texts if text.question}) == 40
    )


@pytest.mark.parametrize("other", [("--text", "rows.jsonl"), ("--tasks", "arc_easy")])
def test_it_is_refused_beside_what_scores_no_rows(other: tuple[str, str]) -> None:
    refused = invoke("eval", "gentle", "--forgetting", *other)
    assert isinstance(refused.exception, UsageError), refused.exception
    assert refused.exception.message == f"{other[0]} and --forgetting exclude each other"
