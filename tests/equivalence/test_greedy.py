"""Greedy answers of the default model are those of ``transformers``, token by token."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from sftcli.data.conversations.messages import Message
from sftcli.data.rendering.encode import encode_prompt
from sftcli.modeling.decoding.decoder import checked_decoder, choose_decoder
from sftcli.modeling.decoding.fused_decode import FusedRows
from sftcli.modeling.load import load_model
from sftcli.modeling.locate.locate import locate_model
from sftcli.modeling.tokenizer.chat_tokenizer import load_chat_tokenizer
from tests.support.decoding import answers

ROWS = Path(__file__).parents[2] / "presets" / "quick" / "heldout.jsonl"
TOKENS = 16


@pytest.mark.slow
def test_fifty_prompts_of_the_default_model_equal_transformers_cached_and_uncached(monkeypatch):
    monkeypatch.delenv("SFT_CACHE_DIR", raising=False)  # the user's own, which may hold the model
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    folder = locate_model("smollm2-135m", revision=None, emit=lambda _event: None).folder
    tokenizer = load_chat_tokenizer(folder)
    rows = [json.loads(line) for line in ROWS.read_text(encoding="utf-8").splitlines()[:50]]
    prompts = [encode_prompt(tokenizer, [Message(role="user", content=row["prompt"])]) for row in rows]
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def told(*, use_cache: bool) -> list[list[int]]:
        made_by_them = []
        for prompt in prompts:
            ids = torch.tensor([prompt])
            made = theirs.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=TOKENS, do_sample=False, pad_token_id=2,
                use_cache=use_cache,
            )[0, len(prompt) :].tolist()  # fmt: skip
            ends = [place for place, token in enumerate(made) if token in tokenizer.stop_ids]
            made_by_them.append(made[: ends[0]] if ends else made)
        return made_by_them

    ours = load_model(folder, dtype=torch.float32, device=torch.device("cpu"))
    plain = load_model(folder, dtype=torch.float32, device=torch.device("cpu"))
    fused, plain = choose_decoder(ours), checked_decoder(plain)
    assert isinstance(fused.make_rows(1, ()), FusedRows)
    wanted = told(use_cache=True)
    assert told(use_cache=False) == wanted
    for decoder, most in ((fused, 1), (fused, 16), (plain, 16)):
        rows = answers(decoder, prompts, max_new_tokens=TOKENS, stop_ids=tokenizer.stop_ids, max_rows=most)
        assert [row.ids for row in rows] == wanted, most
