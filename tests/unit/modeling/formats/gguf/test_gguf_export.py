"""GGUF files of every family: what other readers compute from them, and what is refused."""

import json
import math
from pathlib import Path

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from sftcli.errors import DataError, OutputError, UsageError
from sftcli.events import NeverStop, Session
from sftcli.modeling.formats.gguf import gguf_import
from sftcli.modeling.formats.gguf.gguf_export import ModelFacts, write_gguf
from sftcli.modeling.formats.gguf.gguf_families import FAMILIES
from sftcli.modeling.locate.locate import locate_model
from sftcli.modeling.tokenizer.chat_tokenizer import load_chat_tokenizer
from tests.support.gguf_families import build_gguf_family
from tests.support.recording import RecordingSink

IDS = torch.tensor([[5, 9, 33, 200, 7, 8, 301, 44, 12, 13, 14, 90, 91, 17, 18, 300]])
LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
LOCAL = {"rope_type": "default", "rope_theta": 10000.0}


def write(
    folder: Path,
    family: str,
    *,
    kind: str = "f32",
    facts: ModelFacts | None = None,
    edit=None,
    **changes: object,
) -> tuple[Path, PreTrainedModel, RecordingSink]:
    model = build_gguf_family(family, folder / "model", **changes)
    if edit is not None:
        edit(model)
    sink = RecordingSink()
    path = folder / "a.gguf"
    tokenizer = load_chat_tokenizer(folder / "model")
    write_gguf(
        path, model, tokenizer, source=folder / "model", kind=kind, facts=facts or ModelFacts(name="walnut"),
        session=Session(emit=sink, stop=NeverStop()),
    )  # fmt: skip
    return path, model, sink


def fields_of(path: Path) -> dict[str, object]:
    return {key: field.contents() for key, field in gguf.GGUFReader(path).fields.items()}


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    return model(input_ids=IDS, use_cache=False).logits


# With its defaults for what its reader does not take from the file.
@pytest.mark.parametrize(
    ("family", "defaults"),
    [
        ("llama", {}),
        ("qwen2", {}),
        ("qwen3", {"head_dim": 128}),
        ("qwen3_moe", {"head_dim": 128, "moe_intermediate_size": 768}),
        ("phi3", {}),
        (
            "gemma2",
            {
                "query_pre_attn_scalar": 256,
                "head_dim": 256,
                "attn_logit_softcapping": 50.0,
                "final_logit_softcapping": 30.0,
            },
        ),
        ("gemma3_text", {"query_pre_attn_scalar": 256, "head_dim": 256}),
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_family_that_transformers_reads_computes_the_same(
    family: str, defaults: dict, tmp_path: Path
) -> None:
    path, model, _ = write(tmp_path, family, **defaults)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32)
    torch.testing.assert_close(logits(theirs), logits(model), atol=2e-5, rtol=0)
    ours = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert (
        AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)("a b")["input_ids"]
        == ours("a b")["input_ids"]
    )


# What llama.cpp reads for these, of which transformers reads no file.
@pytest.mark.parametrize(
    ("family", "changes", "expected"),
    [
        ("granite", {}, {"logit_scale": 3.0, "residual_scale": 0.4, "embedding_scale": 2.0, "attention.scale": 0.3}),
        ("smollm3", {}, {"rope.freq_base": 2e6, "rope.dimension_count": 8}),
        ("olmo2", {}, {"attention.layer_norm_rms_epsilon": 1e-5, "attention.head_count_kv": 2}),
        ("mistral", {"head_dim": 16}, {"attention.key_length": 16, "attention.value_length": 16}),
        ("llama", {"rope_parameters": LINEAR}, {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}),
        ("llama", {"rope_parameters": YARN}, {"rope.scaling.type": "yarn", "rope.scaling.original_context_length": 16}),
        ("phi3", {"rope_parameters": LOCAL | {"partial_rotary_factor": 0.5}}, {"rope.dimension_count": 4}),
        ("qwen3_moe", {}, {"expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 16}),
        ("gemma2", {}, {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0, "attention.sliding_window": 24}),
        ("gemma3_text", {}, {"rope.freq_base": 1e6, "rope.freq_base_swa": 1e4, "attention.sliding_window": 24}),
    ],
)  # fmt: skip
def test_numbers_of_an_architecture(family: str, changes: dict, expected: dict, tmp_path: Path) -> None:
    path, _, _ = write(tmp_path, family, **changes)
    found = fields_of(path)
    prefix = gguf.MODEL_ARCH_NAMES[FAMILIES[family].architecture]
    assert {key: found[f"{prefix}.{key}"] for key in expected} == pytest.approx(expected)


@pytest.mark.parametrize(
    ("rope", "words"), [(LLAMA3, "rope_freqs.weight"), (YARN, "yarn"), (LINEAR, "linear")]
)
def test_a_file_with_scaled_positions_is_not_opened_as_if_it_had_none(
    rope: dict, words: str, tmp_path: Path
) -> None:
    path, _, sink = write(tmp_path, "llama", rope_parameters=rope)
    with pytest.raises(DataError, match=rf"scales its rotary positions \({words}\)"):
        locate_model(str(path), revision=None, emit=sink)


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_frequencies_of_llama3_are_divided_by_its_factor_where_waves_are_long(
    family: str, tmp_path: Path
) -> None:
    path, _, _ = write(tmp_path, family, rope_parameters=LLAMA3, head_dim=16)
    assert "llama.rope.scaling.type" not in fields_of(path)
    tensors = {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}
    waves = [2 * math.pi * 10000 ** (place / 8) for place in range(8)]
    for wave, factor in zip(waves, tensors["rope_freqs.weight"], strict=True):
        part = (64 / wave - 1.0) / (4.0 - 1.0)  # of the unscaled frequency, between the two bounds
        part = min(max(part, 0.0), 1.0)
        assert factor == pytest.approx(1 / ((1 - part) / 8.0 + part), rel=1e-5)


def test_layers_of_olmo2_and_its_tied_head_have_all_their_tensors(tmp_path: Path) -> None:
    path, _, _ = write(tmp_path, "olmo2", tie_word_embeddings=True)
    names = {tensor.name for tensor in gguf.GGUFReader(path).tensors}
    assert names == {"token_embd.weight", "output_norm.weight", "output.weight"} | {
        f"blk.{layer}.{part}.weight"
        for layer in range(2)
        for part in ("attn_q", "attn_k", "attn_v", "attn_output", "attn_q_norm", "attn_k_norm", "post_attention_norm",
                     "ffn_gate", "ffn_up", "ffn_down", "post_ffw_norm")
    }  # fmt: skip


def test_a_window_that_llama_cpp_does_not_know_bounds_the_context_and_is_told(tmp_path: Path) -> None:
    path, _, sink = write(tmp_path, "mistral", sliding_window=24)
    assert fields_of(path)["llama.context_length"] == 24
    assert any("window of 24 tokens" in getattr(event, "text", "") for event in sink.events)


NOT_WRITTEN = [
    ("gpt2", {}, "models of type 'gpt2'"),
    (
        "llama",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
        "by 'dynamic'",
    ),
    ("llama", {"rope_parameters": YARN | {"beta_fast": 16}}, "yarn with beta_fast = 16"),
    ("llama", {"rope_parameters": YARN | {"attention_factor": 2.0}}, "yarn with attention_factor = 2.0"),
    ("llama", {"hidden_act": "gelu"}, "activation is 'gelu'"),
    ("qwen3", {"rope_parameters": LLAMA3}, "by 'llama3'"),
    ("qwen3", {"attention_bias": True}, "biases"),
    ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob"),
    ("qwen3_moe", {"mlp_only_layers": [0]}, "experts in every layer"),
    ("gemma2", {"query_pre_attn_scalar": 4}, "query_pre_attn_scalar"),
    ("gemma2", {"final_logit_softcapping": None}, "soft caps"),
    ("gemma2", {"layer_types": ["full_attention"] * 2}, "a window in every other layer"),
    ("gemma3_text", {"layer_types": ["full_attention"] * 7}, "a window in five of six layers"),
    (
        "gemma3_text",
        {"rope_parameters": {"sliding_attention": LOCAL | {"rope_theta": 5e4}, "full_attention": LOCAL}},
        "local positions",
    ),
    ("smollm3", {"no_rope_layers": [1, 0, 1, 0]}, "no positions in every fourth layer"),
    ("phi3", {"head_dim": 16}, "heads of hidden_size"),
    ("olmo2", {"attention_bias": True}, "biases"),
]


@pytest.mark.parametrize(("family", "changes", "words"), NOT_WRITTEN)
def test_a_model_that_would_be_computed_otherwise_is_refused_by_name(
    family: str, changes: dict, words: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=words):
        write(tmp_path, family, **changes)
    assert not (tmp_path / "a.gguf").exists()


def test_a_weight_too_large_for_half_precision_is_refused(tmp_path: Path) -> None:
    def enlarge(model: PreTrainedModel) -> None:
        with torch.no_grad():
            model.model.layers[1].mlp.up_proj.weight[3, 4] = 1e5

    with pytest.raises(OutputError, match=r"blk\.1\.ffn_up\.weight") as caught:
        write(tmp_path, "llama", kind="f16", edit=enlarge)
    assert "bf16" in caught.value.hint
    write(tmp_path, "llama", kind="bf16", edit=enlarge)


@pytest.mark.parametrize("kind", ["f16", "bf16", "q8_0"])
@pytest.mark.parametrize("family", ["gemma2", "qwen3_moe"])
def test_rounding_passes_when_a_file_is_read_back(family: str, kind: str, tmp_path: Path) -> None:
    path, _, _ = write(tmp_path, family, kind=kind)
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
    assert kinds["blk.0.attn_q.weight"] == kind.upper()
    assert kinds["blk.0.attn_norm.weight"] == "F32"
    assert kinds.get("blk.0.ffn_gate_inp.weight", "F32") == "F32"


def test_facts_of_a_file(tmp_path: Path) -> None:
    facts = ModelFacts(name="my-phi3-run", license_name="mit", base_model="maker/thing-1B")
    path, _, _ = write(tmp_path, "llama", facts=facts)
    found = fields_of(path)
    assert found["general.name"] == "my-phi 3-run"  # llama.cpp would take it for a tokenizer of Phi-3
    assert found["general.license"] == "mit"
    assert found["general.base_model.count"] == 1
    assert found["general.base_model.0.name"] == "thing-1B"
    assert found["general.base_model.0.organization"] == "maker"
    assert found["general.base_model.0.repo_url"] == "https://huggingface.co/maker/thing-1B"


@pytest.mark.parametrize(("ignores", "name"), [(True, "llama-bpe"), (False, "dbrx")])
def test_words_that_are_tokens_are_cut_by_merges_where_the_tokenizer_does(
    ignores: bool, name: str, tmp_path: Path
) -> None:
    words = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

    def change(_model: PreTrainedModel) -> None:
        file = tmp_path / "model" / "tokenizer.json"
        content = json.loads(file.read_text())
        content["model"]["ignore_merges"] = ignores
        content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": words}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        ]}  # fmt: skip
        file.write_text(json.dumps(content))

    path, _, _ = write(tmp_path, "llama", edit=change)
    assert fields_of(path)["tokenizer.ggml.pre"] == name


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"attn_logit_softcapping": 2.0},
            r"attn_logit_softcapping 2, and transformers, which converts it, takes 50",
        ),
        ({"final_logit_softcapping": 5.0}, r"final_logit_softcapping 5, .* takes 30"),
    ],
)
def test_numbers_that_transformers_does_not_read_are_refused_where_they_are_others(
    changes: dict, words: str, tmp_path: Path
) -> None:
    usual = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
    path, _, sink = write(tmp_path, "gemma2", **(usual | changes))
    with pytest.raises(DataError, match=words):
        locate_model(str(path), revision=None, emit=sink)
    path, _, sink = write(tmp_path / "usual", "gemma2", **usual)
    locate_model(str(path), revision=None, emit=sink)


def test_a_folder_that_was_converted_before_such_numbers_were_looked_at_is_refused_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _, sink = write(tmp_path, "gemma2", attn_logit_softcapping=2.0, final_logit_softcapping=30.0)
    with monkeypatch.context() as earlier:
        earlier.setattr(gguf_import, "_refuse_unread", lambda *_: None)
        locate_model(str(path), revision=None, emit=sink)
    with pytest.raises(DataError, match="attn_logit_softcapping 2"):
        locate_model(str(path), revision=None, emit=sink)
