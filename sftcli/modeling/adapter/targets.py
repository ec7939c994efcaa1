"""Names of layers that an adapter may sit on, and of its tensors in files."""

from collections import Counter
from collections.abc import Collection, Iterable, Sequence

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sftcli.config.schema.adapter import AUTO_TARGETS
from sftcli.errors import UsageError
from sftcli.suggest import did_you_mean

ADAPTER_NAME = "default"  # what peft calls the one adapter of a model; it is not part of the names in files
PREFIX = "base_model.model."
ROWS = ".token_adapter.trainable_tokens_delta"  # ends the name of rows of tokens, in files and in memory


def target_names(model: PreTrainedModel, wanted: Iterable[str]) -> list[str]:
    """Return the last parts of the names of the linear layers in ``wanted``, or full names if they clash.

    Raises:
        UsageError: There is no such layer, or it is the head and shares its weights with the embeddings.
    """
    layers = _linear_layers(model)
    head = name_of_head(model)
    short = {name.rpartition(".")[2] for name in layers if name != head}
    found: set[str] = set()
    for item in wanted:
        if item == AUTO_TARGETS:
            body = [name for name in layers if name != head]
            found |= set(body) if head.rpartition(".")[2] in short else short
        elif any(_means(item, name) for name in layers):
            found.add(item)
        else:
            known = sorted({name.rpartition(".")[2] for name in layers})
            raise UsageError(
                f"adapter.target_modules names {item!r}, and {type(model).__name__} has no such linear layer",
                hint=did_you_mean(item, known) or f"it has {', '.join(known)}",
            )
    if head and any(_means(item, head) for item in found):
        refuse_tied(model, head)
    return sorted(found)


def token_rows(model: PreTrainedModel, ids: Collection[int], targets: Sequence[str]) -> dict[str, list[int]]:
    """Return the layers in which the rows of the tokens ``ids`` train, as peft names them; a tied head follows the embeddings.

    ``targets``, as ``target_names`` returns them, have matrices of their own.

    Raises:
        UsageError: peft would compute something else than the model with these rows.
    """
    if not ids:
        return {}
    head = model.get_output_embeddings()
    is_tied = _is_tied(model)
    if any(_means(item, name_of_head(model)) for item in targets):
        raise _no_rows(
            model, "adapter.target_modules names the output head, whose rows of tokens train by themselves"
        )
    if getattr(head, "bias", None) is not None:
        raise _no_rows(model, "the output head has a bias, which peft leaves out beside rows of tokens")
    if bool(getattr(model.config.get_text_config(), "tie_word_embeddings", False)) != is_tied:
        raise _no_rows(
            model, "its configuration ties the output head to the embeddings, and its weights do not"
        )
    layers = [name_of_embedding(model)] + ([] if is_tied or head is None else [name_of_head(model)])
    return {layer: sorted(ids) for layer in layers}


def _no_rows(model: PreTrainedModel, why: str) -> UsageError:
    return UsageError(
        f"model.new_tokens cannot be trained with an adapter of {type(model).__name__}: {why}",
        hint="train the whole model, or leave model.new_tokens out",
    )


def file_name(parameter: str) -> str:
    """Return the name that peft gives a parameter of an adapter in a file."""
    name = parameter.removesuffix(".weight") if ".lora_magnitude_vector." in parameter else parameter
    if name.endswith(f".{ADAPTER_NAME}"):
        return PREFIX + name.removesuffix(f".{ADAPTER_NAME}")
    stem, _, last = name.rpartition(".")
    return f"{PREFIX}{stem.removesuffix(f'.{ADAPTER_NAME}')}.{last}"


def matching_layers(model: PreTrainedModel, items: Sequence[str]) -> dict[str, nn.Module]:
    """Return the linear layers that ``items``, as ``target_names`` returns them, mean."""
    return {
        name: layer
        for name, layer in _linear_layers(model).items()
        if any(_means(item, name) for item in items)
    }


def name_of_head(model: PreTrainedModel) -> str:
    """Return the name of the layer that makes scores of tokens; "" where there is none."""
    return _name_of(model, model.get_output_embeddings())


def name_of_embedding(model: PreTrainedModel) -> str:
    """Return the name of the layer that makes vectors of tokens."""
    return _name_of(model, model.get_input_embeddings())


def refuse_tied(model: PreTrainedModel, name: str) -> None:
    """Raise where head and token embeddings of ``model`` are the same weights.

    Raises:
        UsageError: They are; ``name`` is what the adapter would sit on.
    """
    if _is_tied(model):
        raise UsageError(
            f"{name} shares its weights with the token embeddings, so an adapter on it cannot be merged: that would "
            "change both",
            hint="leave it out of adapter.target_modules; auto does",
        )


def weights_left_alone(model: PreTrainedModel) -> tuple[float, list[str]]:
    """Return the share of a model's layer weights without an adapter, and the names of the largest of them.

    Embeddings and the head are not counted.
    """
    beside = [model.get_input_embeddings(), model.get_output_embeddings()]
    beside += [module for module in model.modules() if isinstance(module, nn.Embedding)]
    others = {id(weight) for module in beside if module is not None for weight in module.parameters()}
    sizes: Counter[str] = Counter()
    total = 0
    for name, weight in model.named_parameters():
        if weight.ndim < 2 or id(weight) in others or ".lora_" in name:
            continue
        total += weight.numel()
        if ".base_layer." not in name:
            sizes[".".join(name.removesuffix(".weight").split(".")[-2:])] += weight.numel()
    return sizes.total() / max(1, total), [name for name, _ in sizes.most_common()]


def _is_tied(model: PreTrainedModel) -> bool:
    """Return whether output head and token embeddings are the same weights."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    return head is not None and getattr(head, "weight", None) is getattr(embedding, "weight", head)


def _linear_layers(model: PreTrainedModel) -> dict[str, nn.Module]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear | Conv1D)}


def _means(item: str, name: str) -> bool:
    return name == item or name.endswith(f".{item}")


def _name_of(model: PreTrainedModel, wanted: object) -> str:
    return next((name for name, layer in model.named_modules() if layer is wanted), "")
