"""Write a model folder as one GGUF file, as llama.cpp opens it: weights, tokenizer, template and stop tokens.

The format, its names of tensors and its quantization are those of the package ``gguf``. What a family needs beside them
(which weights are reordered, which numbers describe it) is in ``gguf_families``. What was written is read back.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import gguf

from sftcli.events import Notice, Session
from sftcli.modeling.formats.gguf.gguf_families import (
    Family,
    check_family,
    head_size_of,
    rope_kind,
    rope_of,
    rotary_size_of,
    window_of,
)
from sftcli.modeling.formats.gguf.gguf_kinds import FILE_TYPES, GgufType, types_of
from sftcli.modeling.formats.gguf.gguf_tensors import named_tensors
from sftcli.modeling.formats.gguf.gguf_tokenizer import add_tokenizer
from sftcli.modeling.formats.gguf.gguf_write import read_back, write_tensors
from sftcli.modeling.tokenizer.chat_tokenizer import HFChatTokenizer

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

# In a name llama.cpp takes this for a tokenizer of Phi-3, and strips spaces behind its tokens, or does not open the file.
_SPOKEN_FOR = re.compile(r"(phi)-?(3)", re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """What a file says of its model; "" is not known."""

    name: str
    license_name: str = ""
    base_model: str = ""


def write_gguf(
    path: Path,
    model: "PreTrainedModel",
    tokenizer: HFChatTokenizer,
    *,
    source: Path,
    kind: GgufType,
    facts: ModelFacts,
    session: Session,
) -> None:
    """Write ``model`` to the new file ``path``, and read it back.

    Args:
        path: Where to; the caller makes it whole or absent.
        model: Of one of the families that can be written.
        tokenizer: Of the model; its stop tokens are those of the file.
        source: The model folder, with ``tokenizer.json`` and the template.
        kind: Of the matrices, but for those that stay higher; see ``types_of``.
        facts: For the metadata.
        session: Told after each tensor, and asked whether to stop.

    Raises:
        UsageError: The family, or the kind of tokenizer, is not among those that can be written.
        OutputError: A weight is not what it was: too large for the type, or not what the disk gives back.
        StoppedError: A stop was asked for.
    """
    family = check_family(model)
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[family.architecture])
    try:
        writer.add_type(gguf.GGUFType.MODEL)
        writer.add_size_label(gguf.size_label(sum(weight.numel() for weight in model.parameters()), 0, 0, 0))
        add_facts(writer, facts)
        writer.add_file_type(FILE_TYPES[kind][1])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        _add_shape(writer, model.config, family, session)
        add_tokenizer(writer, tokenizer, source, rows=model.config.vocab_size)
        tensors = dict(named_tensors(model, family))
        write_tensors(writer, tensors, types_of(tensors, kind), name=path.name, session=session)
    finally:
        writer.close()
    read_back(path, tensors)


def add_facts(writer: gguf.GGUFWriter, facts: ModelFacts) -> None:
    """Write what a file says of its model."""
    writer.add_name(_SPOKEN_FOR.sub(r"\1 \2", facts.name))
    if facts.license_name:
        writer.add_license(facts.license_name)
    if facts.base_model:
        organization, _, name = facts.base_model.rpartition("/")
        writer.add_base_model_count(1)
        writer.add_base_model_name(0, name)
        if organization:
            writer.add_base_model_organization(0, organization)
            writer.add_base_model_repo_url(0, f"https://huggingface.co/{facts.base_model}")


def _add_shape(writer: gguf.GGUFWriter, config: "PretrainedConfig", family: Family, session: Session) -> None:
    writer.add_context_length(_context(config, family, session))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_key_length(head_size_of(config))
    writer.add_value_length(head_size_of(config))
    writer.add_rope_dimension_count(rotary_size_of(config))
    _add_rope(writer, config)
    for method, value in family.numbers.items():
        getattr(writer, method)(value(config))


def _context(config: "PretrainedConfig", family: Family, session: Session) -> int:
    """Return how many tokens are computed as the model does it: llama.cpp ignores the window of most families."""
    context: int = config.max_position_embeddings
    window = window_of(config)
    if family.keeps_window or window is None or window >= context:
        return context
    session.emit(
        Notice(
            text=f"llama.cpp does not know this model's window of {window} tokens: the file states a context of {window}"
        )
    )
    return window


def _add_rope(writer: gguf.GGUFWriter, config: "PretrainedConfig") -> None:
    """Write positions; those of llama3 are a tensor."""
    rope = rope_of(config)
    writer.add_rope_freq_base(rope.get("rope_theta", 10000.0))
    if (kind := rope_kind(rope)) not in ("linear", "yarn"):
        return
    writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
    writer.add_rope_scaling_factor(rope["factor"])
    if kind == "yarn":
        original = rope.get("original_max_position_embeddings") or config.max_position_embeddings
        writer.add_rope_scaling_orig_ctx_len(original)
