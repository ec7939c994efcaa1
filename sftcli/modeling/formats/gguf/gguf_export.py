"""Write a model folder as one GGUF file, as llama.cpp opens it: weights, tokenizer, template and stop tokens.

The format, its names of tensors and its quantization are those of the package ``gguf``. What a family needs beside them
(which weights are reordered, which numbers describe it) is in ``gguf_families``. What was written is read back.
"""

import errno
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import gguf
import numpy as np
import torch

from sftcli.errors import OutputError, StoppedError
from sftcli.events import Notice, Progressed, Session
from sftcli.modeling.formats.gguf.gguf_families import (
    Family,
    check_family,
    head_size_of,
    rope_kind,
    rope_of,
    rotary_size_of,
    window_of,
)
from sftcli.modeling.formats.gguf.gguf_tensors import named_tensors
from sftcli.modeling.formats.gguf.gguf_tokenizer import add_tokenizer
from sftcli.modeling.tokenizer.chat_tokenizer import HFChatTokenizer

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

GgufType = Literal["f32", "f16", "bf16", "q8_0"]

_TYPES = {
    "f32": (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    "f16": (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    "bf16": (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "q8_0": (gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
}
# What rounding may move a number by, as a part of the largest one of its block or of itself.
_ROUNDING = {
    gguf.GGMLQuantizationType.F32: 0.0,
    gguf.GGMLQuantizationType.F16: 2**-11,
    gguf.GGMLQuantizationType.BF16: 2**-8,
    gguf.GGMLQuantizationType.Q8_0: 1 / 127,
}
_LEAST_F16 = 2**-25  # half of the smallest number that float16 has beside zero
# In a name llama.cpp takes this for a tokenizer of Phi-3, and strips spaces behind its tokens, or does not open the file.
_SPOKEN_FOR = re.compile(r"(phi)-?(3)", re.IGNORECASE)
_ROUTER = "ffn_gate_inp"  # chooses experts, and costs little
_Q8_BLOCK = 32  # numbers that share a scale


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
        kind: Of the matrices. Vectors are float32, and so are few enough that it costs nothing.
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
        _add_facts(writer, model, facts)
        writer.add_file_type(_TYPES[kind][1])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        _add_shape(writer, model.config, family, session)
        add_tokenizer(writer, tokenizer, source, rows=model.config.vocab_size)
        tensors = dict(named_tensors(model, family))
        _add_tensors(writer, tensors, kind)
        for done, _ in enumerate(_write_tensors(writer, tensors, kind), start=1):
            session.emit(
                Progressed(task=f"writing {path.name}", done=done, total=len(tensors), unit="tensors")
            )
            if session.stop.requested():
                raise StoppedError
    finally:
        writer.close()
    _read_back(path, tensors)


def _add_facts(writer: gguf.GGUFWriter, model: "PreTrainedModel", facts: ModelFacts) -> None:
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(_SPOKEN_FOR.sub(r"\1 \2", facts.name))
    writer.add_size_label(gguf.size_label(sum(weight.numel() for weight in model.parameters()), 0, 0, 0))
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


def _add_tensors(writer: gguf.GGUFWriter, tensors: Mapping[str, torch.Tensor], kind: GgufType) -> None:
    """Announce every tensor: the file lists them before their numbers."""
    for name, tensor in tensors.items():
        made = _type_of(name, tensor, kind)
        size = gguf.quant_shape_to_byte_shape(tuple(tensor.shape), made)
        is_plain = made in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16)
        dtype = np.dtype(np.float16 if made == gguf.GGMLQuantizationType.F16 else np.float32)
        writer.add_tensor_info(
            name,
            tuple(tensor.shape) if is_plain else size,
            dtype if is_plain else np.dtype(np.uint8),
            math.prod(size),
            raw_dtype=None if is_plain else made,
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()


def _write_tensors(
    writer: gguf.GGUFWriter, tensors: Mapping[str, torch.Tensor], kind: GgufType
) -> Iterator[None]:
    """Write one tensor after the other, so that one is in memory in its new form."""
    for name, tensor in tensors.items():
        try:
            with np.errstate(over="ignore"):  # what is too large is found when it is read back
                made = gguf.quantize(_numbers(tensor), _type_of(name, tensor, kind))
            writer.write_tensor_data(made)
        except OSError as error:  # numpy tells that less was written, not why
            raise OSError(error.errno or errno.ENOSPC, str(error)) from error
        yield


def _type_of(name: str, tensor: torch.Tensor, kind: GgufType) -> gguf.GGMLQuantizationType:
    if tensor.ndim == 1 or _ROUTER in name:
        return gguf.GGMLQuantizationType.F32
    if kind == "q8_0" and tensor.shape[-1] % _Q8_BLOCK:
        return gguf.GGMLQuantizationType.F16  # as llama.cpp does where blocks do not fit
    return _TYPES[kind][0]


def _numbers(tensor: torch.Tensor) -> np.ndarray:
    return np.ascontiguousarray(tensor.detach().float().cpu().numpy())


def _read_back(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Compare each tensor of the file with the model's, one after the other.

    Raises:
        OutputError: One is missing, or differs by more than its type rounds.
    """
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    for name, tensor in tensors.items():
        found = stored.get(name)
        if found is None or not _is_alike(_numbers(tensor), found):
            raise OutputError(
                f"{path.name} would not hold {name} as the model has it",
                hint="its numbers may be too large for --dtype f16; choose --dtype bf16 or f32",
            )


def _is_alike(numbers: np.ndarray, stored: gguf.ReaderTensor) -> bool:
    found = gguf.dequantize(stored.data, stored.tensor_type)
    scale = np.abs(numbers)
    if stored.tensor_type == gguf.GGMLQuantizationType.Q8_0:
        blocks = scale.reshape(-1, _Q8_BLOCK)
        scale = np.broadcast_to(blocks.max(axis=1, keepdims=True), blocks.shape).reshape(numbers.shape)
    limit = scale * _ROUNDING[stored.tensor_type] + (
        _LEAST_F16 if stored.tensor_type == gguf.GGMLQuantizationType.F16 else 0
    )
    return found.shape == numbers.shape and bool((np.abs(found - numbers) <= limit).all())
