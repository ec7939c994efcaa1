"""Everything that changes a disk goes through ``storage.disk``, where a test can stop or fail it."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import sftcli

PACKAGE = Path(sftcli.__file__).parent
# The download runs in a process of its own that imports nothing of this package and leaves writing to the hub's client.
ELSEWHERE = {"storage.py", "worker.py"}
# Standard streams that the caller has closed, and a nameless file that catches what a child process says.
STREAMS = {("show.py", "open(writer, 'w', encoding='utf-8')"),
           ("show.py", "open(os.devnull, 'w', encoding='utf-8')"),
           ("show.py", "os.open(os.devnull, os.O_WRONLY)"),
           ("processes.py", "Path(os.devnull).open('a', encoding='utf-8')"),
           ("snapshot.py", "TemporaryFile()"),
           # Not a file on a disk: tells Linux to measure the peak of memory anew.
           ("runtime.py", "Path('/proc/self/clear_refs').write_text('5', encoding='ascii')")}  # fmt: skip
METHODS = {"write_text", "write_bytes", "mkdir", "unlink", "rmdir", "rename", "symlink_to", "hardlink_to", "touch",
           "chmod", "lchmod", "extract", "extractall", "to_parquet", "to_csv", "save_to_disk"}  # fmt: skip
LIBRARIES = {"save_pretrained", "save_file", "torch.save", "np.save", "save_model"}
FUNCTIONS = {
    *(f"os.{name}" for name in ("open", "remove", "unlink", "rename", "replace", "mkdir", "makedirs", "rmdir", "truncate",
                                "utime", "link", "symlink", "chmod", "write", "removedirs", "renames")),
    *(f"shutil.{name}" for name in ("copy", "copy2", "copyfile", "copyfileobj", "copytree", "copymode", "move", "rmtree")),
    "mkstemp", "mkdtemp", "TemporaryFile", "TemporaryDirectory", "NamedTemporaryFile", "pa.OSFile",
}  # fmt: skip


def writers(name: str, source: str) -> list[str]:
    """Return the calls in ``source`` that change a disk by another way."""
    found = []
    for call, is_within in calls(ast.parse(source), is_within=False):
        text, function = ast.unparse(call), ast.unparse(call.func)
        if (name, text) in STREAMS or function.startswith(("storage.", "disk.")):
            continue
        method = function.rpartition(".")[2]
        is_library = method in LIBRARIES or function in LIBRARIES
        is_replace = method == "replace" and "." in function and len(call.args) == 1
        is_method = method in METHODS and "." in function
        is_open = method == "open" and any(
            isinstance(part, ast.Constant) and isinstance(part.value, str) and mode_writes(part.value)
            for part in [*call.args, *(word.value for word in call.keywords)]
        )
        if (is_library and not is_within) or is_replace or is_open or is_method or function in FUNCTIONS:
            found.append(f"{name}:{call.lineno}: {text}")
    return found


def mode_writes(mode: str) -> bool:
    return len(mode) <= 3 and set(mode) <= set("rwaxbt+") and bool(set(mode) & set("wax+"))


def calls(node: ast.AST, *, is_within: bool) -> Iterator[tuple[ast.Call, bool]]:
    """Yield every call, and whether it stands in an argument of ``disk.let_library_write``."""
    if isinstance(node, ast.Call):
        yield node, is_within
        is_within |= ast.unparse(node.func).endswith("disk.let_library_write")
    for child in ast.iter_child_nodes(node):
        yield from calls(child, is_within=is_within)


def test_no_other_module_writes():
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.name not in ELSEWHERE:
            found += writers(path.name, path.read_text(encoding="utf-8"))
    assert found == []


@pytest.mark.parametrize(
    "source",
    ["path.open('w')", "open(p, mode='ab')", "path.write_text('x')", "torch.save(x, p)", "path.replace(target)",
     "model.save_pretrained(p)", "os.replace(a, b)", "shutil.rmtree(p)", "path.touch()"],
)  # fmt: skip
def test_each_way_to_write_is_seen(source):
    assert writers("x.py", source)


@pytest.mark.parametrize(
    "source",
    ["path.open('rb')", "text.replace('a', 'b')", "storage.disk.unlink(p)", "zipfile.ZipFile(p)",
     "storage.disk.let_library_write(p, lambda: model.save_pretrained(p))"],
)  # fmt: skip
def test_reading_is_not_writing(source):
    assert writers("x.py", source) == []
