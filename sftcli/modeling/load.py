"""Load a model folder completely or not at all."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, assert_never, cast

import torch
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.core_model_loading import PrefixChange

from sftcli.config.schema.adapter import Quantize
from sftcli.config.schema.run import Attention
from sftcli.config.schema.training import Checkpointing
from sftcli.errors import DataError, Location, MismatchError, ResourceError, UsageError
from sftcli.foreign import foreign_file
from sftcli.memory_faults import MemoryErrors
from sftcli.modeling.activations import checkpoint_activations
from sftcli.modeling.architecture import (
    auto_class,
    decoder_classes,
    freeze_beside_text,
    language_prefix,
    opens_whole,
)
from sftcli.modeling.attention import (
    attention_of,
    check_known,
    in_text,
    is_named,
    name_attention,
    use_named_attention,
)
from sftcli.modeling.config_values import config_value
from sftcli.modeling.formats.file_weights import FileWeights, Together, WholeOnlyError, leave_in_files
from sftcli.modeling.formats.folder_check import check_model_folder
from sftcli.modeling.formats.remote_code import refuse_code
from sftcli.modeling.formats.source_tensors import conversions_of
from sftcli.modeling.libraries import quiet_libraries
from sftcli.modeling.modern_lm.model import register
from sftcli.runtime import is_finite

_FAULT = "cannot be loaded"
_HINT = "copy or download the folder again; a newer transformers may know more kinds of models"
_SHOWN = 3
_MOST_LEFT = 0.1  # share of the weights that may stay in 16 bit where 4 bits are asked for


def count_parameters(model: torch.nn.Module) -> tuple[int, int]:
    """Return how many numbers the model holds and how many of them train; a shared tensor counts once."""
    parameters = list(model.parameters())
    return sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)


def load_model(
    folder: Path,
    *,
    dtype: torch.dtype,
    device: torch.device,
    attention: Attention = Attention.AUTO,
    checkpointing: Checkpointing = Checkpointing.OFF,
    quantize: Quantize = Quantize.NONE,
    trusts_code: bool = False,
) -> PreTrainedModel:
    """Load every tensor of the model in ``folder`` as ``dtype`` on ``device``, in evaluation mode.

    By ``auto`` attention is torch's, where the model's class knows it, else that of the class (``own_attention``). Flash
    attention, which computes in 16 bits alone, waits for ``use_named_attention``.
    Opens no pickle file, asks no network, and runs no code from the folder unless ``trusts_code`` (``remote_code.allow_code``).
    With ``quantize`` the linear layers are kept in that form, on CUDA alone, and compute in ``dtype``.

    Raises:
        NotFoundError, UsageError: The folder is no model folder (see ``check_model_folder``).
        ConsentError: The folder brings its own model code, or only pickle weights.
        DataError: A file is damaged, the model is of a kind that transformers does not know, or weights are not finite.
        MismatchError: Tensors are missing, left over, or have other shapes than the configuration says.
        ResourceError: The device's memory is too small.
        UsageError: Gradient checkpointing or an attention is asked for and the model's code does not know it; or it is a
            model of text and images that does not read text alone; or ``quantize`` would leave experts alone.
    """
    quiet_libraries()
    check_model_folder(folder)
    if not trusts_code:
        refuse_code(folder)
    if quantize is not Quantize.NONE:
        refuse_fused_experts(folder, quantize, trusts_code=trusts_code)
    packed = _quantization(quantize, dtype, device)
    model = _from_pretrained(folder, dtype, attention, packed, trusts_code=trusts_code)
    with MemoryErrors(lambda: _no_room_on(device)):
        torch.nn.Module.to(model, device)
    tensors = chain(model.named_parameters(), _bounded_buffers(model))
    _refuse_nonfinite(folder, model, [name for name, tensor in tensors if not _is_finite(tensor)])
    freeze_beside_text(model)
    if checkpointing.is_on:
        checkpoint_activations(model, checkpointing)
    return model


def load_in_parts(
    folder: Path,
    *,
    dtype: torch.dtype,
    together: Together,
    attention: Attention = Attention.AUTO,
    checkpointing: Checkpointing = Checkpointing.OFF,
) -> tuple[PreTrainedModel, FileWeights]:
    """Return the model in ``folder`` as ``load_model`` gives it, on the CPU, with its parameters left in the files.

    Each process of ``together`` looks at its part of the numbers; all of them must call it.

    Raises:
        WholeOnlyError: It has to be loaded whole.
        SftError: As ``load_model``.
    """
    quiet_libraries()
    check_model_folder(folder)
    refuse_code(folder)
    model = _from_pretrained(folder, dtype, attention, {"device_map": "meta"}, trusts_code=False)
    if opens_whole(model) or language_prefix(model.config):
        raise WholeOnlyError("it is a part of a model of text and images")
    weights = leave_in_files(model, folder)
    names = {parameter: name for name, parameter in model.named_parameters()}
    spoilt = [names[one] for one in weights.spoilt(lambda piece: not is_finite(piece), together)]
    spoilt += [name for name, buffer in _bounded_buffers(model) if not _is_finite(buffer)]
    _refuse_nonfinite(folder, model, spoilt)
    if checkpointing.is_on:
        checkpoint_activations(model, checkpointing)
    return model, weights


def _no_room_on(device: torch.device) -> ResourceError:
    return ResourceError(
        f"the model does not fit in the memory of {device}", hint="choose a smaller model or a larger device"
    )


def take_names(model: PreTrainedModel, folder: Path) -> None:
    """Let ``model``, loaded from a checkpoint, be saved under the names and in the form of the model in ``folder``.

    A checkpoint has the names that transformers uses in memory, where experts are fused and prefixes are gone.
    """
    vars(model)["_weight_conversions"] = load_layout(folder)._weight_conversions


def load_layout(folder: Path) -> PreTrainedModel:
    """Return the model in ``folder`` without its numbers: its class, its names, and how they were made of those in the files.

    Raises:
        DataError: A file is damaged, or the model is of a kind that transformers does not know.
    """
    with foreign_file(folder, _FAULT, hint=_HINT):
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        layout: PreTrainedModel = auto_class(config).from_pretrained(
            folder, device_map="meta", local_files_only=True, trust_remote_code=False
        )
    _keep_prefix(layout, config)
    return layout


def own_attention(model: PreTrainedModel) -> str:
    """Return the notice for a model whose attention is not torch's; "" for any other."""
    has_own = attention_of(model) == "eager" and not is_named(model)
    if not has_own or not config_value(model, "num_attention_heads"):
        return ""
    return (
        f"{type(model).__name__} has no sdpa: its own attention (eager) is used, whose memory grows with the square of "
        "a row's length"
    )


def _from_pretrained(
    folder: Path, dtype: torch.dtype, attention: Attention, packed: Mapping[str, Any], *, trusts_code: bool
) -> PreTrainedModel:
    register()
    with foreign_file(folder, _FAULT, hint=_HINT):
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=trusts_code)
        opener = auto_class(config)
        asked = None
        if attention is not Attention.AUTO:
            for kind in decoder_classes(config, opener):
                check_known(kind, attention)
            asked = None if attention.is_flash else in_text(config, attention)
        loaded: object = opener.from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation=asked,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # so that the shapes can be named; nothing mismatched is let through
            output_loading_info=True,
            trust_remote_code=trusts_code,
            local_files_only=True,
            **packed,
        )
    model, info = cast("tuple[PreTrainedModel, dict[str, Any]]", loaded)
    model.config.return_dict = True  # what is computed is asked for by name, whatever the file says
    _keep_prefix(model, config)
    if prefix := language_prefix(config):  # what is outside of the language model is kept beside it
        info["unexpected_keys"] = {name for name in info["unexpected_keys"] if name.startswith(f"{prefix}.")}
    _refuse_partial(folder, info)
    name_attention(model, attention)
    if not attention.is_flash:
        use_named_attention(model)
    _train_every_embedding(model)
    return model


def _keep_prefix(model: PreTrainedModel, config: PretrainedConfig) -> None:
    """Let a language model that was loaded from a larger one be saved under its names there."""
    if prefix := language_prefix(config):
        conversions = [*conversions_of(model), PrefixChange(prefix_to_remove=prefix)]
        vars(model)["_weight_conversions"] = conversions


def refuse_fused_experts(folder: Path, quantize: Quantize, *, trusts_code: bool = False) -> None:
    """Raise where much of the model in ``folder`` is in tensors of all experts of a layer, which stay as they are in ``quantize``.

    bitsandbytes packs linear layers. The configuration tells the shapes; no weight is read.

    Raises:
        UsageError: That is so.
    """
    register()
    with foreign_file(folder, _FAULT, hint=_HINT), torch.device("meta"):
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=trusts_code)
        opener: Any = auto_class(config)
        model: PreTrainedModel = opener.from_config(config, trust_remote_code=trusts_code)
    weights = dict(model.named_parameters())
    owners = {
        name.rpartition(".")[0] for name, weight in weights.items() if weight.ndim > 2
    }  # convolutions are small
    fused = sum(weight.numel() for name, weight in weights.items() if name.rpartition(".")[0] in owners)
    share = fused / sum(weight.numel() for weight in weights.values())
    if share > _MOST_LEFT:
        raise UsageError(
            f"{share:.0%} of the weights of {type(model).__name__} are experts in one tensor a layer, which stay in 16 bit where "
            f"adapter.quantize is {quantize}",
            hint="train a plain adapter: leave adapter.quantize none",
            location=Location(key="adapter.quantize"),
        )


def _quantization(quantize: Quantize, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Return what ``from_pretrained`` is asked for. In 4 bits it is QLoRA's (Dettmers et al. 2023): NF4, its scales quantized too."""
    match quantize:
        case Quantize.NONE:
            return {}
        case Quantize.FOUR_BIT:
            from transformers import BitsAndBytesConfig

            form = BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=dtype,
            )
        case _:
            assert_never(quantize)
    return {"quantization_config": form, "device_map": {"": device}}


def _train_every_embedding(model: PreTrainedModel) -> None:
    """Let the padding token's embedding learn: where it is the stop token as well, as in SmolLM2, it stands in every row.

    torch leaves the gradient of ``padding_idx`` out. Real padding has no loss and gives no gradient anyway.
    """
    embedding = model.get_input_embeddings()
    if isinstance(embedding, torch.nn.Embedding):
        embedding.padding_idx = None


def _refuse_partial(folder: Path, info: Mapping[str, Any]) -> None:
    config = folder / "config.json"
    if shapes := sorted(info["mismatched_keys"]):
        named = [f"{name} is {tuple(found)} instead of {tuple(wanted)}" for name, found, wanted in shapes]
        raise MismatchError(f"{config} and the weights disagree about shapes: {_some(named)}")
    if missing := sorted(info["missing_keys"]):
        raise MismatchError(f"the weights in {folder} lack tensors that {config} requires: {_some(missing)}")
    if extra := sorted(info["unexpected_keys"]):
        raise MismatchError(
            f"the weights in {folder} hold tensors that {config} does not define: {_some(extra)}"
        )


def _bounded_buffers(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the buffers with names: masks are among them, and may hold minus infinity."""
    return ((name, one.clamp(min=0)) for name, one in model.named_buffers() if one.is_floating_point())


def _is_finite(tensor: torch.Tensor) -> bool:
    return not tensor.is_floating_point() or is_finite(tensor)


def _refuse_nonfinite(folder: Path, model: PreTrainedModel, spoilt: Sequence[str]) -> None:
    """Refuse a model that computes nothing: what came of it would look like a result."""
    if spoilt:
        word = str(model.dtype).removeprefix("torch.")
        hint = "use an earlier checkpoint, or copy or download the folder again"
        if model.dtype == torch.float16:
            hint = f"values above 65504 do not fit in float16: use bf16 or f32; otherwise {hint}"
        raise DataError(
            f"the weights in {folder} hold non-finite values in {word}: {_some(sorted(spoilt))}", hint=hint
        )


def _some(names: list[str]) -> str:
    rest = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + rest
