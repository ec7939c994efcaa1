"""What can happen to a file: its bytes change, or somebody has written another structure into it. A seed decides which and where."""

import copy
import gzip
import json
import tomllib
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

import tomli_w

ESCAPE = "\x1b]52;c;aGk=\x07\x1b[31m"  # what a terminal would obey
_DEEP = "@deep@"  # stands for more brackets than Python would write
_LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"4d" * 32 + b"\nsize 12345\n"
_HTML = b"<!DOCTYPE html>\n<html><head><title>404 Not Found</title></head><body>no such page</body></html>\n"

Change = Callable[[bytes, Random], bytes]
Slot = tuple[Any, Any]  # a list or dict, and the key of what is changed in it


def damaged(content: bytes, suffix: str, random: Random) -> tuple[str, bytes | None]:
    """Return ``content`` with one to three damages, and what they are called; None in place of a file that is gone.

    Args:
        content: What a file with the ending ``suffix`` holds.
        suffix: Such as ``.json``: where the structure of such files is known, half of the damages are to that.
        random: Decides.
    """
    names: list[str] = []
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        if suffix in FORMS and random.random() < 0.6:
            name, changed = _restructured(content, suffix, random)
        else:
            name = random.choice([*BYTES, "missing"])
            if name == "missing":
                return name, None
            changed = BYTES[name](content, random)
        if changed is not None:
            names.append(name)
            content = changed
    return ", ".join(names) or "none", content


def _place(content: bytes, random: Random) -> int:
    return random.randrange(len(content) + 1)


def _flip(content: bytes, random: Random) -> bytes:
    changed = bytearray(content)
    for _ in range(random.randint(1, 8) if changed else 0):
        changed[random.randrange(len(changed))] ^= 1 << random.randrange(8)
    return bytes(changed)


def _zeros(content: bytes, random: Random) -> bytes:
    start = _place(content, random)
    length = min(len(content) - start, random.choice((1, 16, 512, 1 << 20)))
    return content[:start] + bytes(length) + content[start + length :]


def _insert(content: bytes, random: Random) -> bytes:
    start = _place(content, random)
    return content[:start] + random.randbytes(random.randint(1, 64)) + content[start:]


def _insert_text(content: bytes, random: Random) -> bytes:
    start = _place(content, random)
    words = (
        ESCAPE,
        "\0",
        "\ufeff",
        "\u2028",
        "\r",
        "{",
        "]",
        '"',
        "\\",
        "=",
        "\n\n",
        "NaN",
        "1e999",
        "\N{SNOWMAN}",
    )
    return content[:start] + random.choice(words).encode() + content[start:]


def _repeat(content: bytes, random: Random) -> bytes:
    start, end = sorted((_place(content, random), _place(content, random)))
    return content[:end] + content[start:end] + content[end:]


def _drop(content: bytes, random: Random) -> bytes:
    start = _place(content, random)
    return content[:start] + content[start + random.choice((1, 4, 64, 4096)) :]


BYTES: dict[str, Change] = {
    "bits flipped": _flip,
    "end cut": lambda content, random: content[: _place(content, random)],
    "front cut": lambda content, random: content[_place(content, random) :],
    "piece lost": _drop,
    "piece twice": _repeat,
    "zeros": _zeros,
    "bytes inserted": _insert,
    "text inserted": _insert_text,
    "empty": lambda content, random: b"",
    "one byte": lambda content, random: random.randbytes(1),
    "junk": lambda content, random: random.randbytes(random.choice((16, 4096))),
    "all NUL": lambda content, random: bytes(len(content)),
    "Git LFS pointer": lambda content, random: _LFS,
    "web page": lambda content, random: _HTML,
    "UTF-16": lambda content, random: content.decode("utf-8", "replace").encode("utf-16"),
    "gzip": lambda content, random: gzip.compress(content),
}


def _restructured(content: bytes, suffix: str, random: Random) -> tuple[str, bytes | None]:
    """Return ``content`` with another structure, and the name of the damage; None where it has none, or cannot be written."""
    read, write = FORMS[suffix]
    name = random.choice(list(STRUCTURE))
    try:
        tree = read(content, random)
        STRUCTURE[name](tree, random)
        return name, write(tree, content)
    except (ValueError, TypeError, RecursionError, IndexError):
        return name, None


def _slots(tree: dict[str, Any]) -> list[Slot]:
    """Return every place in ``tree``, what is under its key "root" included."""
    found: list[Slot] = []
    ahead: list[Any] = [tree]
    while ahead:
        box = ahead.pop()
        for key in box if isinstance(box, dict) else range(len(box)):
            found.append((box, key))
            if isinstance(box[key], dict | list):
                ahead.append(box[key])
    return found


def _put(*values: object) -> Callable[[dict[str, Any], Random], None]:
    """Return what puts one of ``values`` in some place."""

    def change(tree: dict[str, Any], random: Random) -> None:
        box, key = random.choice(_slots(tree))
        box[key] = copy.deepcopy(random.choice(values))

    return change


def _put_at(kind: type | tuple[type, ...], *values: object) -> Callable[[dict[str, Any], Random], None]:
    """Return what puts one of ``values`` in a place that has a ``kind`` of value; IndexError where there is none."""

    def change(tree: dict[str, Any], random: Random) -> None:
        box, key = random.choice([slot for slot in _slots(tree) if isinstance(slot[0][slot[1]], kind)])
        box[key] = copy.deepcopy(random.choice(values))

    return change


def _delete(tree: dict[str, Any], random: Random) -> None:
    box, key = random.choice([slot for slot in _slots(tree) if slot[0] is not tree])
    del box[key]


def _wrap(tree: dict[str, Any], random: Random) -> None:
    box, key = random.choice(_slots(tree))
    box[key] = [box[key]] if random.random() < 0.5 else {"value": box[key]}


def _unwrap(tree: dict[str, Any], random: Random) -> None:
    box, key = random.choice([slot for slot in _slots(tree) if isinstance(slot[0][slot[1]], dict | list)])
    box[key] = random.choice([*(box[key].values() if isinstance(box[key], dict) else box[key])])


def _swap(tree: dict[str, Any], random: Random) -> None:
    slots = _slots(tree)
    (box, key), (other_box, other) = random.choice(slots), random.choice(slots)
    box[key], other_box[other] = copy.deepcopy(other_box[other]), copy.deepcopy(box[key])


def _repeat_items(tree: dict[str, Any], random: Random) -> None:
    box, key = random.choice([slot for slot in _slots(tree) if isinstance(slot[0][slot[1]], list)])
    box[key] = box[key] * random.choice((2, 100))


def _other_keys(tree: dict[str, Any], random: Random) -> None:
    box, key = random.choice(
        [slot for slot in _slots(tree) if isinstance(slot[0], dict) and slot[0] is not tree]
    )
    box[random.choice((key + "2", key.upper(), "", "\0", ESCAPE, "\ud800", "a.b", "__class__"))] = box.pop(
        key
    )


def _newer(tree: dict[str, Any], random: Random) -> None:
    """Raise the number of a version, or add one."""
    slots = [slot for slot in _slots(tree) if slot[1] in {"version", "format", "format_version", "schema"}]
    box, key = random.choice(slots) if slots else (tree["root"], "version")
    box[key] = random.choice((99, 2, -1, "99", "x", None, 1.5, [1]))


STRUCTURE: dict[str, Callable[[dict[str, Any], Random], None]] = {
    "key lost": _delete,
    "other type": _put(
        None, True, False, 0, 1, -1, 0.5, "", "x", "7", [], {}, [[]], {"a": 1}, [None], [0, 1]
    ),
    "wrong number": _put_at(
        (int, float), -1, 0, 1.5, -(2**31), 2**31, 2**63, 10**30, -(10**30), 1e308, 10**4000
    ),
    "no number": _put_at((int, float), float("nan"), float("inf"), float("-inf"), "NaN", None, "1", True),
    "deep": _put(_DEEP),
    "odd text": _put_at(
        str, "\ud800", ESCAPE, "", " ", "\0", "a\nb", "../../etc/passwd", "/dev/zero", "~", "%s{0}", "[/]"
    ),
    "long text": _put_at(str, "x" * 100_000, "é" * 5000, "x" * 300, "a/" * 3000),
    "wrapped": _wrap,
    "unwrapped": _unwrap,
    "swapped": _swap,
    "items repeated": _repeat_items,
    "emptied": _put_at((dict, list), {}, []),
    "other keys": _other_keys,
    "newer version": _newer,
}


def _read_json(content: bytes, random: Random) -> dict[str, Any]:
    return {"root": json.loads(content)}


def _write_json(tree: dict[str, Any], content: bytes) -> bytes:
    depth = 100_000
    return json.dumps(tree["root"], indent=1).replace(f'"{_DEEP}"', "[" * depth + "]" * depth).encode()


def _read_line(content: bytes, random: Random) -> dict[str, Any]:
    number = random.randrange(len(content.splitlines()))
    return {"root": json.loads(content.splitlines()[number]), "line": number}


def _write_line(tree: dict[str, Any], content: bytes) -> bytes:
    lines = content.splitlines()
    lines[tree.pop("line")] = _write_json(tree, content).replace(b"\n", b"")
    return b"\n".join(lines) + b"\n"


def _read_toml(content: bytes, random: Random) -> dict[str, Any]:
    return {"root": tomllib.loads(content.decode())}


def _write_toml(tree: dict[str, Any], content: bytes) -> bytes:
    return tomli_w.dumps(tree["root"]).replace(f'"{_DEEP}"', "[" * 5000 + "]" * 5000).encode()


Form = tuple[Callable[[bytes, Random], dict[str, Any]], Callable[[dict[str, Any], bytes], bytes]]
# By the ending of a file: reads a structure under the key "root", and writes it, beside the file's content before.
FORMS: dict[str, Form] = {
    ".json": (_read_json, _write_json),
    ".jsonl": (_read_line, _write_line),
    ".partial": (_read_line, _write_line),
    ".toml": (_read_toml, _write_toml),
}


def all_names() -> Iterator[str]:
    """Yield what the damages are called."""
    yield from (*BYTES, *STRUCTURE, "missing")
