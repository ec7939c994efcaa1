"""The configuration of a Modern LLM decoder, as transformers keeps it."""

import math
from collections.abc import Callable, Mapping
from typing import ClassVar

from transformers import PreTrainedConfig

MODEL_TYPE = "modern-lm"
MAX_SIZE = 2**24

Limit = tuple[Callable[[object], bool], str]  # whether a value fits, and how that is said


def _whole(value: object, least: int) -> bool:
    return type(value) is int and least <= value <= MAX_SIZE


def _number(value: object) -> float:
    """Return ``value`` where it is a finite number, else NaN, which is in no range."""
    is_number = type(value) is float or (type(value) is int and abs(value) <= MAX_SIZE**2)
    return value if is_number and math.isfinite(value) else math.nan  # type: ignore[arg-type, return-value]


_SIZE: Limit = (lambda value: _whole(value, 1), "a whole number above 0")
_POSITIVE: Limit = (lambda value: _number(value) > 0, "a number above 0")
_FLAG: Limit = (lambda value: isinstance(value, bool), "true or false")
LIMITS: Mapping[str, Limit] = {
    **dict.fromkeys(("vocab_size", "d_model", "n_layers", "n_heads", "ffn_hidden_size", "max_seq_len"), _SIZE),
    "rmsnorm_eps": (lambda value: 0 <= _number(value) < 1, "a number from 0 to below 1"),
    "dropout": (lambda value: 0 <= _number(value) <= 1, "a number from 0 to 1"),
    "initializer_range": (lambda value: _number(value) >= 0, "a number that is not below 0"),
    "rotary_base": _POSITIVE,
    "rotary_scale": (lambda value: value is None or _number(value) > 0, "a number above 0, or nothing"),
    "use_rope": _FLAG,
    "use_attention_sinks": _FLAG,
    "num_attention_sinks": (lambda value: _whole(value, 0), "a whole number"),
    "use_swiglu": _FLAG,
    "swiglu_multiplier": _POSITIVE,
    "use_gqa": _FLAG,
    "gqa_groups": (lambda value: value is None or _whole(value, 1), "a whole number above 0, or nothing"),
    "tie_word_embeddings": _FLAG,
}  # fmt: skip


def misfit(value: object, limit: Limit) -> str:
    """Return "is VALUE, expected ..." on one line; "" where ``value`` fits."""
    fits, told = limit
    return "" if fits(value) else f"is {' '.join(repr(value).split()):.60}, expected {told}"


class ModernLMConfig(PreTrainedConfig):
    """The configuration in a ``.pt`` file, under the same names.

    ``rope_theta`` and ``rope_scaling`` are called ``rotary_base`` and ``rotary_scale``: transformers gives the
    original names another meaning.

    Raises:
        ValueError: A value is none that a model can be made with (``LIMITS``).
    """

    model_type = MODEL_TYPE
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values", "cache"]
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "d_model",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
        "intermediate_size": "ffn_hidden_size",
        "max_position_embeddings": "max_seq_len",
    }

    def __init__(
        self,
        *,
        vocab_size: int = 50257,
        d_model: int = 768,
        n_layers: int = 12,
        n_heads: int = 12,
        ffn_hidden_size: int = 3072,
        max_seq_len: int = 1024,
        rmsnorm_eps: float = 1e-5,
        dropout: float = 0.0,
        initializer_range: float = 0.02,
        rotary_base: float = 10000.0,
        rotary_scale: float | None = None,
        use_rope: bool = True,
        use_attention_sinks: bool = True,
        num_attention_sinks: int = 2,
        use_swiglu: bool = True,
        swiglu_multiplier: float = 2.0,
        use_gqa: bool = False,
        gqa_groups: int | None = None,
        **kwargs: object,
    ) -> None:
        self.vocab_size = vocab_size
        self.d_model = d_model
        self.n_layers = n_layers
        self.n_heads = n_heads
        self.ffn_hidden_size = ffn_hidden_size
        self.max_seq_len = max_seq_len
        self.rmsnorm_eps = rmsnorm_eps
        self.dropout = dropout
        self.initializer_range = initializer_range
        self.rotary_base = rotary_base
        self.rotary_scale = rotary_scale
        self.use_rope = use_rope
        self.use_attention_sinks = use_attention_sinks
        self.num_attention_sinks = num_attention_sinks
        self.use_swiglu = use_swiglu
        self.swiglu_multiplier = swiglu_multiplier
        self.use_gqa = use_gqa
        self.gqa_groups = gqa_groups
        kwargs.setdefault("tie_word_embeddings", True)
        super().__init__(**kwargs)  # type: ignore[arg-type]
        for key, limit in LIMITS.items():
            if fault := misfit(getattr(self, key), limit):
                raise ValueError(f"{key} {fault}")

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.d_model // self.n_heads

    @property
    def num_key_value_heads(self) -> int:
        """Heads of keys and values."""
        return self.gqa_groups if self.use_gqa and self.gqa_groups else self.n_heads

    @property
    def sinks(self) -> int:
        """Sinks that every query sees."""
        return self.num_attention_sinks if self.use_attention_sinks else 0
