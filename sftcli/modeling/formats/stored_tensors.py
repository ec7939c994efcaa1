"""The tensors in the files of a model folder: names, types, shapes and bytes, read from headers without loading any."""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from sftcli.foreign import foreign_file
from sftcli.modeling.formats.folder_check import safetensors_header, weight_files

TYPES = {
    torch.float64: "F64", torch.int64: "I64", torch.float32: "F32", torch.int32: "I32", torch.float16: "F16",
    torch.bfloat16: "BF16", torch.uint8: "U8", torch.int8: "I8", torch.bool: "BOOL",
}  # fmt: skip
_SUFFIX = ".safetensors"
FLOATS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_CHUNK_BYTES = 16 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """Location of a tensor: ``end - begin`` bytes of ``path``. ``dtype`` is the format's name, such as BF16."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a model folder by name.

    Raises:
        NotFoundError, ConsentError, DataError: As ``check_model_folder``.
    """
    return {name: tensor for path in weight_files(folder) for name, tensor in tensors_of_file(path).items()}


def tensors_of_file(path: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a safetensors file by name.

    Raises:
        NotFoundError, DataError: It does not exist, or is damaged.
    """
    header, start = safetensors_header(path)
    return {
        name: StoredTensor(
            path=path,
            dtype=str(entry["dtype"]),
            shape=tuple(entry["shape"]),
            begin=start + entry["data_offsets"][0],
            end=start + entry["data_offsets"][1],
        )
        for name, entry in header.items()
        if name != "__metadata__"
    }


def copied_file_parts(
    tensors: Mapping[str, StoredTensor], *, replaced: Mapping[str, torch.Tensor] | None = None
) -> Iterator[bytes | memoryview]:
    """Yield the bytes of a safetensors file that holds ``tensors`` bit for bit, of whatever type they are.

    Those in ``replaced`` have other numbers and perhaps another shape, in the type that they had.
    """
    others = replaced or {}
    order = sorted(tensors, key=lambda name: (-_width(tensors[name]), name))
    header = {name: (tensors[name].dtype, tensors[name].shape, _size(tensors[name])) for name in order}
    for name, tensor in others.items():
        header[name] = (tensors[name].dtype, tuple(tensor.shape), tensor.numel() * tensor.element_size())
    yield file_header(header)
    for name in order:
        if name in others:
            yield others[name].contiguous().reshape(-1).view(torch.uint8).numpy().data
        else:
            yield from _bytes_of(tensors[name])


def read_tensor(stored: StoredTensor) -> torch.Tensor:
    """Return the numbers of a floating-point tensor in a file, which are read when they are asked for."""
    raw = np.memmap(stored.path, np.uint8, "c", stored.begin, (_size(stored),))
    return torch.from_numpy(raw).view(FLOATS[stored.dtype]).reshape(stored.shape)


def view_of(stored: StoredTensor) -> torch.Tensor:
    """Return what ``read_tensor`` does.

    Raises:
        NotFoundError, DataError, StorageError: The file is gone, or is shorter than it was.
    """
    with foreign_file(stored.path):
        return read_tensor(stored)


def file_header(tensors: Mapping[str, tuple[str, Sequence[int], int]]) -> bytes:
    """Return what a safetensors file of ``tensors`` begins with: name -> type, shape and bytes.

    They come widest type first, so that every tensor starts at a multiple of its own width.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}  # transformers opens no file without it
    end = 0
    for name, (dtype, shape, size) in tensors.items():
        begin, end = end, end + size
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def tensor_file_parts(
    tensors: Mapping[str, torch.Tensor],
    about: Mapping[str, tuple[torch.dtype, Sequence[int]]] | None = None,
) -> Iterator[bytes | memoryview]:
    """Yield the bytes of a safetensors file that holds ``tensors``; each is read when its turn comes.

    With ``about``, type and shape of some, it holds these, and none of ``tensors`` is asked for before its turn.
    """
    if about is None:
        about = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
    order = sorted(about, key=lambda name: (-about[name][0].itemsize, name))
    yield file_header(
        {
            name: (TYPES[dtype], shape, dtype.itemsize * math.prod(shape))
            for name, (dtype, shape) in ((name, about[name]) for name in order)
        }
    )
    for name in order:
        yield tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def shard_name(whole: str, number: int, of: int) -> str:
    """Return the file of shard ``number``, counted from 0, of what the file ``whole`` would hold alone."""
    return whole if of == 1 else f"{whole.removesuffix(_SUFFIX)}-{number + 1:05d}-of-{of:05d}{_SUFFIX}"


def index_of(places: Mapping[str, str], total_bytes: int) -> dict[str, object]:
    """Return what ``INDEX`` says of tensors whose files are ``places``."""
    return {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(places.items()))}


def in_parts(tensors: Mapping[str, StoredTensor], most_bytes: int) -> Iterable[dict[str, StoredTensor]]:
    """Return ``tensors`` in groups of at most ``most_bytes``, or of one tensor that is larger."""
    sizes = {name: _size(tensor) for name, tensor in tensors.items()}
    return [{name: tensors[name] for name in names} for names in grouped(sizes, most_bytes)]


def grouped(sizes: Mapping[str, int], most_bytes: int) -> list[list[str]]:
    """Return the names of ``sizes`` in groups of at most ``most_bytes``, or of one that is larger."""
    groups: list[list[str]] = []
    room = 0
    for name, size in sizes.items():
        if not groups or size > room:
            groups.append([])
            room = most_bytes
        groups[-1].append(name)
        room -= size
    return groups


def _size(tensor: StoredTensor) -> int:
    return tensor.end - tensor.begin


def _width(tensor: StoredTensor) -> int:
    count = 1
    for length in tensor.shape:
        count *= length
    return _size(tensor) // count if count else 0


def _bytes_of(tensor: StoredTensor) -> Iterator[bytes]:
    with tensor.path.open("rb") as file:
        file.seek(tensor.begin)
        left = _size(tensor)
        while left:
            chunk = file.read(min(left, _CHUNK_BYTES))
            if not chunk:
                raise OSError(f"{tensor.path} ended early")
            left -= len(chunk)
            yield chunk
