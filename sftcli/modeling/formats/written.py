"""Verify written files against the intended tensors: names, shapes, types, and sampled values, bit for bit.

The bytes are read from the files by themselves, with none of what wrote them.
"""

import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from sftcli.errors import StorageError
from sftcli.modeling.formats.source_tensors import SourceTensors, place_finder
from sftcli.modeling.formats.stored_tensors import TYPES, StoredTensor, stored_tensors, tensors_of_file

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_SAMPLES = 256  # numbers of a tensor
_SEARCHED = 1 << 24  # numbers of tensors that were cut up, among which those of the parts are looked for


def check_model_written(
    folder: Path,
    model: "PreTrainedModel",
    tensors: Mapping[str, torch.Tensor],
    source: SourceTensors,
    *,
    unchanged: Collection[str],
    is_whole: bool,
    memory: Mapping[str, object],
) -> None:
    """Compare a model folder with its intended tensors, and with the source folder.

    Args:
        folder: As it was written.
        model: Says which tensor of the folder is which.
        tensors: Of the model, by its own names, as they were to be written.
        source: What lies beside the model there has to be in ``folder`` unchanged.
        unchanged: Names of tensors of the model that have to be bit for bit those of ``source``.
        is_whole: ``folder`` must hold every name that the source's files hold.
        memory: Of each tensor that of the numbers it was made of: the same for names of one tensor.

    Raises:
        StorageError: They differ.
    """
    written, place = stored_tensors(folder), place_finder(model)
    for name, stored in source.beside.items():
        _require(name in written, folder, f"{name} is missing")
        _compare_stored(folder, name, written[name], stored)
    for name, found in source.places.items():
        if found.name in unchanged and name in written and written[name].dtype == source.stored[name].dtype:
            _compare_stored(folder, name, written[name], source.stored[name])
    parts: dict[str, list[str]] = {}
    converted = set()
    for name in written.keys() - source.beside.keys():
        of_model = place(name)
        if of_model is None:
            raise _differs(folder, f"{name} was written, but the model has no such tensor")
        parts.setdefault(of_model.name, []).append(name)
        converted |= {of_model.name} if of_model.is_converted else set()
    _refuse_absent(folder, memory, parts)
    if is_whole:
        absent = source.places.keys() - written.keys()
        lost = sorted(name for name in absent if source.places[name].name in parts)
        _require(not lost, folder, f"{lost[:1]} is stored under another name")
    room = _SEARCHED
    for name, files in parts.items():
        tensor = tensors[name]
        if name not in converted and len(files) == 1:
            _compare(folder, files[0], written[files[0]], tensor)
            continue
        _compare_parts(folder, name, [written[file] for file in files], tensor, search=tensor.numel() <= room)
        room -= tensor.numel()


def check_file_written(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Compare a safetensors file with its intended tensors.

    Raises:
        StorageError: They differ.
    """
    written = tensors_of_file(path)
    for name in tensors.keys() ^ written.keys():
        raise _differs(path, f"{name} is missing" if name in tensors else f"{name} is unexpected")
    for name, tensor in tensors.items():
        _compare(path, name, written[name], tensor)


def _refuse_absent(folder: Path, memory: Mapping[str, object], parts: Mapping[str, list[str]]) -> None:
    """Raise where a tensor is in no file; of those that share their ``memory`` one is enough."""
    there = {memory[name] for name in parts}
    for name, numbers in memory.items():
        _require(name in parts or numbers in there, folder, f"{name} is missing")


def _compare(where: Path, name: str, stored: StoredTensor, tensor: torch.Tensor) -> None:
    _require(
        stored.shape == tuple(tensor.shape),
        where,
        f"{name} is {stored.shape} instead of {tuple(tensor.shape)}",
    )
    _require(
        stored.dtype == TYPES[tensor.dtype],
        where,
        f"{name} is {stored.dtype} instead of {TYPES[tensor.dtype]}",
    )
    chosen = _chosen(tensor.numel())
    values = tensor.detach().reshape(-1)[chosen.to(tensor.device)].cpu().contiguous()
    ours = values.view(torch.uint8).numpy().reshape(len(chosen), -1)
    _require(np.array_equal(ours, _sampled(stored)), where, f"{name} holds other numbers")


def _compare_stored(where: Path, name: str, stored: StoredTensor, original: StoredTensor) -> None:
    alike = (stored.shape, stored.dtype) == (original.shape, original.dtype)
    _require(
        alike and np.array_equal(_sampled(stored), _sampled(original)),
        where,
        f"{name} is not that of the source",
    )


def _compare_parts(
    where: Path, name: str, parts: list[StoredTensor], tensor: torch.Tensor, *, search: bool
) -> None:
    """Compare a tensor with the files' tensors that it is cut into or turned to, in whatever order its numbers stand there."""
    count = sum(math.prod(part.shape) for part in parts)
    _require(count == tensor.numel(), where, f"{name} has {count} numbers instead of {tensor.numel()}")
    dtypes = {part.dtype for part in parts}
    _require(dtypes == {TYPES[tensor.dtype]}, where, f"{name} is {', '.join(sorted(dtypes))}")
    if search:
        sampled = np.concatenate([_sampled(part)[:: len(parts)] for part in parts])
        kind = _INTEGERS[tensor.element_size()]
        numbers = torch.from_numpy(np.ascontiguousarray(sampled)).view(kind).reshape(-1)
        known = torch.isin(numbers, tensor.detach().cpu().contiguous().view(kind).reshape(-1))
        _require(bool(known.all()), where, f"{name} holds other numbers")


def _sampled(stored: StoredTensor) -> np.ndarray:
    """Return the bytes of some numbers of a tensor in a file, a row each."""
    count = math.prod(stored.shape)
    if not count:
        return np.zeros((0, 0), np.uint8)
    size = stored.end - stored.begin
    raw = np.memmap(stored.path, np.uint8, "r", stored.begin, (size,))
    return np.asarray(raw.reshape(count, -1)[_chosen(count).numpy()])


def _chosen(count: int) -> torch.Tensor:
    """Return the places of the numbers that are compared: spread over the tensor, its first and last among them."""
    return torch.linspace(0, count - 1, min(_SAMPLES, count), dtype=torch.float64).round().long()


def _require(holds: bool, where: Path, fault: str) -> None:
    if not holds:
        raise _differs(where, fault)


def _differs(where: Path, fault: str) -> StorageError:
    return StorageError(
        f"{where} failed verification after writing: {fault}",
        hint="write it again; checkpoints are intact. If it happens again, suspect the disk or report a bug",
    )
