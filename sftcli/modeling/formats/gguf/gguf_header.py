"""Read the header of a GGUF file, much faster than the package ``gguf`` parses it."""

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sftcli.modeling.formats.claims import impossible_claim

GGUF_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_SIZES = {
    0: 1,
    1: 1,
    2: 2,
    3: 2,
    4: 4,
    5: 4,
    6: 4,
    7: 1,
    10: 8,
    11: 8,
    12: 8,
}  # by type of a value: its bytes
_TEXT, _LIST = 8, 9  # types of values that have no size of their own
_FLOATS = {0: "float32", 1: "float16", 30: "bfloat16"}  # by type of a tensor; any other is quantized
_PRE_TOKENIZER, _ROPE_SCALING = b"tokenizer.ggml.pre", b".rope.scaling.type"
# Numbers of a family's formula that transformers does not read, by the end of their key.
UNREAD = (
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "attention.scale",
    "logit_scale",
    "embedding_scale",
    "residual_scale",
)
_FLOAT32 = 6  # type of a value
_WHOLE = {4: "I", 5: "i", 10: "Q", 11: "q"}
_MOST_SIDES = 8
_MOST_PER_BYTE = 8  # numbers: no quantization has less than a bit for one
_ROPE_TENSOR = "rope_f"  # begins names of factors that positions are scaled by


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufHeader:
    """The pre-tokenizer ("" if not stated), and for each tensor its type and whether it is a matrix.

    ``rope_scaling`` is how rotary positions are scaled, "" where they are not; ``unread`` are numbers of ``UNREAD``.
    """

    pre_tokenizer: str
    rope_scaling: str
    tensors: Mapping[str, tuple[str, bool]]
    unread: Mapping[str, float] = field(default_factory=dict)

    @property
    def is_exact(self) -> bool:
        """Whether each tensor holds plain numbers, which a model folder can hold as they are."""
        return all(kind for kind, _ in self.tensors.values())

    @property
    def dtype(self) -> str:
        """The dtype of a model folder converted from the file: that of the matrices; bfloat16 for quantized ones.

        Files in half precision keep a few matrices in float32, such as those that choose experts.
        """
        if not self.is_exact:
            return "bfloat16"
        kinds = {kind for kind, is_matrix in self.tensors.values() if is_matrix}
        narrow = kinds - {"float32"}
        return narrow.pop() if len(narrow) == 1 else "float32"


def read_header(path: Path) -> GgufHeader:
    """Read the head of the file ``path``.

    Raises:
        ValueError, ArithmeticError, RuntimeError, struct.error: It is cut off, damaged or of a version that is not known.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return _Walk(content).header()


class _Walk:
    """A place in the head, which moves on with what is read."""

    def __init__(self, content: mmap.mmap) -> None:
        self._content = content
        self._at = len(GGUF_MAGIC)
        self._order = "<" if int.from_bytes(content[4:6], "little") else ">"

    def header(self) -> GgufHeader:
        """Read the head.

        Raises:
            ValueError, ArithmeticError, RuntimeError, struct.error: It is damaged, or says what its file cannot hold.
        """
        if (version := self._number("I")) not in _VERSIONS:
            raise ValueError(f"it has format version {version}")
        tensors, values = self._number("Q"), self._number("Q")
        texts = {_PRE_TOKENIZER: "", _ROPE_SCALING: ""}
        unread: dict[str, float] = {}
        claims: dict[str, int] = {}
        for _ in range(values):
            key, kind = self._text(), self._number("I")
            if kind == _TEXT and (wanted := next((end for end in texts if key.endswith(end)), None)):
                texts[wanted] = self._text().decode("utf-8", "replace")
            elif kind == _FLOAT32 and (name := key.partition(b".")[2].decode("utf-8", "replace")) in UNREAD:
                unread[name] = self._number("f")
            elif kind in _WHOLE:
                claims[key.partition(b".")[2].decode("utf-8", "replace")] = self._number(_WHOLE[kind])
            else:
                self._skip(kind, 1)
        shapes: dict[str, list[int]] = {}
        found = dict(self._tensor(shapes) for _ in range(tensors))
        if claim := impossible_claim(claims, shapes):
            raise ValueError(f"it says {claim}")
        scaling = next((name for name in found if name.startswith(_ROPE_TENSOR)), texts[_ROPE_SCALING])
        return GgufHeader(
            pre_tokenizer=texts[_PRE_TOKENIZER],
            rope_scaling="" if scaling == "none" else scaling,
            tensors=found,
            unread=unread,
        )

    def _tensor(self, shapes: dict[str, list[int]]) -> tuple[str, tuple[str, bool]]:
        name = self._text().decode("utf-8", "replace")
        if (sides := self._number("I")) > _MOST_SIDES:
            raise ValueError(f"the tensor {name} has {sides} dimensions")
        shape = shapes[name] = [self._number("Q") for _ in range(sides)]
        if (count := math.prod(shape)) > _MOST_PER_BYTE * len(self._content):
            raise ValueError(f"the tensor {name} has {count} numbers, the file {len(self._content)} bytes")
        kind = _FLOATS.get(self._number("I"), "")
        self._number("Q")  # where its numbers begin
        return name, (kind, len(shape) > 1)

    def _number(self, form: str) -> Any:  # noqa: ANN401 - whole, but for "f"
        (found,) = struct.unpack_from(self._order + form, self._content, self._at)
        self._at += struct.calcsize(form)
        return found

    def _text(self) -> bytes:
        size = self._number("Q")
        if size > len(self._content) - self._at:
            raise ValueError(f"a text of {size} bytes is longer than the rest of the file")
        start, self._at = self._at, self._at + size
        return self._content[start : self._at]

    def _skip(self, kind: int, count: int) -> None:
        """Pass ``count`` values of the type ``kind``."""
        if kind == _TEXT:
            read = struct.Struct(self._order + "Q").unpack_from
            content, at = self._content, self._at
            for _ in range(count):  # some hundred thousand tokens
                at += 8 + read(content, at)[0]
            self._at = at
        elif kind == _LIST:
            for _ in range(count):
                inner = self._number("I")
                self._skip(inner, self._number("Q"))
        elif kind in _SIZES:
            self._at += _SIZES[kind] * count
        else:
            raise ValueError(f"it holds a value of the unknown type {kind}")
