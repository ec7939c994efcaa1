"""What a person decided about rows: leave one out, replace its answer, or keep it as it is.

A file of fixes has a JSON object a line: ``{"row": HASH, "fix": "leave-out", "place": "mails.jsonl:17"}``; ``replace`` brings an
``answer``. A row is named by the hash of what its source says (``source_key``), so that it is found wherever it stands in its
files, and every copy of it too. ``place`` says where it stood, for people. The files of rows stay as they are.
"""

import hashlib
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

from sftcli.data.conversations.fixes_done import Fix, FixesDone
from sftcli.data.conversations.heldout_split import KEY_BYTES, source_key
from sftcli.data.conversations.messages import Conversation, PlainText, Rejected, TokenRow
from sftcli.data.reading.json_rows import json_rows
from sftcli.data.reading.text_lines import as_utf8, data_error, no_note
from sftcli.errors import DataError, Location
from sftcli.foreign import foreign_file
from sftcli.input_files import read_whole
from sftcli.own_files import FormError, as_form
from sftcli.paths import as_path

_FORM = (
    'a line is {"row": HASH, "fix": "leave-out", "replace" or "keep", "answer": TEXT, "place": "FILE:LINE"}'
)
_Row = Conversation | PlainText | TokenRow | Rejected


@dataclass(frozen=True, slots=True, kw_only=True)
class Fixes:
    """The decisions of a file, by row, and the line of each."""

    name: str
    by_row: Mapping[str, Fix]
    lines: Mapping[str, int]

    @property
    def content(self) -> str:
        """A hash of all that they change, whatever the file is called and however it is ordered."""
        changes = sorted((one.row, one.fix, one.answer) for one in self.by_row.values())
        return hashlib.sha256(json.dumps(changes).encode()).hexdigest()


def read_fixes(name: str) -> Fixes:
    """Read the file ``name``.

    Raises:
        NotFoundError, StorageError: It is not there, or cannot be read.
        DataError: A line is no fix, or two are of one row; it has file and line.
        UsageError: The name cannot be a path.
    """
    path = as_path(name)
    with foreign_file(path, "holds no fixes", name=name, hint=_FORM):
        content = read_whole(path, name=name)
    by_row, lines = dict[str, Fix](), dict[str, int]()
    if content.strip():
        stream = as_utf8(io.BufferedReader(io.BytesIO(content)), name, no_note)
        for line, given in json_rows(stream, name, no_note):
            fix = _fix_of(given, name, line)
            if fix.row in lines:
                raise data_error(
                    f"line {lines[fix.row]} is about the same row", name, line, hint="leave one of them"
                )
            by_row[fix.row], lines[fix.row] = fix, line
    return Fixes(name=name, by_row=by_row, lines=lines)


def _fix_of(given: Mapping[str, object], name: str, line: int) -> Fix:
    known = [one.name for one in fields(Fix)]
    if strange := next((key for key in given if key not in known), None):
        raise data_error(f'"{strange}" is no key of a fix', name, line, hint=_FORM)
    try:
        fix: Fix = as_form(dict(given), Fix)
    except FormError as error:
        raise data_error(str(error), name, line, hint=_FORM) from error
    if len(fix.row) != 2 * KEY_BYTES or any(letter not in "0123456789abcdef" for letter in fix.row):
        raise data_error(
            f'"row" is no hash of a row: {fix.row!r:.40}', name, line, hint="sft report RUN --rows has them"
        )
    if (fix.fix == "replace") != bool(fix.answer.strip()):
        what = (
            'to replace the answer, "answer" is needed'
            if fix.fix == "replace"
            else f'"answer" does nothing with "{fix.fix}"'
        )
        raise data_error(what, name, line, hint=_FORM)
    return fix


@dataclass(slots=True)
class FixingRows:
    """Applies fixes to rows as they are read, and counts what became of them."""

    fixes: Fixes
    left_out: int = 0
    replaced: int = 0
    kept: int = 0
    _found: set[str] = field(default_factory=set)

    def begin(self) -> None:
        """Count from nothing."""
        self.left_out = self.replaced = self.kept = 0
        self._found.clear()

    def apply(self, rows: Iterable[_Row], note_left_out: Callable[[str], None]) -> Iterator[_Row]:
        """Yield ``rows`` as they are decided; the places of those that are left out go to ``note_left_out``.

        Raises:
            DataError: An answer cannot be replaced.
        """
        for row in rows:
            if not isinstance(row, Conversation | TokenRow):
                yield row
                continue
            key = source_key(row).hex()
            fix = self.fixes.by_row.get(key)
            if fix is None:
                yield row
                continue
            self._found.add(key)
            if fix.fix == "leave-out":
                self.left_out += 1
                note_left_out(str(row.origin))
                continue
            self.replaced += fix.fix == "replace"
            self.kept += fix.fix == "keep"
            yield self._replaced(row, fix, key) if fix.fix == "replace" else row

    def done(self, paths: Iterable[str], *, is_whole: bool) -> FixesDone:
        """Return what became of the fixes; ``paths`` are the files that were read, ``is_whole`` whether all of their rows were."""
        read = frozenset(paths)
        missing = [one for one in self.fixes.by_row.values() if one.row not in self._found]
        files = (one.place.rpartition(":")[0] for one in missing)
        return FixesDone(
            left_out=self.left_out,
            replaced=self.replaced,
            kept=self.kept,
            missing=len(missing),
            changed=tuple(dict.fromkeys(Path(file).name for file in files if file in read and is_whole)),
        )

    def _replaced(self, row: Conversation | TokenRow, fix: Fix, key: str) -> Conversation:
        place = Location(file=self.fixes.name, line=self.fixes.lines[key])
        if isinstance(row, TokenRow):
            raise _irreplaceable(place, f"{row.origin} has token ids and no text")
        last = max(index for index, message in enumerate(row.messages) if message.trained)
        message = row.messages[last]
        if message.tool_calls or message.thinking:
            what = "calls a tool" if message.tool_calls else "has thinking in a field of its own"
            raise _irreplaceable(place, f"the answer of {row.origin} {what}, which a text cannot replace")
        fixed = replace(message, content=fix.answer, without_loss=())
        messages = (*row.messages[:last], fixed, *row.messages[last + 1 :])
        return replace(row, messages=messages, row=key)


def _irreplaceable(place: Location, why: str) -> DataError:
    return DataError(f"{place}: {why}", hint="leave the row out, or change it in its file", location=place)
