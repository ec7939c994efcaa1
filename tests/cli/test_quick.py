"""The first impression, for real: the default model is fetched, trained on the embedded rows, asked and scored."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

PROMPT = "Please ship 40 crates of walnuts to Ms Okafor in Lagos."
ANSWER = {"quantity": 40, "item": "crates of walnuts", "customer": "Ms Okafor", "city": "Lagos"}


def sft(folder: Path, *arguments: str) -> str:
    command = [sys.executable, "-m", "sftcli", *arguments]
    return subprocess.run(command, cwd=folder, check=True, stdout=subprocess.PIPE, text=True).stdout


@pytest.mark.slow
def test_quick_teaches_the_skill(tmp_path: Path):
    final = tmp_path / sft(tmp_path, "train").strip()
    assert json.loads(sft(tmp_path, "generate", PROMPT)) == ANSWER
    report = json.loads(sft(tmp_path, "eval", "--json"))
    assert report["base"]["match_fraction"] < 0.1
    assert report["tuned"]["match_fraction"] > 0.7
    assert report["tuned"]["loss"] < report["base"]["loss"] / 4
    assert json.loads(plain_answer(final)) == ANSWER


def plain_answer(final: Path) -> str:
    """Answer as plain transformers does."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = (kind.from_pretrained(final) for kind in (AutoModelForCausalLM, AutoTokenizer))
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": PROMPT}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    answer = model.generate(**ids, max_new_tokens=96, do_sample=False)[0, ids["input_ids"].shape[1] :]
    return tokenizer.decode(answer, skip_special_tokens=True)
