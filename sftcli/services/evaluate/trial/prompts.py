"""Prompts with examples: whole training rows as earlier turns, as many as fit, the best one next to the question."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain

from sftcli.config.schema.data import DataSettings
from sftcli.data.conversations.messages import Conversation, Message
from sftcli.data.rendering.encode import PromptEncoder
from sftcli.data.rendering.prompts import is_empty_thought
from sftcli.errors import DataError, UsageError
from sftcli.modeling.tokenizer.chat_tokenizer import HFChatTokenizer
from sftcli.modeling.tokenizer.template import TemplateRefusedError
from sftcli.services.evaluate.scoring import HeldoutQuestion
from sftcli.services.evaluate.trial.pool import question_turns, turns_of

_TURNS = (("user", "qzxa"), ("assistant", "qzxb"), ("user", "qzxc"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A held-out row that is asked: its number among them, the row, and the question that it is without examples.

    The question ends with ``lead``, behind what asks for an answer: the empty thought of rows that do not think, or nothing.
    """

    number: int
    row: Conversation
    question: HeldoutQuestion
    lead: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ShownPrompt:
    """A question behind its examples, as ids and as ``messages``."""

    question: HeldoutQuestion
    messages: tuple[Message, ...]
    shots: int
    is_clipped: bool  # there are more examples than had room


def encoder_of(tokenizer: HFChatTokenizer, data: DataSettings) -> PromptEncoder:
    """Return what makes prompts of ``data`` as training has them."""
    return PromptEncoder(
        tokenizer,
        allow_control_tokens=frozenset(author.value for author in data.control_tokens_from),
        thinking=data.thinking,
    )


def asked_of(
    number: int,
    row: Conversation,
    question: HeldoutQuestion,
    encoder: PromptEncoder,
    tokenizer: HFChatTokenizer,
) -> Asked | None:
    """Return what is asked; None where ``question`` is not all of ``row`` before its answer, and nothing of that answer."""
    turns = question_turns(row)
    if not any(turn.role == "user" for turn in turns):
        return None
    try:
        ids = tuple(encoder.encode(turns, tools=row.tools, variables=row.variables))
    except DataError:
        return None
    lead = question.prompt_ids[len(ids) :]
    if ids + lead != question.prompt_ids or not is_empty_thought(tokenizer.decode(lead, skip_special=False)):
        return None
    return Asked(number=number, row=row, question=question, lead=lead)


def require_turns(tokenizer: HFChatTokenizer, row: Conversation) -> None:
    """See that the template shows earlier turns, behind the system text of ``row``.

    Raises:
        UsageError: It refuses them, or leaves them out.
    """
    system = [message for message in row.messages[:1] if message.role == "system"]
    messages = [{"role": turn.role, "content": turn.content} for turn in system]
    messages += [{"role": role, "content": text} for role, text in _TURNS]
    why = "it leaves them out"
    try:
        text = tokenizer.render(messages, tools=None, add_generation_prompt=True)
    except TemplateRefusedError as error:
        text, why = "", error.message
    places = [text.find(content) for _, content in _TURNS]
    if places != sorted(places) or min(places) < 0:
        raise UsageError(
            f"no examples can stand in a prompt: the chat template {tokenizer.template_name} takes no earlier turns ({why})",
            hint="ask with the prompt alone: --shots 0; or choose another --template",
        )


def with_examples(
    asked: Asked, examples: Sequence[Conversation], encoder: PromptEncoder, *, room: int
) -> ShownPrompt:
    """Return the question behind the first of ``examples``, as many as ``room`` tokens have place for, the first one last.

    Raises:
        DataError: The template refuses the turns of a row.
    """

    def ids_with(count: int) -> tuple[int, ...]:
        messages = _messages(asked.row, examples[:count])
        try:
            ids = encoder.encode(messages, tools=asked.row.tools, variables=asked.row.variables)
            return (*ids, *asked.lead)
        except DataError as error:
            raise DataError(
                f"{asked.question.origin}: examples cannot stand before it: {error.message}",
                hint="ask with the prompt alone: --shots 0",
            ) from error

    shots = bisect_right(range(1, len(examples) + 1), room, key=lambda count: len(ids_with(count)))
    ids = ids_with(shots) if shots else asked.question.prompt_ids
    return ShownPrompt(
        question=replace(asked.question, prompt_ids=ids),
        messages=tuple(_messages(asked.row, examples[:shots])),
        shots=shots,
        is_clipped=shots < len(examples),
    )


def _messages(row: Conversation, examples: Sequence[Conversation]) -> list[Message]:
    turns = question_turns(row)
    own = turns_of(replace(row, messages=turns))
    system = turns[: len(turns) - len(own)]
    shown = chain.from_iterable(turns_of(example) for example in reversed(examples))
    return [*system, *shown, *own]
