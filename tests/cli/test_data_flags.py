"""Flags that say how rows are read, and that a run remembers the template it was given."""

import json
from pathlib import Path

from sftcli.data.conversations.messages import Message
from sftcli.data.rendering.encode import encode_prompt
from sftcli.modeling.tokenizer.chat_tokenizer import load_chat_tokenizer


def test_mapped_columns_are_read_as_prompt_and_completion(sft, tiny_model):
    Path("odd.jsonl").write_text('{"ask": "Who?", "say": "Me."}\n', encoding="utf-8")
    flags = ("--map", "prompt=ask", "--map", "completion=say", "--set", "data.heldout_fraction=0")
    code, out, _ = sft("prepare", "odd.jsonl", "--model", tiny_model, *flags, "--show", "1", "--json")
    trained = "".join(token["text"] for token in json.loads(out)["shown"][0]["tokens"] if token["trained"])
    assert (code, trained) == (0, "Me.<|im_end|>")


def test_column_that_no_row_has_cannot_be_mapped(sft, rows, tiny_model):
    code, out, err = sft("prepare", rows, "--model", tiny_model, "--map", "prompt=quetsion")
    assert (code, out) == (2, "")
    assert "'question'" in err


def test_run_remembers_its_template_in_every_model_folder(sft, rows, flags):
    code, _, _ = sft("train", "--data", rows, *flags, "--template", "alpaca", "--run", "one")
    assert code == 0
    folders = [Path("runs/one/final"), *Path("runs/one/checkpoints").iterdir()]
    assert len(folders) > 1
    for folder in folders:
        tokenizer = load_chat_tokenizer(folder)
        ids = encode_prompt(tokenizer, [Message(role="user", content="Hi")])
        assert tokenizer.decode(ids, skip_special=False).endswith("### Instruction:\nHi\n\n### Response:\n")


def test_only_the_last_turn_is_trained_when_asked_for(sft, tiny_model):
    roles = ("user", "assistant") * 2
    turns = [{"role": role, "content": f"{role} {n}"} for n, role in enumerate(roles)]
    Path("chat.jsonl").write_text(json.dumps({"messages": turns}) + "\n", encoding="utf-8")
    flags = ("--train-on", "last", "--set", "data.heldout_fraction=0", "--show", "1", "--json")
    _, out, _ = sft("prepare", "chat.jsonl", "--model", tiny_model, *flags)
    shown = json.loads(out)["shown"][0]["tokens"]
    assert "".join(token["text"] for token in shown if token["trained"]) == "assistant 3<|im_end|>"


def test_longest_row_is_a_flag_and_longer_ones_are_counted(sft, rows, tiny_model):
    code, out, _ = sft("prepare", rows, "--model", tiny_model, "--max-tokens", "8", "--json")
    assert code == 65
    assert "(too-long 48, " in json.loads(out)["error"]["message"]
