"""Prompts that stand in held-out rows, exactly or nearly: answers to them would teach what a model is later asked."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sftcli.data.conversations.heldout_split import split_key
from sftcli.data.conversations.messages import Conversation, Message
from sftcli.data.prepared.messages import KeptMessages
from sftcli.data.prepared.store import HELDOUT
from sftcli.data.quality.duplicates import mark_rows, repeated_in
from sftcli.data.reading.record import Origin
from sftcli.errors import DataError
from sftcli.events import Session, Warned
from sftcli.figures import counted
from sftcli.services.evaluate.trial.pool import question_turns
from sftcli.services.evaluate.trial.trial import rows_with_messages
from sftcli.services.generate.prompt_file import PromptRow, read_prompts
from sftcli.services.models.base import locate_base, tokenizer_folder
from sftcli.services.models.choose import ModelChoice
from sftcli.services.runs.folder import RunFolder, read_settings

_SHOWN = 5  # lines that a message names


def prompts_apart(prompts: Sequence[PromptRow], held: RunFolder | Path, session: Session) -> list[PromptRow]:
    """Return the prompts that are in no row of ``held``: the held-out rows of a run, or all of a file. The others are told.

    Raises:
        DataError: None is left, or the held-out rows are not to be had as messages.
    """
    known = _of_run(held, session) if isinstance(held, RunFolder) else _of_file(held)
    asked = [_as_row(prompt.messages, prompt.line) for prompt in prompts]
    first = {split_key(row) for row in known}
    repeats = repeated_in(mark_rows(asked), mark_rows(known))
    repeats |= np.array([split_key(row) in first for row in asked], dtype=np.bool_)
    if lines := [prompt.line for prompt, repeats_one in zip(prompts, repeats, strict=True) if repeats_one]:
        named = ", ".join(map(str, lines[:_SHOWN])) + (", ..." if len(lines) > _SHOWN else "")
        text = f"{counted(len(lines), 'prompt')} of {len(prompts):,} not asked, nearly equal to a held-out one: lines {named}"
        session.emit(Warned(text=text))
    if len(lines) == len(prompts):
        raise DataError(
            "every prompt is nearly equal to a held-out one, so that none is asked",
            hint="name other prompts with --file, or leave --apart-from out",
        )
    return [prompt for prompt, repeats_one in zip(prompts, repeats, strict=True) if not repeats_one]


def _of_run(run: RunFolder, session: Session) -> list[Conversation]:
    settings = read_settings(run)
    located = locate_base(settings.model, session.emit, run=run)
    folder = tokenizer_folder(settings, located)
    choice = ModelChoice(name=located.name, folder=folder, run=None)
    prepared = rows_with_messages(settings, choice, session)
    rows = KeptMessages(prepared.dataset, HELDOUT)
    return [_as_row(question_turns(row), row.origin.line) for row in rows]


def _of_file(path: Path) -> list[Conversation]:
    return [_as_row(prompt.messages, prompt.line) for prompt in read_prompts(path, system="")]


def _as_row(messages: Sequence[Message], line: int) -> Conversation:
    """Return a prompt in the form by which rows are compared; system texts, which many share, do not count."""
    turns = tuple(Message(role=turn.role, content=turn.content) for turn in messages if turn.role != "system")
    return Conversation(messages=turns or tuple(messages), origin=Origin(path="", line=line))
