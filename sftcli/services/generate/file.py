"""Answer a file of prompts. A killed command resumes where it stopped, and the answers come out in the order of the prompts.

While it works, answers are kept in ``.OUT.partial`` in the order in which they become known, a whole line each; its first
line says what they answer. When all are there, OUT appears, whole, and the journal goes.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from sftcli import storage
from sftcli.errors import DataError, MismatchError, OutputError, StorageError
from sftcli.events import EventSink, Notice, Progressed, StopFlag, Warned
from sftcli.modeling.formats.identity import file_stamps
from sftcli.own_files import FormError, as_form
from sftcli.services.generate.answerer import Answerer, Completion, Question
from sftcli.services.generate.gate import Gate, journal_of
from sftcli.services.generate.prompt import model_choices, open_choices
from sftcli.services.generate.prompt_file import PromptRow, check_out
from sftcli.services.generate.request import GenerateRequest
from sftcli.services.models.choose import ModelChoice
from sftcli.services.runs.event_log import read_lines
from sftcli.services.runs.lock import OutputLock

Key = tuple[int, int, int]  # (model, prompt, sample)
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


class Journal:
    """The answers known so far, of as many models, prompts and samples as ``sizes`` says."""

    def __init__(self, path: Path, fingerprint: str, sizes: Key) -> None:
        self.path = path
        self.sizes = sizes
        self.repaired = ""  # what was left out of a file that a crash has torn, in words
        self.done: dict[Key, Completion] = {}
        if path.exists():
            self._read(fingerprint)
        else:
            head = json.dumps({"answers": fingerprint}) + "\n"
            storage.replace_file(path, head.encode(), kind=storage.OUTPUT)
        self._file = storage.disk.append(path)

    def add(self, key: Key, completion: Completion) -> None:
        """Keep an answer; it survives a crash of this program from now on."""
        record = {name: value for name, value in asdict(completion).items() if name in ANSWER_KEYS}
        storage.append_line(self._file, json.dumps({"key": key, "completion": record}, ensure_ascii=False))
        self.done[key] = completion

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
                self.done[key] = completion
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


def run_file_generation(
    request: GenerateRequest,
    prompts: list[PromptRow],
    out: Path,
    emit: EventSink,
    stop: StopFlag,
    gate: Gate | None = None,
) -> FileOutcome:
    """Answer every prompt into ``out``, a JSON object a line with the row and its answer.

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
        return _answer_all(request, prompts, out, emit, stop, gate)


def _answer_all(
    request: GenerateRequest,
    prompts: list[PromptRow],
    out: Path,
    emit: EventSink,
    stop: StopFlag,
    gate: Gate | None,
) -> FileOutcome:
    check_out(out)  # another process may have written it meanwhile
    names = column_names(request, prompts)
    moved = [f"{name} as {new}" for name, new in names.items() if name != new]
    if moved:
        emit(Notice(text=f"the rows' own columns are written under other names: {', '.join(moved)}"))
    choices = model_choices(request, emit)
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
        raise StorageError(
            f"cannot write {journal.path}: {error.strerror}", hint="free space and run it again"
        ) from error
    finally:
        journal.close()
    unsure = 0
    if is_whole:
        rows = list(_rows(request, prompts, names, choices, journal))
        sure = [gate is None or gate.lets_out(answer.confidence, answer.finish) for _, answer in rows]
        unsure = sure.count(False)
        if gate is not None:
            _write_rest(gate.rest, [row for (row, _), is_sure in zip(rows, sure, strict=True) if not is_sure])
        check_out(out)  # another program may have written it meanwhile
        _write(out, [row for (row, _), is_sure in zip(rows, sure, strict=True) if is_sure])
        storage.disk.unlink(journal.path)
    return FileOutcome(
        out=str(out),
        prompts=len(prompts),
        answered=len(journal.done) - kept,
        kept=kept,
        is_whole=is_whole,
        rest="" if gate is None else str(gate.rest),
        unsure=unsure,
    )


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


@contextmanager
def _writing(out: Path) -> Iterator[None]:
    """Turn errors of the disk into ours."""
    try:
        yield
    except OSError as error:
        if error.errno in storage.FULL_DISK:
            raise StorageError(
                f"the disk that holds {out} is full", hint="free space and run it again: answers are kept"
            ) from error
        raise OutputError(f"cannot write {out}: {error.strerror}", hint="choose another --out") from error


def _answer(
    request: GenerateRequest,
    number: int,
    answerer: Answerer,
    prompts: list[PromptRow],
    journal: Journal,
    total: int,
    emit: EventSink,
    stop: StopFlag,
) -> None:
    """Answer what one model has not answered yet."""
    keys: list[Key] = []
    questions: list[Question] = []
    for index, prompt in enumerate(prompts):
        for sample in range(request.samples):
            key = (number, index, sample)
            if key not in journal.done:
                keys.append(key)
                questions.append(answerer.question(prompt.messages, seed=(index, sample)))
    for question, completion in answerer.answer(questions, request.sampling, stop):
        if completion.finish != "stopped":
            journal.add(keys[question], completion)
            emit(Progressed(task="answering", done=len(journal.done), total=total, unit="answers"))


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
    choices: list[ModelChoice],
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
    request: GenerateRequest, prompts: list[PromptRow], choices: list[ModelChoice], gate: Gate | None
) -> str:
    """Return a hash of all that decides the answers."""
    parts = {
        "prompts": [[asdict(message) for message in prompt.messages] for prompt in prompts],
        "sampling": request.sampling.model_dump(mode="json"),
        "samples": request.samples,
        "precision": request.precision,
        "tokenizer": str(request.tokenizer),
        "gate": None if gate is None else [gate.min_confidence, str(gate.rest)],
        "models": [
            file_stamps(folder)
            for choice in choices
            for folder in dict.fromkeys((choice.folder, choice.weights_folder))
        ],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
