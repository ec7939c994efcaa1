"""Write tensors as a safetensors file piece by piece, without a second copy of them in memory.

Format: 8 bytes little-endian header length, a JSON header of names, types, shapes and byte ranges padded with blanks to a
multiple of 8, then the bytes of the tensors without gaps. https://github.com/huggingface/safetensors#format
"""

import json
from collections.abc import Iterator, Mapping

import torch

_TYPES = {
    torch.float64: "F64", torch.int64: "I64", torch.float32: "F32", torch.int32: "I32", torch.float16: "F16",
    torch.bfloat16: "BF16", torch.uint8: "U8", torch.int8: "I8", torch.bool: "BOOL",
}  # fmt: skip


def tensor_file_parts(tensors: Mapping[str, torch.Tensor]) -> Iterator[bytes | memoryview]:
    """Yield the bytes of a safetensors file that holds ``tensors``; each is read when its turn comes."""
    # Wide types first, so that every tensor starts at a multiple of its own width.
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}  # transformers opens no file without it
    end = 0
    for name in order:
        tensor = tensors[name]
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _TYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end],
        }  # fmt: skip
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little")
    yield text
    for name in order:
        flat = tensors[name].detach().cpu().contiguous().reshape(-1)
        yield flat.view(torch.uint8).numpy().data


def tensor_file_bytes(tensors: Mapping[str, torch.Tensor]) -> int:
    """Return about how large the file will be."""
    return sum(tensor.numel() * tensor.element_size() + 128 for tensor in tensors.values())
