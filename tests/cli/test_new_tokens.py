"""New tokens as a person adds them: train, score, ask and export, whole models and adapters."""

import json
import shlex

import gguf
import pytest
from transformers import AutoTokenizer, LlamaForCausalLM

from tests.support.tiny_model import tiny_config
from tests.support.tiny_tokenizer import build_metaspace_tokenizer

SET = ("--set", 'model.new_tokens=["<tool>", "<|call|>"]')


@pytest.fixture
def tagged(tmp_path):
    """Rows with a new token in every question and answer."""
    path = tmp_path / "tagged.jsonl"
    rows = [
        {"question": f"What <tool> is {n} plus {n}?", "answer": f"It is <tool> {2 * n}."} for n in range(40)
    ]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize("form", [(), ("--lora", "--rank", "4")], ids=["full", "lora"])
def test_run_with_new_tokens_is_scored_beside_its_base_asked_and_exported(sft, tagged, flags, tmp_path, form):
    code, _, err = sft("train", "--data", tagged, "--run", "one", *SET, *form, *flags)
    assert code == 0, err
    assert "new tokens: '<tool>' (514), '<|call|>' (515); the embeddings have 516 rows, had 514" in err
    runs = tmp_path / "runs"
    code, out, err = sft("eval", "one", "--runs", runs, "--json", "--max-rows", "2")
    assert code == 0, err
    report = json.loads(out)
    assert report["base"]["loss"] > report["tuned"]["loss"]
    for model in (runs / "one" / "final", runs / "one" / "checkpoints" / "step-00000004"):
        answer = json.loads(_asked(sft, model, "What <tool>?"))
        turn = [{"role": "user", "content": "What <tool>?"}]
        theirs = AutoTokenizer.from_pretrained(model).apply_chat_template(turn, add_generation_prompt=True)
        assert answer["prompt_tokens"] == len(theirs["input_ids"])
    code, _, err = sft("export", "one", "--runs", runs, "--to", "gguf", "--out", tmp_path / "one.gguf")
    assert code == 0, err
    fields = gguf.GGUFReader(tmp_path / "one.gguf").fields
    assert fields["tokenizer.ggml.tokens"].contents()[514:] == ["<tool>", "<|call|>"]
    types = fields["tokenizer.ggml.token_type"].contents()
    assert types[514:] == [gguf.TokenType.USER_DEFINED, gguf.TokenType.CONTROL]


def _asked(sft, model, prompt: str) -> str:
    code, out, err = sft("generate", prompt, "--checkpoint", model, "--max-new-tokens", "2", "--json")
    assert code == 0, err
    return out


def test_ids_of_prepared_rows_change_with_the_tokens(sft, tagged, tiny_model):
    folders = set()
    for changes in ((), SET, ("--set", "model.new_tokens=zinc")):
        code, out, err = sft("prepare", tagged, "--model", tiny_model, *changes, "--json")
        assert code == 0, err
        folders.add(json.loads(out)["folder"])
    assert len(folders) == 3


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ('["<a>", "<a>"]', "new_tokens names a token twice"),
        ('[" a"]', "a token of new_tokens begins or ends in white space"),
        ('[""]', "model.new_tokens"),
    ],
)
def test_tokens_that_cannot_be_meant_are_refused(sft, tagged, tiny_model, value, said):
    code, _, err = sft("prepare", tagged, "--model", tiny_model, "--set", f"model.new_tokens={value}")
    assert code == 2
    assert said in err


def test_adapter_with_another_base_that_lacks_the_rows_is_scored_with_rows_of_its_own(
    sft, tagged, flags, tmp_path, tiny_model
):
    code, _, err = sft("train", "--data", tagged, "--run", "one", *SET, "--lora", *flags)
    assert code == 0, err
    moved = tmp_path / "moved"
    code, _, err = sft("export", tiny_model, "--to", "hf", "--out", moved)
    assert code == 0, err
    final = tmp_path / "runs" / "one" / "final"
    one = _asked(sft, final, "What <tool>?")
    code, out, err = sft(
        "generate",
        "What <tool>?",
        "--checkpoint",
        final,
        "--base-model",
        moved,
        "--max-new-tokens",
        "2",
        "--json",
    )
    assert code == 0, err
    assert json.loads(out)["text"] == json.loads(one)["text"]


def test_base_that_lacks_the_rows_is_refused_before_it_is_scored(sft, tagged, flags, tiny_model, tmp_path):
    code, _, err = sft("train", "--data", tagged, "--run", "one", *SET, *flags)
    assert code == 0, err
    code, _, err = sft("eval", "one", "--runs", tmp_path / "runs", "--base", tiny_model)
    assert code == 78
    assert "rows hold tokens that the model has no embedding for: '<tool>' (514)" in err


def test_template_of_another_family_trains_with_its_tokens_added(sft, rows, tmp_path):
    folder = tmp_path / "model"
    config = tiny_config()
    config.vocab_size = 640
    LlamaForCausalLM(config).save_pretrained(folder)
    build_metaspace_tokenizer(folder, "first")
    template = ("--template", "chatml", "--max-steps", "2", "--set", f"run.root={tmp_path / 'runs'}")
    code, _, err = sft("train", "--data", rows, "--model", folder, "--run", "one", *template)
    assert code == 2
    added = err.partition("add them: ")[2].partition(";")[0]
    code, _, err = sft(
        "train", "--data", rows, "--model", folder, "--run", "one", *template, *shlex.split(added)
    )
    assert code == 0, err
    assert "60 of 60 rows kept" in err
    final = AutoTokenizer.from_pretrained(tmp_path / "runs" / "one" / "final")
    ends = json.loads((tmp_path / "runs" / "one" / "final" / "generation_config.json").read_text())[
        "eos_token_id"
    ]
    assert final.convert_tokens_to_ids("<|im_end|>") in ends
