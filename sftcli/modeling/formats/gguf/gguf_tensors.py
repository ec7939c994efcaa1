"""The tensors of a model under the names, and in the order of rows, that GGUF files have."""

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, cast

import gguf
import numpy as np
import torch

from sftcli.errors import UsageError
from sftcli.modeling.formats.gguf.gguf_families import CONVERT_HINT, Family, rope_kind, rope_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_ROPE_FACTORS = "rope_freqs.weight"
_EXPERTS = re.compile(r"model\.layers\.(\d+)\.mlp\.experts\.(gate_up_proj|down_proj)")


def named_tensors(model: "PreTrainedModel", family: Family) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors of ``model``. A head that is the embedding is left out, as readers expect, but of a few families.

    The numbers decide that: a model may have a head of its own although its configuration says that it has none.

    Raises:
        UsageError: The format has no name for one.
    """
    config = model.config
    names = gguf.get_tensor_name_map(family.architecture, config.num_hidden_layers)
    state = model.state_dict()
    if rope_kind(rope_of(config)) == "llama3":
        yield _ROPE_FACTORS, _rope_factors(model)
    for name, tensor in state.items():
        if name == _HEAD and not family.keeps_head and _are_equal(tensor, state[_EMBEDDING]):
            continue
        if experts := _EXPERTS.fullmatch(name):
            yield from _experts(int(experts[1]), experts[2], tensor)
            continue
        found = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise UsageError(
                f"this {config.model_type!r} model cannot be written as GGUF here: the format has no name for {name}",
                hint=CONVERT_HINT,
            )
        yield found, _as_stored(name, tensor, config, family)


def _as_stored(name: str, tensor: torch.Tensor, config: "PretrainedConfig", family: Family) -> torch.Tensor:
    if family.pairs_side_by_side and (heads := heads_of(name, config)):
        return pairs_side_by_side(tensor, heads)
    if family.gain and name.endswith("norm.weight"):
        return tensor.float() + family.gain
    return tensor


def heads_of(name: str, config: "PretrainedConfig") -> int:
    """Return how many heads the rows of a projection to queries or keys belong to; 0 of all else."""
    if ".self_attn.q_proj." in name:
        return int(config.num_attention_heads)
    return int(config.num_key_value_heads) if ".self_attn.k_proj." in name else 0


def _experts(layer: int, part: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the matrices of all experts, (experts, out, in), each kind in a tensor of its own."""
    if part == "down_proj":
        yield f"blk.{layer}.ffn_down_exps.weight", tensor
        return
    gate, up = tensor.chunk(2, dim=1)
    yield f"blk.{layer}.ffn_gate_exps.weight", gate
    yield f"blk.{layer}.ffn_up_exps.weight", up


def _rope_factors(model: "PreTrainedModel") -> torch.Tensor:
    """Return what llama3 divides the frequencies of positions by, each its own."""
    rotary = cast("torch.nn.Module", model.base_model.rotary_emb)
    scaled = cast("torch.Tensor", rotary.inv_freq).float().cpu()
    theta = float(rope_of(model.config)["rope_theta"])
    plain = torch.pow(theta, -torch.arange(len(scaled), dtype=torch.float32) / len(scaled))
    return plain / scaled


def _are_equal(left: torch.Tensor, right: torch.Tensor) -> bool:
    return left.data_ptr() == right.data_ptr() or torch.equal(left, right)


def pairs_side_by_side(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Reorder the rows of a rotary projection: a pair that turns together stands side by side, not a half apart."""
    half = tensor.shape[0] // heads // 2
    return tensor.reshape(heads, 2, half, *tensor.shape[1:]).swapaxes(1, 2).reshape(tensor.shape)


class StoredNumbers:
    """The numbers of a GGUF file under the names, and in the order of rows, that a model has: what ``named_tensors`` did, undone."""

    def __init__(
        self, stored: Mapping[str, gguf.ReaderTensor], config: "PretrainedConfig", family: Family
    ) -> None:
        self._stored, self._config, self._family = stored, config, family
        self._names = gguf.get_tensor_name_map(family.architecture, config.num_hidden_layers)

    def __call__(self, name: str) -> torch.Tensor:
        """Return the float32 numbers of the model's tensor ``name``.

        Raises:
            KeyError: The file has none.
        """
        if experts := _EXPERTS.fullmatch(name):
            parts = ("down",) if experts[2] == "down_proj" else ("gate", "up")
            return torch.cat([self._read(f"blk.{experts[1]}.ffn_{part}_exps.weight") for part in parts], 1)
        found = self._names.get_name(name, try_suffixes=(".weight", ".bias")) or name
        if name == _HEAD and found not in self._stored:
            return self(_EMBEDDING)
        return _as_model(name, self._read(found), self._config, self._family)

    def _read(self, name: str) -> torch.Tensor:
        tensor = self._stored[name]
        return torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32))


def _as_model(name: str, tensor: torch.Tensor, config: "PretrainedConfig", family: Family) -> torch.Tensor:
    if family.pairs_side_by_side and (heads := heads_of(name, config)):
        return halves_apart(tensor, heads)
    if family.gain and name.endswith("norm.weight"):
        return tensor - family.gain
    return tensor


def halves_apart(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Undo ``pairs_side_by_side``."""
    half = tensor.shape[0] // heads // 2
    return tensor.reshape(heads, half, 2, *tensor.shape[1:]).swapaxes(1, 2).reshape(tensor.shape)
