"""Write a model folder as one GGUF file, as llama.cpp opens it: weights, tokenizer, template and stop tokens.

The format, its names of tensors and its quantization are those of the package ``gguf``. What a family needs beside them
(which weights are reordered, which numbers describe it) is here, for Llama and Qwen2. Any other family is refused, because
a file that opens and computes something else is worse than none.
"""

import errno
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import gguf
import numpy as np
import torch

from sftcli.errors import StoppedError, UsageError
from sftcli.events import Progressed, Session
from sftcli.json_files import read_json
from sftcli.modeling.tokenizer.chat_tokenizer import HFChatTokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

GgufType = Literal["f32", "f16", "bf16", "q8_0"]
FAMILIES: Mapping[str, str] = {"llama": "llama", "qwen2": "qwen2"}  # model_type -> architecture

_TYPES = {
    "f32": (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    "f16": (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    "bf16": (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "q8_0": (gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
}
_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_Q8_BLOCK = 32  # numbers that share a scale
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SHORT_FORMS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)|"


def check_family(model: "PreTrainedModel") -> None:
    """Raise unless the model is of a family that can be written.

    Raises:
        UsageError: It is not, or scales its positions in a way that this does not write.
    """
    config = model.config
    if config.model_type not in FAMILIES:
        raise UsageError(
            f"models of type {config.model_type!r} cannot be written as GGUF here; {' and '.join(FAMILIES)} can",
            hint="export with --to hf and convert the folder with convert_hf_to_gguf.py of llama.cpp",
        )
    rope = config.rope_parameters or {}
    if (kind := rope.get("rope_type", "default")) != "default":
        raise UsageError(
            f"the model scales its rotary positions by {kind!r}, which cannot be written as GGUF here",
            hint="export with --to hf and convert the folder with convert_hf_to_gguf.py of llama.cpp",
        )


def write_gguf(
    path: Path,
    model: "PreTrainedModel",
    tokenizer: HFChatTokenizer,
    *,
    source: Path,
    kind: GgufType,
    name: str,
    license_name: str = "",
    session: Session,
) -> None:
    """Write ``model`` to the new file ``path``.

    Args:
        path: Where to; the caller makes it whole or absent.
        model: Of one of ``FAMILIES``.
        tokenizer: Of the model; its stop tokens are those of the file.
        source: The model folder, with ``tokenizer.json`` and the template.
        kind: Of the matrices. Vectors are float32, and so are few enough that it costs nothing.
        name: Of the model, in the metadata.
        license_name: Of the model, in the metadata, where it is known.
        session: Told after each tensor, and asked whether to stop.

    Raises:
        UsageError: The family, or the kind of tokenizer, is not among those that can be written.
        StoppedError: A stop was asked for.
    """
    check_family(model)
    writer = gguf.GGUFWriter(path, FAMILIES[model.config.model_type])
    try:
        _add_facts(writer, model, name=name, license_name=license_name)
        writer.add_file_type(_TYPES[kind][1])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        _add_shape(writer, model)
        _add_tokenizer(writer, tokenizer, source, rows=model.config.vocab_size)
        _add_tensors(writer, model, kind)
        for done, total in _write_tensors(writer, model, kind):
            session.emit(Progressed(task=f"writing {path.name}", done=done, total=total, unit="tensors"))
            if session.stop.requested():
                raise StoppedError
    finally:
        writer.close()


def _add_facts(writer: gguf.GGUFWriter, model: "PreTrainedModel", *, name: str, license_name: str) -> None:
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    numbers = sum(tensor.numel() for _name, tensor in _named(model))
    writer.add_size_label(gguf.size_label(numbers, 0, 0, 0))
    if license_name:
        writer.add_license(license_name)


def _add_shape(writer: gguf.GGUFWriter, model: "PreTrainedModel") -> None:
    config = model.config
    heads = config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base((config.rope_parameters or {}).get("rope_theta", 10000.0))
    writer.add_vocab_size(config.vocab_size)
    if config.model_type == "llama":
        writer.add_rope_dimension_count(head_size)
        writer.add_key_length(head_size)
        writer.add_value_length(head_size)


def _add_tokenizer(writer: gguf.GGUFWriter, tokenizer: HFChatTokenizer, source: Path, *, rows: int) -> None:
    """Write tokens, merges, template and stop tokens; ``rows`` may exceed the tokens, as in Qwen2."""
    content = read_json(source / "tokenizer.json")
    ids: dict[str, int] = dict(content["model"].get("vocab", {})) if _is_byte_level(content) else {}
    if not ids:
        raise UsageError(
            f"the tokenizer in {source} is not a byte-level BPE, the only kind that can be written as GGUF here",
            hint="export with --to hf and convert the folder with convert_hf_to_gguf.py of llama.cpp",
        )
    added = {token["content"]: token["id"] for token in content["added_tokens"]}
    ids |= added
    texts = {token: text for text, token in ids.items()}
    control = tokenizer.control_ids
    kinds = {
        token: gguf.TokenType.CONTROL if token in control else gguf.TokenType.USER_DEFINED
        for token in added.values()
    }
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_word_cutter(content, source))
    writer.add_token_list([texts.get(token, f"[PAD{token}]") for token in range(rows)])
    writer.add_token_types(
        [
            kinds.get(token, gguf.TokenType.NORMAL if token in texts else gguf.TokenType.UNUSED)
            for token in range(rows)
        ]
    )
    special = gguf.SpecialVocab(source, load_merges=True)
    writer.add_token_merges(special.merges)
    if special.chat_template is not None:
        writer.add_chat_template(special.chat_template)
    writer.add_add_bos_token(bool(tokenizer.text_prefix))
    for kind, add in (("bos", writer.add_bos_token_id), ("unk", writer.add_unk_token_id)):
        if (token := special.special_token_ids.get(kind)) is not None:
            add(token)
    writer.add_pad_token_id(tokenizer.pad_id)
    _add_stop_tokens(writer, tokenizer)


def _add_stop_tokens(writer: gguf.GGUFWriter, tokenizer: HFChatTokenizer) -> None:
    """Write the stop tokens: the format has three names for them, and readers stop at each."""
    first = tokenizer.eos_id if tokenizer.eos_id in tokenizer.stop_ids else min(tokenizer.stop_ids)
    writer.add_eos_token_id(first)
    for add, token in zip(
        (writer.add_eot_token_id, writer.add_eom_token_id), sorted(tokenizer.stop_ids - {first}), strict=False
    ):
        add(token)


def _is_byte_level(content: Mapping[str, object]) -> bool:
    model, decoder = content.get("model"), content.get("decoder")
    return (
        isinstance(model, dict)
        and model.get("type") == "BPE"
        and not model.get("byte_fallback")
        and isinstance(decoder, dict)
        and decoder.get("type") == "ByteLevel"
    )


def _word_cutter(content: Mapping[str, object], source: Path) -> str:
    """Return the format's name of how the tokenizer cuts text into words.

    Raises:
        UsageError: It has none that is known here; another name would give other tokens without a word.
    """
    outer = content.get("pre_tokenizer")
    steps = outer.get("pretokenizers", [outer]) if isinstance(outer, dict) else []
    found = tuple(_shown_step(step) for step in steps)
    known = {
        ("words",): "gpt-2",
        ("digits", "words"): "smollm",
        (_SHORT_FORMS + _WORDS % r"\p{N}", "bytes"): "qwen2",
        (_SHORT_FORMS + _WORDS % r"\p{N}{1,3}", "bytes"): "llama-bpe",
    }
    if found not in known:
        raise UsageError(
            f"the tokenizer in {source} uses a pre-tokenizer with no GGUF name known here",
            hint="export with --to hf and convert the folder with convert_hf_to_gguf.py of llama.cpp",
        )
    return known[found]


def _shown_step(step: Mapping[str, object]) -> str:
    pattern = step.get("pattern")
    match step.get("type"):
        case "ByteLevel" if not step.get("add_prefix_space"):
            return "words" if step.get("use_regex", True) else "bytes"
        case "Digits" if step.get("individual_digits"):
            return "digits"
        case "Split" if (
            isinstance(pattern, dict) and step.get("behavior") == "Isolated" and not step.get("invert")
        ):
            return str(pattern.get("Regex"))
        case _:
            return "unknown"


def _add_tensors(writer: gguf.GGUFWriter, model: "PreTrainedModel", kind: GgufType) -> None:
    """Announce every tensor: the file lists them before their numbers."""
    for name, tensor in _named(model):
        made = _type_of(tensor, kind)
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
    writer: gguf.GGUFWriter, model: "PreTrainedModel", kind: GgufType
) -> Iterator[tuple[int, int]]:
    """Write one tensor after the other, so that one is in memory in its new form; yield how many of all are done."""
    listed = list(_named(model))
    for done, (_name, tensor) in enumerate(listed, start=1):
        values = np.ascontiguousarray(tensor.detach().float().cpu().numpy())
        try:
            writer.write_tensor_data(gguf.quantize(values, _type_of(tensor, kind)))
        except OSError as error:  # numpy tells that less was written, not why
            raise OSError(error.errno or errno.ENOSPC, str(error)) from error
        yield done, len(listed)


def _named(model: "PreTrainedModel") -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors under their names in the format. A head that is the embedding is left out, as readers expect.

    The numbers decide that: a model may have a head of its own although its configuration says that it has none.
    """
    config = model.config
    architecture = gguf.MODEL_ARCH.LLAMA if config.model_type == "llama" else gguf.MODEL_ARCH.QWEN2
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    state = model.state_dict()
    for name, tensor in state.items():
        if name == _HEAD and _are_equal(tensor, state[_EMBEDDING]):
            continue
        found = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert found is not None, name
        if config.model_type == "llama" and ".self_attn.q_proj." in name:
            tensor = _pairs_side_by_side(tensor, config.num_attention_heads)
        if config.model_type == "llama" and ".self_attn.k_proj." in name:
            tensor = _pairs_side_by_side(tensor, config.num_key_value_heads)
        yield found, tensor


def _are_equal(left: torch.Tensor, right: torch.Tensor) -> bool:
    return left.data_ptr() == right.data_ptr() or torch.equal(left, right)


def _pairs_side_by_side(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Reorder the rows of a rotary projection: a pair that turns together stands side by side, not a half apart."""
    half = tensor.shape[0] // heads // 2
    return tensor.reshape(heads, 2, half, *tensor.shape[1:]).swapaxes(1, 2).reshape(tensor.shape)


def _type_of(tensor: torch.Tensor, kind: GgufType) -> gguf.GGMLQuantizationType:
    if tensor.ndim == 1:
        return gguf.GGMLQuantizationType.F32
    if kind == "q8_0" and tensor.shape[-1] % _Q8_BLOCK:
        return gguf.GGMLQuantizationType.F16  # as llama.cpp does where blocks do not fit
    return _TYPES[kind][0]
