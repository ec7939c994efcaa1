"""The names of the files that hold the tensors of a checkpoint: one for weights and one for optimizer, or several with numbers.

Several are named as the shards of large models on the hub are: ``model-00001-of-00004.safetensors``.
"""

import re
from collections.abc import Collection

from sftcli.modeling.formats.stored_tensors import shard_name
from sftcli.training.state import Part

_PART = re.compile(r".+-(?P<number>\d{5})-of-(?P<of>\d{5})\.safetensors")


def part_name(whole: str, part: Part) -> str:
    """Return the file of a part of what the file ``whole`` would hold alone."""
    return shard_name(whole, part.number, part.of)


def part_names(whole: str, parts: int) -> list[str]:
    """Return the files of all parts, in order."""
    return [part_name(whole, Part(number=number, of=parts)) for number in range(parts)]


def number_of(name: str) -> int:
    """Return the number of the part that a file belongs to, from 0; 0 for files that are not in parts."""
    found = _PART.fullmatch(name)
    return int(found["number"]) - 1 if found else 0


def are_all_parts(files: Collection[str], *wholes: str, parts: int) -> bool:
    """Return whether ``files`` has each of the ``parts`` of ``wholes``, and no part or whole of another number."""
    if not 1 < parts <= len(files):
        return False
    wanted = {name for whole in wholes for name in part_names(whole, parts)}
    strange = {name for name in files if _PART.fullmatch(name) or name in wholes} - wanted
    return wanted <= set(files) and not strange
