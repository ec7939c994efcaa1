"""What each family needs in a GGUF file: a row a family, with the numbers that llama.cpp reads for its architecture.

llama.cpp has much of a family in its own code (which layers have no positions, how experts are weighted). A row names what it
takes for granted, and a model that is otherwise is refused, because a file that opens and computes something else is worse than none.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import gguf

from sftcli.errors import UsageError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

Config = Any  # of transformers; its keys depend on the family
Rope = Mapping[str, Any]
CONVERT_HINT = "export with --to hf and convert the folder with convert_hf_to_gguf.py of llama.cpp"
_GELU, _SILU = "gelu_pytorch_tanh", "silu"
_YARN_DEFAULTS = {"beta_fast": (None, 32), "beta_slow": (None, 1), "truncate": (None, True)}
_YARN_ABSENT = ("attention_factor", "mscale", "mscale_all_dim")
_LOCAL_THETA = 10000.0  # of layers with a window in Gemma 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """How models of a type are written.

    ``numbers`` are methods of the writer with what they are given; ``must`` are conditions, under the words for them.
    """

    architecture: gguf.MODEL_ARCH
    pairs_side_by_side: bool = False  # rows of queries and keys that turn together
    gain: float = 0.0  # what the gains of norms lack
    activation: str = _SILU
    ropes: frozenset[str] = frozenset({"default"})
    turns_part: bool = False  # of a head
    biases: bool = False
    keeps_window: bool = False
    keeps_head: bool = False  # also one that is the embedding
    numbers: Mapping[str, Callable[[Config], Any]] = field(default_factory=dict)
    must: Mapping[str, Callable[[Config], bool]] = field(default_factory=dict)


_ALL_ROPES = frozenset({"default", "linear", "llama3", "yarn"})
_LLAMA = Family(architecture=gguf.MODEL_ARCH.LLAMA, pairs_side_by_side=True, ropes=_ALL_ROPES, biases=True)
_OF_HEAD_SIZE = {
    "heads of hidden_size / num_attention_heads numbers": lambda config: not _has_own_head_size(config)
}
_GEMMA_SCALE = {
    "query_pre_attn_scalar is the size of a head": lambda config: (
        config.query_pre_attn_scalar == _gemma_scalar(config)
    )
}
FAMILIES: Mapping[str, Family] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": Family(
        architecture=gguf.MODEL_ARCH.QWEN2, ropes=frozenset({"default", "yarn"}), biases=True,
        must=_OF_HEAD_SIZE,
    ),
    "qwen3": Family(architecture=gguf.MODEL_ARCH.QWEN3, ropes=frozenset({"default", "yarn"})),
    "qwen3_moe": Family(
        architecture=gguf.MODEL_ARCH.QWEN3MOE,
        ropes=frozenset({"default", "yarn"}),
        numbers={
            "add_expert_count": lambda config: config.num_experts,
            "add_expert_used_count": lambda config: config.num_experts_per_tok,
            "add_expert_feed_forward_length": lambda config: config.moe_intermediate_size,
        },
        must={
            "experts in every layer": lambda config: config.decoder_sparse_step == 1 and not config.mlp_only_layers,
            "norm_topk_prob": lambda config: config.norm_topk_prob,
        },
    ),
    "gemma2": Family(
        architecture=gguf.MODEL_ARCH.GEMMA2,
        gain=1.0,
        activation=_GELU,
        keeps_window=True,
        numbers={
            "add_sliding_window": lambda config: config.sliding_window,
            "add_attn_logit_softcapping": lambda config: config.attn_logit_softcapping,
            "add_final_logit_softcapping": lambda config: config.final_logit_softcapping,
        },
        must=_GEMMA_SCALE | {
            "a window in every other layer": lambda config: _has_windows(config, every=2),
            "soft caps": lambda config: config.attn_logit_softcapping and config.final_logit_softcapping,
            "a head that is the embedding": lambda config: config.tie_word_embeddings,
            "attention that looks back": lambda config: not getattr(config, "use_bidirectional_attention", None),
        },
    ),
    "gemma3_text": Family(
        architecture=gguf.MODEL_ARCH.GEMMA3,
        gain=1.0,
        activation=_GELU,
        ropes=frozenset({"default", "linear"}),
        keeps_window=True,
        numbers={
            "add_sliding_window": lambda config: config.sliding_window,
            "add_rope_freq_base_swa": lambda config: config.rope_parameters["sliding_attention"]["rope_theta"],
        },
        must=_GEMMA_SCALE | {
            "a window in five of six layers": lambda config: _has_windows(config, every=6),
            "no soft caps": lambda config: not (
                getattr(config, "attn_logit_softcapping", None) or getattr(config, "final_logit_softcapping", None)
            ),
            "attention that looks back": lambda config: not getattr(config, "use_bidirectional_attention", None),
            f"local positions of base {_LOCAL_THETA:.0f}": lambda config: _is_plain(
                config.rope_parameters["sliding_attention"], _LOCAL_THETA
            ),
        },
    ),
    "phi3": Family(architecture=gguf.MODEL_ARCH.PHI3, turns_part=True, must=_OF_HEAD_SIZE),
    "smollm3": Family(
        architecture=gguf.MODEL_ARCH.SMOLLM3,
        pairs_side_by_side=True,
        ropes=frozenset({"default", "yarn"}),
        must={
            "no positions in every fourth layer": lambda config: [bool(one) for one in config.no_rope_layers]
            == [bool((layer + 1) % 4) for layer in range(config.num_hidden_layers)],
        },
    ),
    "granite": Family(
        architecture=gguf.MODEL_ARCH.GRANITE,
        pairs_side_by_side=True,
        biases=True,
        numbers={
            "add_logit_scale": lambda config: config.logits_scaling,
            "add_residual_scale": lambda config: config.residual_multiplier,
            "add_embedding_scale": lambda config: config.embedding_multiplier,
            "add_attention_scale": lambda config: config.attention_multiplier,
        },
    ),
    "olmo2": Family(architecture=gguf.MODEL_ARCH.OLMO2, keeps_head=True, must=_OF_HEAD_SIZE),
}  # fmt: skip


def check_family(model: "PreTrainedModel") -> Family:
    """Return the family of a model that can be written.

    Raises:
        UsageError: It cannot: the message says what of it.
    """
    config = model.config
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise UsageError(
            f"models of type {config.model_type!r} cannot be written as GGUF here; {', '.join(FAMILIES)} can",
            hint=CONVERT_HINT,
        )
    for fault in _faults(model, family):
        raise UsageError(
            f"this {config.model_type!r} model cannot be written as GGUF here: {fault}", hint=CONVERT_HINT
        )
    return family


def _faults(model: "PreTrainedModel", family: Family) -> Iterator[str]:
    config = model.config
    kind = rope_kind(rope_of(config))
    if kind not in family.ropes:
        yield f"it scales its rotary positions by {kind!r}"
    yield from _faults_of_yarn(rope_of(config))
    if rotary_size_of(config) != head_size_of(config) and not family.turns_part:
        yield "its rotary positions turn a part of each head"
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    if activation != family.activation:
        yield f"its activation is {activation!r}, not {family.activation!r}"
    if not family.biases and any(name.endswith(".bias") for name in model.state_dict()):
        yield "it has biases"
    yield from (
        f"llama.cpp takes {what} for granted" for what, holds in family.must.items() if not holds(config)
    )


def _faults_of_yarn(rope: Rope) -> Iterator[str]:
    if rope_kind(rope) != "yarn":
        return
    for key, known in _YARN_DEFAULTS.items():
        if rope.get(key) not in known:
            yield f"yarn with {key} = {rope[key]}"
    yield from (f"yarn with {key} = {rope[key]}" for key in _YARN_ABSENT if rope.get(key) is not None)


def rope_of(config: "PretrainedConfig") -> Rope:
    """Return the rotary positions; where types of layers have their own, those of layers that see everything."""
    rope = config.rope_parameters or {}
    whole: Rope = rope.get("full_attention", rope)
    return whole


def rope_kind(rope: Rope) -> str:
    """Return how positions are scaled."""
    return str(rope.get("rope_type", "default"))


def window_of(config: "PretrainedConfig") -> int | None:
    """Return beyond how many tokens a layer does not look, if one does not."""
    types: Sequence[str] | None = getattr(config, "layer_types", None)
    if types is not None and "sliding_attention" not in types:
        return None
    window: int | None = getattr(config, "sliding_window", None)
    return window


def head_size_of(config: "PretrainedConfig") -> int:
    """Return the numbers of a head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def rotary_size_of(config: "PretrainedConfig") -> int:
    """Return how many numbers of a head turn with its position."""
    return int(head_size_of(config) * rope_of(config).get("partial_rotary_factor", 1.0))


def _has_own_head_size(config: Config) -> bool:
    return bool(head_size_of(config) * config.num_attention_heads != config.hidden_size)


def _has_windows(config: Config, *, every: int) -> bool:
    """Return whether each layer has a window but those whose number, counted from one, ``every`` divides."""
    kinds = [
        "sliding_attention" if (layer + 1) % every else "full_attention"
        for layer in range(config.num_hidden_layers)
    ]
    return bool(config.sliding_window) and list(config.layer_types) == kinds


def _gemma_scalar(config: Config) -> float:
    """Return what llama.cpp divides scores by the root of; it knows the largest models by their number of layers."""
    largest = {"gemma2": 46, "gemma3_text": 62}[config.model_type]
    if config.num_hidden_layers == largest:
        return float(config.hidden_size // config.num_attention_heads)
    return float(head_size_of(config))


def _is_plain(rope: Rope, theta: float) -> bool:
    return rope_kind(rope) == "default" and rope.get("rope_theta") == theta
