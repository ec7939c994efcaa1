"""Write a LoRA adapter as a GGUF file that llama.cpp puts on its base while it serves.

Beside what each such file has, it says ``adapter.type`` and ``adapter.lora.alpha``, and it has two matrices for each that is
changed: ``NAME.lora_a``, (rank, in), and ``NAME.lora_b``, (out, rank). llama.cpp adds alpha / rank times b a.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import gguf
import torch

from sftcli.errors import DataError, UsageError
from sftcli.events import Session
from sftcli.modeling.adapter.adapter import read_tensors
from sftcli.modeling.adapter.folder import LoraForm, read_form
from sftcli.modeling.formats.gguf.gguf_export import ModelFacts, add_facts
from sftcli.modeling.formats.gguf.gguf_families import Family, check_family
from sftcli.modeling.formats.gguf.gguf_kinds import FILE_TYPES, GgufType
from sftcli.modeling.formats.gguf.gguf_tensors import halves_apart, heads_of, pairs_side_by_side
from sftcli.modeling.formats.gguf.gguf_write import read_back, write_tensors

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

_A, _B = ".lora_A.weight", ".lora_B.weight"
_MERGE = "merge it: sft export MODEL --to gguf"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pair:
    """The matrices of one layer, in the model's order of rows: ``a``, (rank, in), and ``b``, (out, rank)."""

    a: torch.Tensor
    b: torch.Tensor


def write_gguf_adapter(
    path: Path,
    folder: Path,
    base: "PreTrainedModel",
    *,
    kind: GgufType,
    facts: ModelFacts,
    session: Session,
) -> None:
    """Write the adapter in ``folder``, which belongs to ``base``, to the new file ``path``, and read it back.

    Raises:
        UsageError: llama.cpp has no such base, or no form for what the adapter has: the message says what.
        ConsentError, NotFoundError, DataError: As in ``load_adapter``.
        OutputError: A number is too large for ``kind``.
        StoppedError: A stop was asked for.
    """
    family, form = check_family(base), read_form(folder)
    pairs = _pairs(folder, form)
    tensors = {
        f"{stored}.lora_{part}": tensor
        for name, pair in pairs.items()
        for stored, part, tensor in _stored(name, pair, base.config, family)
    }
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[family.architecture])
    try:
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(form.alpha))
        writer.add_file_type(FILE_TYPES[kind][1])
        add_facts(writer, facts)
        types = dict.fromkeys(tensors, FILE_TYPES[kind][0])
        write_tensors(writer, tensors, types, name=path.name, session=session)
    finally:
        writer.close()
    read_back(path, tensors)


class StoredChanges:
    """What the adapter of a GGUF file adds to the weights of its base, under their names in the model."""

    def __init__(self, path: Path, base: "PreTrainedModel") -> None:
        reader = gguf.GGUFReader(path)
        self._stored = {tensor.name: tensor for tensor in reader.tensors}
        self._alpha = float(reader.fields[gguf.Keys.Adapter.LORA_ALPHA].contents())
        self._config, self._family = base.config, check_family(base)
        self._names = _names(self._config, self._family)

    def __call__(self, name: str, own: torch.Tensor) -> torch.Tensor:
        """Return the weight ``name`` of the base, ``own``, with what the file adds, in float32."""
        stored = self._names.get_name(name, try_suffixes=(".weight", ".bias"))
        if f"{stored}.lora_a" not in self._stored:
            return own.float()
        a, b = (self._read(f"{stored}.lora_{part}") for part in "ab")
        heads = heads_of(name, self._config) if self._family.pairs_side_by_side else 0
        return own.float() + self._alpha / len(a) * ((halves_apart(b, heads) if heads else b) @ a)

    def _read(self, name: str) -> torch.Tensor:
        tensor = self._stored[name]
        return torch.tensor(gguf.dequantize(tensor.data, tensor.tensor_type), dtype=torch.float32)


def _stored(
    name: str, pair: _Pair, config: "PretrainedConfig", family: Family
) -> tuple[tuple[str, str, torch.Tensor], ...]:
    """Return both matrices of the layer ``name`` with the format's name; rows are reordered where those of the base are."""
    weight = f"{name}.weight"
    stored = _names(config, family).get_name(weight, try_suffixes=(".weight",))
    if stored is None:
        raise UsageError(f"the format has no name for {weight}, which this adapter changes", hint=_MERGE)
    heads = heads_of(weight, config) if family.pairs_side_by_side else 0
    return (stored, "a", pair.a), (stored, "b", pairs_side_by_side(pair.b, heads) if heads else pair.b)


def _names(config: "PretrainedConfig", family: Family) -> gguf.TensorNameMap:
    return gguf.get_tensor_name_map(family.architecture, config.num_hidden_layers)


def _pairs(folder: Path, form: LoraForm) -> dict[str, _Pair]:
    """Return the matrices of each layer; with ``rslora`` b has the root of the rank that llama.cpp does not know.

    Raises:
        UsageError: There is more in the folder than such pairs.
    """
    for fault, is_there in {
        "has the magnitudes of DoRA": form.dora,
        "changes experts that are stored in one tensor": bool(form.parameters),
        "has rows of new tokens": bool(form.token_ids),
        "has biases": form.bias,
        "is for layers with transposed weights": form.fan_in_fan_out,
    }.items():
        if is_there:
            raise _refused(folder, fault)
    tensors = read_tensors(folder)
    if others := sorted(name for name in tensors if not name.endswith((_A, _B))):
        raise _refused(folder, f"has {others[0]}")
    layers = {name.removesuffix(end) for end in (_A, _B) for name in tensors if name.endswith(end)}
    if alone := sorted(layer for layer in layers if not {layer + _A, layer + _B} <= tensors.keys()):
        raise DataError(f"{folder} lacks a matrix of {alone[0]}", hint="copy the folder again")
    found = {
        layer: _Pair(a=tensors[layer + _A].float(), b=tensors[layer + _B].float()) for layer in sorted(layers)
    }
    if not form.rslora:
        return found
    return {name: _Pair(a=pair.a, b=pair.b * math.sqrt(len(pair.a))) for name, pair in found.items()}


def _refused(folder: Path, fault: str) -> UsageError:
    return UsageError(f"the adapter {folder} {fault}, which an adapter of llama.cpp cannot have", hint=_MERGE)
