"""Which model a folder holds, in several strengths: what is stored in runs and adapters is compared with what is there now.

``file_stamps`` costs nothing and breaks with a copy; ``sampled_hash`` and ``answering_hash`` read a few megabytes;
``exact_hash`` reads all; ``numbers_hash`` is the same for the same numbers in another type.
"""

import hashlib
from pathlib import Path

from sftcli import storage
from sftcli.foreign import foreign_file
from sftcli.input_files import read_whole
from sftcli.modeling.formats.folder_check import weight_files

_WEIGHTS = ".safetensors"
_BLOCKS = 64
_BLOCK_BYTES = 64 * 1024


def file_stamps(folder: Path) -> list[list[object]]:
    """Return name, size and time of each file that has a part in answers."""
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in _answering_files(folder)]


def answering_hash(folder: Path) -> str:
    """Return ``sha256:`` and a hash of all that has a part in answers: small files whole, of weights blocks."""
    digest = hashlib.sha256()
    for path in _answering_files(folder):
        digest.update(f"{path.name}:{path.stat().st_size}".encode())
        if path.suffix == _WEIGHTS:
            _add_blocks(digest, path)
        else:
            digest.update(read_whole(path))
    return f"sha256:{digest.hexdigest()}"


def _answering_files(folder: Path) -> list[Path]:
    return [file for file in sorted(folder.iterdir()) if file.suffix in {_WEIGHTS, ".json", ".jinja"}]


def sampled_hash(folder: Path) -> str:
    """Return ``sha256:`` and a hash of the configuration and of 64 blocks spread over each weight file.

    Reading gigabytes at every start would cost seconds; training changes nearly every weight, so blocks tell.
    """
    digest = hashlib.sha256(read_whole(folder / "config.json"))
    for path in weight_files(folder):
        digest.update(f"{path.name}:{path.stat().st_size}".encode())
        _add_blocks(digest, path)
    return f"sha256:{digest.hexdigest()}"


def _add_blocks(digest: "hashlib._Hash", path: Path) -> None:
    size = path.stat().st_size
    with path.open("rb") as file:
        for index in range(_BLOCKS):
            file.seek(max(size - _BLOCK_BYTES, 0) * index // (_BLOCKS - 1))
            digest.update(file.read(_BLOCK_BYTES))


def exact_hash(folder: Path) -> str:
    """Return a hash of every byte of configuration and weights."""
    digest = hashlib.sha256()
    for path in [folder / "config.json", *sorted(folder.glob("*.safetensors"))]:
        digest.update(f"{path.name} {storage.file_sha256(path)}\n".encode())
    return digest.hexdigest()


def numbers_hash(folder: Path) -> str:
    """Return ``sha256:`` and a hash of names, shapes and some rows of every tensor.

    The numbers count, not the type they are stored in: a copy in float32 of a bfloat16 model is the same base.
    """
    import torch
    from safetensors import safe_open

    digest = hashlib.sha256()
    for path in weight_files(folder):
        with foreign_file(path), safe_open(path, framework="pt") as file:
            for name in sorted(file.keys()):
                part = file.get_slice(name)
                shape = part.get_shape()
                digest.update(f"{name}:{shape};".encode())
                for row in dict.fromkeys((0, shape[0] // 2, shape[0] - 1)) if shape else ():
                    numbers = part[row : row + 1].float().contiguous()
                    digest.update(numbers.view(torch.uint8).numpy().tobytes())
    return f"sha256:{digest.hexdigest()}"
