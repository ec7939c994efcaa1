"""Which class of transformers a model folder is opened with, and which weights of it no text reaches.

Models of text and images are trained on text alone. Some have a class for their language model that leaves the rest of the
files aside; all others are opened whole, and what text does not reach is frozen.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
import transformers
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PretrainedConfig,
    PreTrainedModel,
)

from sftcli.errors import DataError, SftError, UsageError, first_line
from sftcli.memory_faults import is_out_of_memory

AutoClass = type[AutoModelForCausalLM] | type[AutoModelForImageTextToText]

_BESIDE = "_beside_text"  # attribute of a model
_TRIED_TOKENS = 3
_ROUNDING = {torch.float32: 1e-5}  # part of the spread of logits
_COARSE_ROUNDING = 0.02
# model_type -> beginning of the names of its language model, for models that are opened as that alone: in transformers 5.24
# the class of the whole ends with an error, as it asks the language model for images.
_PREFIXES: Mapping[str, str] = {"llama4": "language_model"}


def auto_class(config: PretrainedConfig) -> AutoClass:
    """Return the class of transformers that opens a model with ``config`` and takes nothing of it for an error.

    Raises:
        UsageError: It reads its prompt apart from the text that it writes.
    """
    whole = _listed(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, config)
    text = _listed(MODEL_FOR_CAUSAL_LM_MAPPING, config)
    by_text = text is whole or config.model_type in _PREFIXES or _leaves_towers_out(text)
    if whole is None or (text is not None and by_text):
        return AutoModelForCausalLM
    if config.is_encoder_decoder or config.get_text_config().is_encoder_decoder:
        raise _unable(whole.__name__, "it reads its prompt with an encoder")
    return AutoModelForImageTextToText


def language_prefix(config: PretrainedConfig) -> str:
    """Return what the names of a language model begin with in files of a larger one, if its class does not know them; else ""."""
    return _PREFIXES.get(config.model_type, "")


def decoder_classes(config: PretrainedConfig, opener: AutoClass) -> list[type[PreTrainedModel]]:
    """Return the known classes of transformers that a model with ``config`` and its decoder are of."""
    found = (_listed(opener._model_mapping, config), _listed(MODEL_MAPPING, config.get_text_config()))
    return [kind for kind in found if kind is not None]


def opens_whole(model: PreTrainedModel) -> bool:
    """Return whether ``model`` is one of text and images, with all that belongs to it."""
    whole = _listed(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, model.config)
    return whole is not None and isinstance(model, whole)


def beside_text(model: nn.Module) -> frozenset[str]:
    """Return the names of the weights of ``model`` that no text reaches, of those that ``freeze_beside_text`` has seen."""
    names: frozenset[str] = vars(model).get(_BESIDE, frozenset())
    return names


@torch.no_grad()
def freeze_beside_text(model: PreTrainedModel) -> None:
    """Let nothing of a model of text and images train that no text reaches, such as its vision tower.

    Raises:
        UsageError: It does not read text alone.
    """
    if not opens_whole(model):
        return
    skipped = _layers_without_text(model)
    parts = (model.get_decoder(), model.get_input_embeddings(), model.get_output_embeddings())
    reached = {id(weight) for part in parts if part is not None for weight in part.parameters()}
    reached -= {id(weight) for layer in skipped for weight in layer.parameters()}
    weights = {name: weight for name, weight in model.named_parameters() if id(weight) not in reached}
    for weight in weights.values():
        weight.requires_grad_(False)
    vars(model)[_BESIDE] = frozenset(weights)


@torch.no_grad()
def require_causal(model: PreTrainedModel) -> None:
    """Make sure that ``model`` predicts a token from those before it, and does not see it beforehand.

    Raises:
        UsageError: What comes behind a token changes what follows it, or the model's class ends with an error.
    """
    first, second, third, *_ = _plain_ids(model.config)
    was_training = model.training
    model.train(False)
    one, other = (_logits(model, [first, second, last]) for last in (second, third))
    model.train(was_training)
    before = one[:, :2].float()
    # Experts get another number of tokens, and their products another shape, which moves what they round.
    tolerance = _ROUNDING.get(one.dtype, _COARSE_ROUNDING)
    if (before - other[:, :2].float()).norm() > tolerance * (before - before.mean(-1, keepdim=True)).norm():
        raise _unable(type(model).__name__, "its attention sees the tokens that it is to predict")


def not_finite(model: PreTrainedModel) -> DataError:
    """Return the error for a model whose logits or losses are no numbers: what came of them would look like a result."""
    return DataError(
        f"{type(model).__name__} computes non-finite numbers in {str(model.dtype).removeprefix('torch.')}",
        hint="its weights or its configuration may be damaged: copy or download the model again, or use an earlier checkpoint; "
        "in 16 bits numbers may be too large: try fp32",
    )


def _logits(model: PreTrainedModel, ids: list[int]) -> torch.Tensor:
    """Return the logits (1, T, V) of a text.

    Raises:
        UsageError: The model's class ends with an error.
    """
    with its_own_errors(model, len(ids)):
        logits: torch.Tensor = model(
            input_ids=torch.tensor([ids], device=model.device), use_cache=False
        ).logits
    return logits


@contextmanager
def its_own_errors(model: PreTrainedModel, count: int) -> Iterator[None]:
    """Turn what the class of ``model`` raises over a text of ``count`` tokens into an error that names it.

    Raises:
        UsageError: It ends with an error.
    """
    try:
        yield
    except Exception as error:  # a class of others raises what it likes
        if isinstance(error, SftError) or is_out_of_memory(error):
            raise
        raise UsageError(
            f"{type(model).__name__} of transformers {transformers.__version__} ends with an error on a text of {count} tokens: "
            f"{type(error).__name__}: {first_line(error)}",
            hint="its configuration may not fit to it, or another release of transformers can compute it",
        ) from error


def _listed(mapping: Mapping[Any, Any], config: PretrainedConfig) -> type[PreTrainedModel] | None:
    found: object = mapping.get(type(config), None)
    return found if isinstance(found, type) else None


def _leaves_towers_out(kind: type[PreTrainedModel] | None) -> bool:
    """Return whether a language model's class lists the weights of its vision tower as those that it does without."""
    return any(
        "vis" in pattern for pattern in getattr(kind, "_keys_to_ignore_on_load_unexpected", None) or ()
    )


def _layers_without_text(model: PreTrainedModel) -> list[nn.Module]:
    """Return the layers of the decoder that text alone passes by, such as those that attend to an image.

    Raises:
        UsageError: Text alone does not go through.
    """
    layers = [
        layer
        for name, stack in model.get_decoder().named_modules()
        if isinstance(stack, nn.ModuleList) and not any(map(str.isdigit, name.split(".")))
        for layer in stack
    ]
    seen: set[nn.Module] = set()
    handles = [layer.register_forward_pre_hook(lambda layer, _: seen.add(layer)) for layer in layers]
    try:
        model(input_ids=torch.tensor([_plain_ids(model.config)], device=model.device), use_cache=False)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise _unable(
            type(model).__name__, f"it does not read text without an image: {first_line(error)}"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    return [layer for layer in layers if layer not in seen]


def _plain_ids(config: PretrainedConfig) -> list[int]:
    """Return tokens of text: a configuration names those that stand for images, among others."""
    named = {
        value
        for part in (config, config.get_text_config())
        for value in vars(part).values()
        if type(value) is int
    }
    free = (token for token in range(len(named) + _TRIED_TOKENS) if token not in named)
    return [*islice(free, _TRIED_TOKENS)]


def _unable(kind: str, why: str) -> UsageError:
    return UsageError(
        f"{kind} cannot be trained on text: {why}",
        hint="name a model that continues a text, such as smollm2-135m",
    )
