"""The tensors of a GGUF file, written one after the other and read back."""

import errno
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import gguf
import numpy as np
import torch

from sftcli.errors import OutputError, StoppedError
from sftcli.events import Progressed, Session
from sftcli.modeling.formats.gguf.gguf_kinds import is_rounded

Types = Mapping[str, gguf.GGMLQuantizationType]


def write_tensors(
    writer: gguf.GGUFWriter, tensors: Mapping[str, torch.Tensor], types: Types, *, name: str, session: Session
) -> None:
    """Write all that ``writer`` was told and ``tensors``, each as ``types`` says, to the file ``name``.

    Raises:
        StoppedError: A stop was asked for.
    """
    _add_tensors(writer, tensors, types)
    for done, _ in enumerate(_write_tensors(writer, tensors, types), start=1):
        session.emit(Progressed(task=f"writing {name}", done=done, total=len(tensors), unit="tensors"))
        if session.stop.requested():
            raise StoppedError


def _add_tensors(writer: gguf.GGUFWriter, tensors: Mapping[str, torch.Tensor], types: Types) -> None:
    """Announce every tensor: the file lists them before their numbers."""
    for name, tensor in tensors.items():
        made = types[name]
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
    writer: gguf.GGUFWriter, tensors: Mapping[str, torch.Tensor], types: Types
) -> Iterator[None]:
    """Write one tensor after the other, so that one is in memory in its new form."""
    for name, tensor in tensors.items():
        try:
            with np.errstate(over="ignore"):  # what is too large is found when it is read back
                made = gguf.quantize(_numbers(tensor), types[name])
            writer.write_tensor_data(made)
        except OSError as error:  # numpy tells that less was written, not why
            raise OSError(error.errno or errno.ENOSPC, str(error)) from error
        yield


def _numbers(tensor: torch.Tensor) -> np.ndarray:
    return np.ascontiguousarray(tensor.detach().float().cpu().numpy())


def read_back(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Compare each tensor of the file with the model's, one after the other.

    Raises:
        OutputError: One is missing, or differs by more than its type rounds.
    """
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    for name, tensor in tensors.items():
        found = stored.get(name)
        if found is None or not is_rounded(
            _numbers(tensor), gguf.dequantize(found.data, found.tensor_type), found.tensor_type
        ):
            raise OutputError(
                f"{path.name} would not hold {name} as the model has it",
                hint="its numbers may be too large for --dtype f16; choose --dtype bf16 or f32",
            )
