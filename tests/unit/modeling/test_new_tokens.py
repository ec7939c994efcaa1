"""A model folder with more tokens: which rows are new, what they begin with, and that nothing else is another."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    PhiConfig,
    PhiForCausalLM,
)

from sftcli.errors import UsageError
from sftcli.modeling.locate.locate import LocatedModel, locate_model
from sftcli.modeling.new_tokens import with_new_tokens
from sftcli.modeling.tokenizer.chat_tokenizer import load_chat_tokenizer
from tests.support.recording import RecordingSink
from tests.support.tiny_families import build_with_buffers
from tests.support.tiny_model import build_tiny_model
from tests.support.tiny_modern import build_tiny_pt
from tests.support.tiny_tokenizer import (
    FAMILIES,
    build_family_tokenizer,
    build_metaspace_tokenizer,
    build_tiny_tokenizer,
)

ROWS = 514  # of the tiny models, as many as their tokenizer has tokens
NEW = ("<tool>", "zinc", "<|call|>")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SFT_CACHE_DIR", str(tmp_path / "cache"))


def extended(folder: Path, *tokens: str, sink: RecordingSink | None = None) -> LocatedModel:
    sink = sink or RecordingSink()
    return with_new_tokens(locate_model(str(folder), revision=None, emit=sink), tokens or NEW, sink)


def gpt2(rows: int) -> GPT2LMHeadModel:
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=rows, n_embd=8, n_layer=1, n_head=2, eos_token_id=2, bos_token_id=1)
    )


def phi(rows: int) -> PhiForCausalLM:  # its own head has a bias
    return PhiForCausalLM(
        PhiConfig(
            vocab_size=rows, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
        )
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tie", [True, False])
def test_new_rows_are_the_mean_of_the_others_which_stay_bit_for_bit(tmp_path, tie, dtype):
    source = build_tiny_model(tmp_path / "model", tie=tie, dtype=dtype)
    made = extended(source)
    assert made.new_tokens == {"<tool>": ROWS, "zinc": ROWS + 1, "<|call|>": ROWS + 2}
    before, after = load_file(source / "model.safetensors"), load_file(made.folder / "model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in after.items():
        assert torch.equal(tensor[: len(before[name])], before[name])
        assert tensor.dtype == dtype
    for name in ["model.embed_tokens.weight"] if tie else ["model.embed_tokens.weight", "lm_head.weight"]:
        mean = before[name].double().mean(0).to(dtype)
        assert torch.equal(after[name][ROWS:], mean.expand(3, -1))
    assert json.loads((made.folder / "config.json").read_text())["vocab_size"] == ROWS + 3


@pytest.mark.parametrize("build", [gpt2, phi])
def test_rows_are_those_that_transformers_makes_but_for_its_noise(tmp_path, build):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build(ROWS)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_()
        model.save_pretrained(tmp_path / "model")
        build_tiny_tokenizer(tmp_path / "model")
        model.resize_token_embeddings(ROWS + 3)
    ours = AutoModelForCausalLM.from_pretrained(extended(tmp_path / "model").folder)
    assert type(ours) is type(model)
    theirs = dict(model.state_dict())
    for name, tensor in ours.state_dict().items():
        torch.testing.assert_close(tensor, theirs[name], atol=1e-3, rtol=0, msg=name)


def test_spare_rows_are_taken_and_are_no_part_of_the_mean(tmp_path):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = gpt2(ROWS + 6)
    with torch.no_grad():
        model.transformer.wte.weight[ROWS:] = 1e3
    model.save_pretrained(tmp_path / "model")
    build_tiny_tokenizer(tmp_path / "model")
    made = extended(tmp_path / "model")
    rows = load_file(made.folder / "model.safetensors")["transformer.wte.weight"]
    assert len(rows) == ROWS + 6
    assert torch.equal(rows[ROWS : ROWS + 3], rows[:ROWS].double().mean(0).float().expand(3, -1))
    assert (rows[ROWS + 3 :] == 1e3).all()


def test_files_of_weights_that_do_not_change_are_links(tmp_path):
    source = build_tiny_model(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(source)
    shutil.rmtree(source)
    model.save_pretrained(source, max_shard_size="100KB")
    build_tiny_tokenizer(source)
    made = extended(source)
    links = {path.name for path in made.folder.glob("*.safetensors") if path.is_symlink()}
    index = json.loads((source / "model.safetensors.index.json").read_text())["weight_map"]
    assert links == {*index.values()} - {index["model.embed_tokens.weight"]} != set()
    ours = AutoModelForCausalLM.from_pretrained(made.folder).state_dict()
    assert all(torch.equal(ours[name][: len(tensor)], tensor) for name, tensor in model.state_dict().items())


def test_folder_is_made_once_and_anew_where_it_is_damaged_or_the_model_is_another(tmp_path):
    source = build_tiny_model(tmp_path / "model")
    made = extended(source)
    stamp = (made.folder / "config.json").stat().st_mtime_ns
    assert extended(source).folder == made.folder
    assert (made.folder / "config.json").stat().st_mtime_ns == stamp
    whole = (made.folder / "model.safetensors").read_bytes()
    (made.folder / "model.safetensors").write_bytes(whole[:100])
    extended(source)
    assert (made.folder / "model.safetensors").read_bytes() == whole
    (source / "chat_template.jinja").write_text("{{ messages[0]['content'] }}<|im_end|>")
    assert extended(source).folder != made.folder


def test_tokens_that_are_there_are_told_and_left_alone(tmp_path):
    source, sink = build_tiny_model(tmp_path / "model"), RecordingSink()
    assert extended(source, "<think>", "</think>", sink=sink).folder == source
    assert (
        "has these tokens already, which stay as they are: '<think>' (512), '</think>' (513)"
        in sink.events[-1].text
    )
    made = extended(source, "<think>", "<tool>")
    assert made.new_tokens == {"<tool>": ROWS}
    once_more = extended(made.folder, "<tool>")
    assert (once_more.folder, once_more.new_tokens) == (made.folder, {})


@pytest.mark.parametrize("kind", [*FAMILIES, "never", "first", "always", "prepend"])
def test_transformers_reads_the_same_ids_and_no_text_is_split(tmp_path, kind):
    source = tmp_path / "model"
    build = build_family_tokenizer if kind in FAMILIES else build_metaspace_tokenizer
    build(source, kind)
    rows = load_chat_tokenizer(source).vocab_size
    gpt2(rows).save_pretrained(source)
    build(source, kind)  # its generation settings, which the model has written over
    made = extended(source)
    ours, theirs = load_chat_tokenizer(made.folder), AutoTokenizer.from_pretrained(made.folder)
    assert len(theirs) == rows + 3
    text = "a<tool>b zinc, zincs <tool> <|call|>."
    ids = theirs(text, add_special_tokens=False).input_ids
    assert ours.encode(text) == ids
    counts = [ids.count(token) for token in made.new_tokens.values()]
    assert counts == [2, 2, 1]
    # Users may write them all but the control token, which stays text.
    for reading in ("answer", "text"):
        read = ours.encode(text, reading=reading)
        assert [read.count(token) for token in made.new_tokens.values()] == [2, 2, 0]
    shown = theirs.decode(ids, skip_special_tokens=True)
    assert shown.count("<tool>") == shown.count("zinc") == 2
    assert "<|call|>" not in shown


def test_only_a_tokenizer_with_such_tokens_has_another_fingerprint(tmp_path):
    source = build_tiny_model(tmp_path / "model")
    one, other = extended(source, "<tool>"), extended(source, "<call>")
    prints = {load_chat_tokenizer(folder).fingerprint for folder in (source, one.folder, other.folder)}
    assert len(prints) == 3
    config = one.folder / "tokenizer_config.json"
    config.write_text(config.read_text().replace('"sft_tokens_in_text"', '"other"'))
    assert load_chat_tokenizer(one.folder).fingerprint not in prints


def test_second_table_of_tokens_is_refused_by_name(tmp_path):
    source = build_with_buffers(tmp_path / "model", "gemma4_text")
    with pytest.raises(UsageError, match=r"model\.embed_tokens_per_layer of .* has a row for each token too"):
        extended(source)
    assert not list((tmp_path / "cache" / "models").glob("tokens-*"))


def test_models_that_cannot_have_more_tokens_are_refused(tmp_path):
    tokenizer = build_tiny_tokenizer(tmp_path / "tokenizer")
    located = locate_model(
        str(build_tiny_pt(tmp_path / "a.pt")), revision=None, tokenizer=str(tokenizer), emit=RecordingSink()
    )
    with pytest.raises(UsageError, match="Modern LLM model, whose program has a fixed set of tokens"):
        with_new_tokens(located, NEW, RecordingSink())
    packed = build_tiny_model(tmp_path / "packed")
    config = json.loads((packed / "config.json").read_text())
    (packed / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(UsageError, match=r"the weights are quantized"):
        extended(packed)
