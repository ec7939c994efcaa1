"""A disk that loses power: at the n-th operation the machine goes dark, and what was not synced is kept, in part, or lost.

The content of a file is safe once it was synced, and a name once the folder that it is in was: a new file or folder, a
rename, a removal. Of the names that were not, any subset survives, in any order; a rename happens whole or not at all, and
is safe when the folder of its new name is. Of content that was not, there remains what was synced, all, a part, zeros or
garbage of the size that it had. Which of these it is follows from a seed.
"""

import itertools
import os
import random
import shutil
import signal
import threading
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from tests.support.faulty_disk import CountingDisk


@dataclass(eq=False)
class Node:
    """A file, a folder (``names`` is not None) or a link, and what of it would survive."""

    names: "dict[str, Node] | None" = None
    safe_names: "dict[str, Node]" = field(default_factory=dict)
    content: bytearray = field(default_factory=bytearray)
    safe_content: bytes | None = None  # None: the file was never synced
    target: str = ""
    home: "tuple[Node, str] | None" = None  # the folder and the name under which it would survive
    mode: int = 0o644
    time_ns: int = 0  # of a file that was there from the beginning and was not written to


@dataclass(eq=False)
class Change:
    """``node`` comes to the place ``comes``, a folder and a name, or is removed, and leaves the one that it had.

    It is safe once ``folder`` was synced.
    """

    node: Node
    folder: Node
    comes: tuple[Node, str] | None = None

    def apply(self) -> None:
        if self.node.home:
            folder, name = self.node.home
            if folder.safe_names.get(name) is self.node:
                del folder.safe_names[name]
        if self.comes:
            self.comes[0].safe_names[self.comes[1]] = self.node
        self.node.home = self.comes


class PowerDisk(CountingDisk):
    """Goes dark before operation ``at``, and leaves below ``root`` what ``seed`` says; this process ends with it."""

    def __init__(self, root: Path, at: int, seed: int = 0) -> None:
        super().__init__()
        self.root, self.at, self.seed = root.absolute(), at, seed
        self.pending: list[Change] = []
        self.busy = threading.RLock()
        self.open: dict[int, Node] = {}  # by the number of the real file
        self.top = self._found(self.root)

    def before(self, what: str, path: object) -> None:
        super().before(what, path)
        if self.count == self.at:
            self.lose_power()
            os.kill(os.getpid(), signal.SIGKILL)

    # ---- the operations

    def make_folder(self, path: Path, *, mode: int = 0o777) -> None:
        with self.busy:
            super().make_folder(path, mode=mode)
            self._comes(path, Node(names={}, mode=mode))

    def create(self, path: Path) -> BinaryIO:
        with self.busy:
            file, known = super().create(path), self._node(path)
            if known is not None:
                known.content.clear()
            return self._opened(path, file, known)

    def create_alone(self, path: Path, *, mode: int = 0o666) -> BinaryIO:
        with self.busy:
            return self._opened(path, super().create_alone(path, mode=mode), None)

    def append(self, path: Path) -> BinaryIO:
        with self.busy:
            known = self._node(path)
            return self._opened(path, super().append(path), known)

    def write(self, file: BinaryIO, data: bytes | memoryview) -> None:
        with self.busy:
            super().write(file, data)
            node = self.open.get(os.fstat(file.fileno()).st_ino)
            if node is not None:
                size = memoryview(data).nbytes
                begin = file.tell() - size
                node.content[begin : begin + size] = bytes(data)
                node.time_ns = 0

    def truncate(self, path: Path, size: int) -> None:
        with self.busy:
            super().truncate(path, size)
            if (node := self._node(path)) is not None:
                del node.content[size:]

    def sync(self, path: Path) -> None:
        with self.busy:
            super().sync(path)
            node = self._node(path)
            if node is None:
                return
            if node.names is None:
                node.safe_content = bytes(node.content)
            else:
                for change in [change for change in self.pending if change.folder is node]:
                    change.apply()
                    older = self.pending[: self.pending.index(change) + 1]
                    for one in [one for one in older if one.node is change.node]:
                        self.pending.remove(one)

    def rename(self, source: Path, target: Path) -> None:
        with self.busy:
            super().rename(source, target)
            node = self._node(source)
            if node is not None:
                self._leaves(source)
                folder, name = self._place(target)
                folder.names[name] = node
                self.pending.append(Change(node, folder, comes=(folder, name)))

    def unlink(self, path: Path) -> None:
        self._removed(path, super().unlink)

    def remove_folder(self, path: Path) -> None:
        self._removed(path, super().remove_folder)

    def link(self, path: Path, target: Path) -> None:
        with self.busy:
            super().link(path, target)
            self._comes(path, Node(target=str(target)))

    def let_library_write(self, folder: Path, write: Callable[[], object]) -> None:
        with self._taking_in(folder):
            super().let_library_write(folder, write)

    # ---- what is known of the names

    @contextmanager
    def _taking_in(self, folder: Path):
        """Take in what a library has written, at its end."""
        before, end = self.before, "library has written"

        def seen(what: str, path: object) -> None:
            if what == end:
                for file in sorted(path for path in folder.rglob("*") if path.is_file()):
                    found = bytearray(file.read_bytes())
                    node = self._node(file)
                    if node is None:
                        self._comes(file, Node(content=found))
                    elif node.content != found:
                        node.content = found
            before(what, path)

        self.before = seen
        try:
            yield
        finally:
            self.before = before

    def _found(self, path: Path) -> Node:
        """Return what is there from the beginning, and safe."""
        mode = path.lstat().st_mode & 0o777
        if path.is_symlink():
            return Node(target=str(path.readlink()))
        if path.is_dir():
            names = {child.name: self._found(child) for child in path.iterdir()}
            folder = Node(names=names, safe_names=dict(names), mode=mode)
            for name, child in names.items():
                child.home = (folder, name)
            return folder
        content = path.read_bytes()
        time_ns = path.stat().st_mtime_ns
        return Node(content=bytearray(content), safe_content=content, mode=mode, time_ns=time_ns)

    def _place(self, path: Path) -> tuple[Node, str]:
        parts = Path(os.path.normpath(path.absolute())).relative_to(self.root).parts
        node = self.top
        for part in parts[:-1]:
            node = node.names[part]
        return node, parts[-1]

    def _node(self, path: Path) -> Node | None:
        path = Path(os.path.normpath(path.absolute()))
        if path == self.root:
            return self.top
        if not path.is_relative_to(self.root):
            return None
        folder, name = self._place(path)
        return folder.names.get(name)

    def _comes(self, path: Path, node: Node) -> None:
        if path.absolute().is_relative_to(self.root):
            folder, name = self._place(path)
            folder.names[name] = node
            self.pending.append(Change(node, folder, comes=(folder, name)))

    def _leaves(self, path: Path) -> Node:
        """Take a name away, and return its folder."""
        folder, name = self._place(path)
        del folder.names[name]
        return folder

    def _opened(self, path: Path, file: BinaryIO, known: Node | None) -> BinaryIO:
        node = known or Node()
        if known is None:
            self._comes(path, node)
        self.open[os.fstat(file.fileno()).st_ino] = node
        return file

    def _removed(self, path: Path, remove: Callable[[Path], None]) -> None:
        with self.busy:
            remove(path)
            node = self._node(path)
            if node is not None:
                self.pending.append(Change(node, self._leaves(path)))

    # ---- the end

    def lose_power(self) -> None:
        """Leave below the root what survives."""
        chance = random.Random(self.seed)
        kept = chance.choice((0.0, 0.5, 0.5, 0.8, 1.0))
        for change in self.pending:
            if chance.random() < kept:
                change.apply()
        for child in self.root.iterdir():
            shutil.rmtree(child) if child.is_dir() and not child.is_symlink() else child.unlink()
        self._write(self.root, self.top, chance)

    def _write(self, path: Path, node: Node, chance: random.Random) -> None:
        for name, child in node.safe_names.items():
            place = path / name
            if child.target:
                place.symlink_to(child.target)
            elif child.names is not None:
                place.mkdir()
                self._write(place, child, chance)
                place.chmod(child.mode | 0o700)
            else:
                place.write_bytes(surviving(child, chance))
                if child.time_ns:
                    os.utime(place, ns=(child.time_ns, child.time_ns))


def surviving(node: Node, chance: random.Random) -> bytes:
    """Return what of a file is there again."""
    now, safe = bytes(node.content), node.safe_content or b""
    if now == node.safe_content:
        return now
    cut = chance.randint(len(safe) if now.startswith(safe) else 0, len(now))
    rest = len(now) - cut
    return chance.choice(
        (safe, now, now[:cut], now[:cut] + bytes(rest), now[:cut] + bytes(itertools.repeat(0xA5, rest)))
    )
