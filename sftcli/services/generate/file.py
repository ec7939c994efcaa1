"""Answer a file of prompts. A killed command resumes where it stopped, and the answers come out in the order of the prompts.

While it works, answers are kept in ``.OUT.partial`` in the order in which they become known, a whole line each; its first
line says what they answer. When all are there, OUT appears, whole, and the journal goes.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

from sftcli import storage
from sftcli.errors import DataError, MismatchError, OutputError
from sftcli.events import EventSink, Notice, Progressed, StopFlag, Warned
from sftcli.figures import counted
from sftcli.modeling.formats.identity import file_stamps
from sftcli.own_files import FormError, as_form
from sftcli.services.generate.answerer import Answerer, Completion, Question, tell_room
from sftcli.services.generate.gate import Gate, journal_of
from sftcli.services.generate.prompt import model_choices, open_choices
from sftcli.services.generate.prompt_file import PromptRow, check_out
from sftcli.services.generate.remote import ServerAnswerer
from sftcli.services.generate.request import GenerateRequest
from sftcli.services.models.choose import ModelChoice
from sftcli.services.runs.event_log import read_lines
from sftcli.services.runs.lock import OutputLock
from sftcli.services.server.connection import RefusedError
from sftcli.services.server.dialects import Server

Key = tuple[int, int, int]  # (model, prompt, sample)
_SHOWN = 5  # lines that a message names
REFUSED = "refused"  # how an answer ends that a server would not give
ANSWER_KEYS = {field.name for field in fields(Completion)} - {"seconds"}


@dataclass(frozen=True, slots=True, kw_only=True)
class FileOutcome:
    """What was done. ``answered`` counts this call, ``kept`` what an earlier one had left."""

    out: str
    prompts: int
    answered: int
    kept: int
    is_whole: bool
    rest: str = ""  # the file of answers that are not sure enough
    unsure: int = 0  # answers in it
    rows: int = 0  # lines of ``out``; 0 until it is whole


@dataclass(frozen=True, slots=True, kw_only=True)
class Given:
    """An answer, and the day on which it was given."""

    completion: Completion
    date: str


class RowMaker(Protocol):
    """Makes other lines of answers than ``sft generate`` does by itself."""

    def lines(self, teacher: str, given: Sequence[Sequence[Given]], /) -> list[str]:
        """Return the lines of the file; ``given`` has all answers of the model ``teacher`` to each prompt."""


class Journal:
    """The answers known so far, of as many models, prompts and samples as ``sizes`` says."""

    def __init__(self, path: Path, fingerprint: str, sizes: Key) -> None:
        self.path = path
        self.sizes = sizes
        self.repaired = ""  # what was left out of a file that a crash has torn, in words
        self.done: dict[Key, Completion] = {}
        self.dates: dict[Key, str] = {}
        if path.exists():
            self._read(fingerprint)
        else:
            head = json.dumps({"answers": fingerprint}) + "\n"
            storage.replace_file(path, head.encode(), kind=storage.OUTPUT)
        self._file = storage.disk.append(path)

    def add(self, key: Key, completion: Completion) -> None:
        """Keep an answer; it survives a crash of this program from now on."""
        record = {name: value for name, value in asdict(completion).items() if name in ANSWER_KEYS}
        date = datetime.now(UTC).date().isoformat()
        line = {"key": key, "completion": record, "date": date}
        storage.append_line(self._file, json.dumps(line, ensure_ascii=False))
        self.done[key], self.dates[key] = completion, date

    def given(self, number: int, prompts: int) -> list[list[Given]]:
        """Return all answers of model ``number`` to each of ``prompts``."""
        keys = [[(number, index, sample) for sample in range(self.sizes[2])] for index in range(prompts)]
        return [[Given(completion=self.done[key], date=self.dates[key]) for key in row] for row in keys]

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _read(self, fingerprint: str) -> None:
        lines = read_lines(self.path)
        if not lines.found or lines.found[0][1].get("answers") != fingerprint:
            raise MismatchError(
                f"{self.path} was started with other prompts, another model or other settings",
                hint="run the same command, or delete that file to start over",
            )
        for _, record in lines.found[1:]:
            key, answer = self._key(record.get("key")), record.get("completion")
            if key is not None and (completion := _completion(answer)) is not None:
                self.done[key], self.dates[key] = completion, _date(record.get("date"))
        self.repaired = lines.message(self.path)
        if self.repaired:
            whole = "".join(text for text, _ in lines.found)
            storage.replace_file(self.path, whole.encode(), kind=storage.OUTPUT)

    def _key(self, value: object) -> Key | None:
        """Return the key that ``value`` is; None for anything that is not asked for."""
        if not (isinstance(value, list) and len(value) == len(self.sizes)):
            return None
        fits = all(
            type(part) is int and 0 <= part < size for part, size in zip(value, self.sizes, strict=True)
        )
        return (value[0], value[1], value[2]) if fits else None


def _completion(answer: object) -> Completion | None:
    """Return the answer that a line of a journal has; None for anything else, which is answered again."""
    try:
        found: Completion = as_form(
            {**answer, "seconds": 0.0} if isinstance(answer, dict) else answer, Completion
        )
    except FormError:
        return None
    return found


def _date(value: object) -> str:
    """Return the day that a line of a journal has; "" for anything else."""
    return value if isinstance(value, str) and re.fullmatch(r"\d{4}-\d\d-\d\d", value) else ""


def run_file_generation(
    request: GenerateRequest,
    prompts: list[PromptRow],
    out: Path,
    emit: EventSink,
    stop: StopFlag,
    gate: Gate | None = None,
    maker: RowMaker | None = None,
) -> FileOutcome:
    """Answer every prompt into ``out``, a JSON object a line with the row and its answer, or the lines of ``maker``.

    With ``gate``, rows whose answer it does not let out go to its file in place of ``out``.

    Raises:
        DataError: The answers have no name that is free.
        OutputError: ``out`` exists already or cannot be written.
        MismatchError: An unfinished ``out`` was begun with something else.
    """
    check_out(out)
    with ExitStack() as held:
        for file in (out, *(() if gate is None else (gate.rest,))):
            held.enter_context(OutputLock(file, emit))
        return _answer_all(request, prompts, out, emit, stop, gate, maker)


def _answer_all(
    request: GenerateRequest,
    prompts: list[PromptRow],
    out: Path,
    emit: EventSink,
    stop: StopFlag,
    gate: Gate | None,
    maker: RowMaker | None,
) -> FileOutcome:
    check_out(out)  # another process may have written it meanwhile
    names = column_names(request, prompts) if maker is None else {}
    moved = [f"{name} as {new}" for name, new in names.items() if name != new]
    if moved:
        emit(Notice(text=f"the rows' own columns are written under other names: {', '.join(moved)}"))
    choices = model_choices(request, emit, stop)
    sizes = (len(choices), len(prompts), request.samples)
    fingerprint = _fingerprint(request, prompts, choices, gate)
    with _writing(out):
        journal = Journal(journal_of(out), fingerprint, sizes)
    if journal.repaired:
        emit(Warned(text=f"{journal.repaired}; these are answered again"))
    kept = len(journal.done)
    total = len(choices) * len(prompts) * request.samples
    if kept:
        emit(Notice(text=f"resuming {out}: {kept} of {total} answers are done"))
    try:
        if kept < total:
            for number, answerer in enumerate(open_choices(choices, request, emit)):
                _answer(request, number, answerer, prompts, journal, total, emit, stop)
        is_whole = len(journal.done) == total
    except OSError as error:
        raise storage.disk_error(
            error, journal.path, "run the same command again: answers are kept"
        ) from error
    finally:
        journal.close()
    lines, unsure = list[str](), list[str]()
    if is_whole:
        if maker is not None:
            lines = maker.lines(choices[-1].name, journal.given(len(choices) - 1, len(prompts)))
        else:
            lines, unsure = _sorted_out(_rows(request, prompts, names, choices, journal), gate)
        if gate is not None:
            _write_rest(gate.rest, unsure)
        check_out(out)  # another program may have written it meanwhile
        _write(out, lines)
        storage.disk.unlink(journal.path)
    return FileOutcome(
        out=str(out),
        prompts=len(prompts),
        answered=len(journal.done) - kept,
        kept=kept,
        is_whole=is_whole,
        rest="" if gate is None else str(gate.rest),
        unsure=len(unsure),
        rows=len(lines),
    )


def _sorted_out(rows: Iterable[tuple[str, Completion]], gate: Gate | None) -> tuple[list[str], list[str]]:
    """Return the lines that go out, and those that ``gate`` keeps back."""
    lines, unsure = list[str](), list[str]()
    for row, answer in rows:
        is_sure = gate is None or gate.lets_out(answer.confidence, answer.finish)
        (lines if is_sure else unsure).append(row)
    return lines, unsure


def _write(out: Path, lines: list[str]) -> None:
    with _writing(out):
        storage.replace_file(out, "".join(lines).encode(), kind=storage.OUTPUT)


def _write_rest(rest: Path, lines: list[str]) -> None:
    """Write ``lines``, unless another command has written the file meanwhile; a killed one has left the same lines."""
    if rest.exists() and rest.read_bytes() != "".join(lines).encode():
        raise OutputError(
            f"{rest} was written meanwhile, with other rows",
            hint="move it and run the same command again: answers are kept",
        )
    _write(rest, lines)


def _writing(out: Path) -> AbstractContextManager[None]:
    """Turn errors of the disk into ours."""
    return storage.writing(out, "choose another --out; answers that there are stay")


def _answer(
    request: GenerateRequest,
    number: int,
    answerer: Answerer | ServerAnswerer,
    prompts: list[PromptRow],
    journal: Journal,
    total: int,
    emit: EventSink,
    stop: StopFlag,
) -> None:
    """Answer what one model has not answered yet."""
    every = [(number, index, sample) for index in range(len(prompts)) for sample in range(request.samples)]
    is_told = False
    while keys := [key for key in every if key not in journal.done]:
        questions = [
            answerer.question(prompts[index].messages, seed=(index, sample)) for _, index, sample in keys
        ]
        if not is_told:
            _require_room(request, answerer, prompts, keys, questions, emit)
        is_told = True
        try:
            for question, completion in answerer.answer(questions, request.sampling, stop):
                if completion.finish != "stopped":
                    journal.add(keys[question], completion)
                    emit(Progressed(task="answering", done=len(journal.done), total=total, unit="answers"))
        except RefusedError as error:
            if error.question is None or isinstance(answerer, Answerer):
                raise
            _keep_refused(keys[error.question], answerer, prompts, journal, error, emit)
        if stop.requested():
            return


def _require_room(
    request: GenerateRequest,
    answerer: Answerer | ServerAnswerer,
    prompts: list[PromptRow],
    keys: Sequence[Key],
    questions: Sequence[Question],
    emit: EventSink,
) -> None:
    """See that the model and the machine have room for each prompt, before long work ends at one of them.

    Raises:
        DataError, ResourceError: They have not.
    """
    asked = {index: len(question.ids) for (_, index, _), question in zip(keys, questions, strict=True)}
    _require_positions({prompts[index].line: length for index, length in asked.items()}, answerer.positions)
    longest = max(range(len(keys)), key=lambda place: len(questions[place].ids))
    answerer.require_memory(questions[longest], row=f"line {prompts[keys[longest][1]].line}")
    tell_room([*asked.values()], answerer, request.sampling.max_new_tokens, emit)


def _keep_refused(
    key: Key,
    answerer: ServerAnswerer,
    prompts: list[PromptRow],
    journal: Journal,
    error: RefusedError,
    emit: EventSink,
) -> None:
    """Keep that the server refused a prompt, so that the others are asked.

    Raises:
        DataError: It has not answered any, so that not the prompt is at fault.
    """
    where = f"line {prompts[key[1]].line}: {error.message}"
    if all(answer.finish == REFUSED for answer in journal.done.values()):
        raise DataError(where, hint=error.hint or "no prompt has been answered yet") from error
    emit(Warned(text=f"{where}; it has no answer, the others are asked"))
    journal.add(key, answerer.nothing(REFUSED))


def _require_positions(lengths: Mapping[int, int], positions: int) -> None:
    """Compare prompts of so many tokens, by their line, with the ``positions`` of a model, 0 where it has no limit.

    Raises:
        DataError: Some are longer; nothing was answered yet, so that no long work ends at one of them.
    """
    if positions and (long := {line: length for line, length in lengths.items() if length > positions}):
        named = [f"line {line} ({length:,} tokens)" for line, length in [*long.items()][:_SHOWN]]
        more = f" and {len(long) - _SHOWN:,} more" if len(long) > _SHOWN else ""
        raise DataError(
            f"{counted(len(long), 'prompt')} longer than the {positions:,} positions that the model was made for: "
            f"{', '.join(named)}{more}",
            hint="shorten them or take them out, or name a model with more positions; no row was answered",
        )


def column_names(request: GenerateRequest, prompts: list[PromptRow]) -> dict[str, str]:
    """Return under which name each column of the rows is written: ``row_answer`` where ``answer`` is the model's.

    Raises:
        DataError: Both are columns of the rows.
    """
    several = "s" if request.samples > 1 else ""
    ours = {"line", f"answer{several}", "finish", "confidence", "logprob", "new_tokens"}
    ours |= {f"base_answer{several}"} if request.with_base else set()
    columns = dict.fromkeys(name for prompt in prompts for name in prompt.row)
    names = {name: f"row_{name}" if name in ours else name for name in columns}
    if twice := [name for name in columns if name in ours and names[name] in columns]:
        raise DataError(
            f"the rows have a column {twice[0]}, whose place the answers take, and {names[twice[0]]} is there too",
            hint="rename one of them",
        )
    return names


def _rows(
    request: GenerateRequest,
    prompts: list[PromptRow],
    names: Mapping[str, str],
    choices: Sequence[ModelChoice | Server],
    journal: Journal,
) -> Iterator[tuple[str, Completion]]:
    """Yield the line of each row with its first answer."""
    for index, prompt in enumerate(prompts):
        row = {names[name]: value for name, value in prompt.row.items()}
        answers = [
            [journal.done[number, index, sample] for sample in range(request.samples)]
            for number in range(len(choices))
        ]
        result: dict[str, object] = {"line": prompt.line, **row}
        if len(answers) == 2:
            result["base_answers" if request.samples > 1 else "base_answer"] = _as_json(answers[0])
        result["answers" if request.samples > 1 else "answer"] = _as_json(answers[-1])
        for name in ("finish", "confidence", "logprob"):
            values = [getattr(one, name) for one in answers[-1]]
            result[name] = values if request.samples > 1 else values[0]
        result["new_tokens"] = sum(one.new_tokens for one in answers[-1])
        yield as_line(result), answers[-1][0]


def as_line(value: object) -> str:
    """Return ``value`` as a line of JSON; half a character of a row stays an escape, for UTF-8 has none for it."""
    text = json.dumps(value, ensure_ascii=False, default=str)  # tables hold dates
    return (text if text.isascii() or _is_text(text) else json.dumps(value, default=str)) + "\n"


def _is_text(text: str) -> bool:
    return not any("\ud800" <= char <= "\udfff" for char in text)


def _as_json(answers: list[Completion]) -> object:
    texts = [answer.text for answer in answers]
    return texts if len(texts) > 1 else texts[0]


def _fingerprint(
    request: GenerateRequest,
    prompts: list[PromptRow],
    choices: Sequence[ModelChoice | Server],
    gate: Gate | None,
) -> str:
    """Return a hash of all that decides the answers."""
    parts = {
        "prompts": [[asdict(message) for message in prompt.messages] for prompt in prompts],
        "sampling": request.sampling.model_dump(mode="json"),
        "samples": request.samples,
        "precision": request.precision,
        "tokenizer": str(request.tokenizer),
        "gate": None if gate is None else [gate.min_confidence, str(gate.rest)],
        "models": [stamps for choice in choices for stamps in _stamps(choice)],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _stamps(choice: ModelChoice | Server) -> list[object]:
    """Return what tells a model from another one: of a server its place and the name of the model."""
    if isinstance(choice, Server):
        return [choice.name]
    return [file_stamps(folder) for folder in dict.fromkeys((choice.folder, choice.weights_folder))]
