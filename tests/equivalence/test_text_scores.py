"""``sft eval --text``: every token but the first is predicted once, and the sums are those of a plain loop in transformers."""

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from sftcli.cli.app import app
from sftcli.services.evaluate.texts import windows
from tests.support.tiny_model import build_tiny_model


@given(st.integers(0, 300), st.integers(2, 40))
def test_every_token_but_the_first_is_predicted_once_with_all_before_it_or_half_a_window(length, size):
    predicted = []
    for begin, end, first in windows(length, size):
        assert (0 <= begin < end <= length, end - begin <= size) == (True, True)
        assert all(token - begin >= min(token, size - size // 2) for token in range(first, end))
        predicted += range(first, end)
    assert predicted == list(range(1, length))


def by_hand(folder, texts, size):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    nll, tokens = 0.0, 0
    for text in texts:
        ids = tokenizer(text, return_tensors="pt").input_ids
        for token in range(1, ids.shape[1]):  # one at a time
            end = size
            while end <= token:
                end += size // 2
            begin = max(0, min(end, ids.shape[1]) - size)
            with torch.no_grad():
                logits = model(ids[:, begin:token]).logits[0, -1].double()
            nll -= float(torch.log_softmax(logits, dim=-1)[ids[0, token]])
            tokens += 1
    return nll, tokens


@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_numbers_are_those_of_a_plain_loop_in_transformers(tmp_path, kind):
    size = 16
    folder = build_tiny_model(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": size}))
    texts = ["Zwölf Kisten Äpfel for Ms Okafor, please. " * 2, "Short.", "word " * 30]
    if kind == "txt":
        paths = [tmp_path / f"{number}.txt" for number in range(3)]
        for path, text in zip(paths, texts, strict=True):
            path.write_text(text, encoding="utf-8")
    else:
        paths = [tmp_path / "rows.jsonl"]
        paths[0].write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    flags = [word for path in paths for word in ("--text", str(path))]
    result = CliRunner().invoke(app, ["eval", str(folder), *flags, "--base", str(folder), "--json"])
    assert result.exit_code == 0, (result.stderr, result.exception)
    found = json.loads(result.stdout)
    nll, tokens = by_hand(folder, texts, size)
    assert tokens > 4 * size
    for score in (found["tuned"], found["base"]):
        assert (score["tokens"], score["window_tokens"]) == (tokens, size)
        assert score["loss"] == pytest.approx(nll / tokens, rel=1e-5)
        assert score["perplexity"] == pytest.approx(math.exp(nll / tokens), rel=1e-5)
        bits = nll / math.log(2) / sum(len(text.encode()) for text in texts)
        assert score["bits_per_byte"] == pytest.approx(bits, rel=1e-5)
    assert found["documents"] == 3


def test_what_cannot_be_scored_is_refused_by_name(tmp_path):
    tiny_model = build_tiny_model(tmp_path / "model")
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n')
    (tmp_path / "a.txt").write_text("some text")

    def ask(*flags):
        return CliRunner().invoke(app, ["eval", str(tiny_model), *map(str, flags)])

    assert 'there is no "text"' in ask("--text", rows).exception.message
    assert ask("--text", tmp_path / "none.txt").exception.exit_code == 66
    assert ask("--text", rows, "--data", rows).exception.exit_code == 2
    assert ask("--text", tmp_path / "a.txt", "--fail-above", "perplexity=1").exception.exit_code == 3
    assert ask("--text", tmp_path / "a.txt", "--fail-above", "perplexity=1e300").exit_code == 0
