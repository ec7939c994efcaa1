"""Rows to conversations. The front of this stage: formats, messages and the reasons for rejecting a row come from here.

``detect`` finds the format of a source, ``turns`` reads lists of turns; here each format's columns become turns.
Contents stay byte for byte as they are in the row.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache

from sftcli.config.schema.data import FirstTurn, TrainOn
from sftcli.data.conversations.detect import (
    Schema,
    agreed_format,
)
from sftcli.data.conversations.formats import (
    ANSWER_COLUMNS,
    CHAT_COLUMNS,
    COLUMN_SETS,
    HISTORY_COLUMN,
    INSTRUCTIONS_COLUMN,
    PROMPT_COLUMNS,
    RATINGS,
    SYSTEM_COLUMNS,
    RowFormat,
    mixed_shapes,
)
from sftcli.data.conversations.keys.key_checks import check_keys, has_one_answer
from sftcli.data.conversations.keys.meaning import (
    OTHER_LABEL,
    Unread,
    UnreadError,
    first_filled,
    is_false,
    is_told,
    is_true,
)
from sftcli.data.conversations.keys.rivals import check_columns
from sftcli.data.conversations.messages import (
    Conversation,
    Message,
    PlainText,
    Rejected,
    RejectReason,
    Role,
    RowFault,
    TokenRow,
    wrong_type,
)
from sftcli.data.conversations.thinking import read_thinking
from sftcli.data.conversations.tokenized import read_tokens
from sftcli.data.conversations.turns import (
    build_conversation,
    is_transcript,
    json_in,
    read_transcript,
    read_turns,
    template_variables,
    tool_list,
    turns_or_text,
)
from sftcli.data.reading.record import Origin, RawRecord

Fields = Mapping[str, object]


def to_conversations(
    record: RawRecord,
    schema: Schema,
    *,
    train_on: TrainOn,
    first_turn: FirstTurn = FirstTurn.REJECT,
    read: frozenset[str] = frozenset(),
) -> tuple[Conversation | PlainText | TokenRow | Rejected, ...]:
    """Return what a row becomes: one value, several for a row with several instances, each with the row's origin.

    Args:
        record: The row.
        schema: What is known about its source.
        train_on: Which assistant turns are trained.
        first_turn: What becomes of conversations that the assistant begins.
        read: Keys that something else reads.

    Raises:
        DataError: The row is of another format than ``schema``: the file is mixed.
        UnreadError: The row says something that is not read.
    """
    fields, origin = schema.fields(record), record.origin
    if agreed_format(schema.format, fields) is None:
        raise mixed_shapes(schema.format, schema.columns, schema.first, fields, origin)
    try:
        _check_labels(fields, schema)
        _check_columns(fields, schema.format)
        rows = _ROWS[schema.format](fields) if schema.format in _ROWS else (fields,)
        for row in rows:
            check_keys(row, schema.format, read=read | schema.labels | schema.classes)
        if schema.format is RowFormat.TEXT:
            return (_plain_text(fields, origin),)
        if schema.format is RowFormat.TOKENS:
            return (read_tokens(fields, origin),)
    except RowFault as fault:
        return (Rejected(origin=origin, reason=fault.reason, detail=fault.detail),)
    return tuple([_convert(row, schema.format, origin, train_on, first_turn) for row in rows])


def _check_labels(fields: Fields, schema: Schema) -> None:
    for column in schema.labels:
        if is_false(value := fields.get(column)):
            raise RowFault(RejectReason.LABELED_BAD, f'"{column}" says that the answer is bad: {value}')
        if is_told(value) and not is_true(value):
            raise UnreadError([OTHER_LABEL.unread(column)])


def _check_columns(fields: Fields, format_: RowFormat) -> None:
    if lacking := _lacking_column(tuple(fields), format_):
        raise RowFault(RejectReason.MISSING_FIELD, f'there is no column "{lacking}"')


@lru_cache(maxsize=1024)
def _lacking_column(columns: tuple[str, ...], format_: RowFormat) -> str:
    # A Dolly row without its context is complete.
    shape = COLUMN_SETS[RowFormat.ALPACA if format_ is RowFormat.DOLLY else format_]
    return next((names[0] for names in shape.needed if not any(name in columns for name in names)), "")


def _convert(
    fields: Fields, format_: RowFormat, origin: Origin, train_on: TrainOn, first_turn: FirstTurn
) -> Conversation | Rejected:
    format_ = _READ_AS.get(format_, format_)
    try:
        turns = _TURNS[format_](fields)
        if has_one_answer(format_):
            turns = [*_history(fields), *_with_thinking(turns, fields)]
        row = build_conversation(
            turns,
            system=_system(fields),
            tools=tool_list(fields),
            variables=template_variables(fields),
            origin=origin,
            train_on=train_on,
            first_turn=first_turn,
        )
        check_columns(fields, format_, row)
        return row
    except RowFault as fault:
        return Rejected(origin=origin, reason=fault.reason, detail=fault.detail, remedy=fault.remedy)


def _with_thinking(turns: list[Message], fields: Fields) -> list[Message]:
    """Return the turns of a row of columns with the thinking of its last answer, where a column has it."""
    thinking = read_thinking(fields)
    if not thinking or not turns or turns[-1].role != "assistant":
        return turns
    if turns[-1].thinking:
        raise RowFault(RejectReason.WRONG_TYPE, "thinking stands in a column and in the turn of the answer")
    return [*turns[:-1], replace(turns[-1], thinking=thinking)]


def _history(fields: Fields) -> list[Message]:
    """Return the earlier turns of a row of columns: pairs of what the user and the assistant said."""
    if not is_told(fields.get(HISTORY_COLUMN)):
        return []
    pairs = json_in(fields[HISTORY_COLUMN], f'"{HISTORY_COLUMN}"')
    expected = "a list of [user, assistant] pairs of texts"
    if not isinstance(pairs, list):
        raise wrong_type(f'"{HISTORY_COLUMN}"', pairs, expected)
    turns = list[Message]()
    for number, pair in enumerate(pairs, 1):
        match pair:
            case [str(asked), str(answer)]:
                turns += _pair(asked, answer)
            case _:
                raise wrong_type(f'pair {number} of "{HISTORY_COLUMN}"', pair, expected)
    return turns


def _plain_text(fields: Fields, origin: Origin) -> PlainText:
    text = _text(fields, "text")
    if not text.strip():
        raise RowFault(RejectReason.EMPTY_TEXT, "the text is empty or blank")
    row = PlainText(text=text, origin=origin)
    check_columns(fields, RowFormat.TEXT, row)
    return row


def _instances(fields: Fields) -> tuple[Fields, ...]:
    """Return an Alpaca row for each instance of a row."""
    instances = fields["instances"]
    if not isinstance(instances, list) or not instances:
        raise wrong_type('"instances"', instances, "a list with at least one object")
    if stranger := next((item for item in instances if not isinstance(item, dict)), None):
        raise wrong_type('an item of "instances"', stranger, "an object with input and output")
    outer = {name: value for name, value in fields.items() if name != "instances"}
    return tuple({**outer, **instance} for instance in instances)


def _answers(one: str, several: str) -> Callable[[Fields], tuple[Fields, ...]]:
    """Return what makes a row for each answer where a row lists several."""

    def rows(fields: Fields) -> tuple[Fields, ...]:
        name = first_filled(fields, (one, several))
        answers = fields[name]
        other = one if name == several else several
        if is_told(fields.get(other)):
            what = f'"{other}" is not read beside "{name}"'
            raise UnreadError([Unread(what, "keep one of them in the row", other)])
        if name == one and not (isinstance(answers, list) and answers and isinstance(answers[0], str)):
            return (fields,)
        if not isinstance(answers, list) or not answers:
            raise wrong_type(f'"{name}"', answers, "a list of answers")
        _check_listed(fields, len(answers))
        outer = {key: value for key, value in fields.items() if key not in (one, several)}
        return tuple({**outer, one: answer} for answer in answers)

    return rows


def _check_listed(fields: Fields, count: int) -> None:
    """See that nothing beside ``count`` answers says that some of them are better, or thinks for all of them."""
    found = [
        Unread(
            f'"{key}" is not read: it may say which of the answers are good, and all would be trained',
            "write a row for each answer that is to be trained",
            key,
        )
        for key in RATINGS
        if isinstance(fields.get(key), list)
    ]
    if found:
        raise UnreadError(found)
    if count > 1 and read_thinking(fields):
        raise RowFault(RejectReason.WRONG_TYPE, "thinking stands in a column beside several answers")


def _openai_preference(fields: Fields) -> tuple[Fields, ...]:
    """Return a row of OpenAI's preference data as one with a prompt and the answer that is chosen."""
    asked = fields["input"]
    if not isinstance(asked, dict) or "messages" not in asked:
        raise wrong_type('"input"', asked, "an object with messages")
    outer = {key: value for key, value in fields.items() if key not in ("input", "preferred_output")}
    inner = {key: value for key, value in asked.items() if key != "messages"}
    return ({**outer, **inner, "prompt": asked["messages"], "chosen": fields["preferred_output"]},)


# Formats of which a row is first made one or several of another.
_ROWS: Mapping[RowFormat, Callable[[Fields], tuple[Fields, ...]]] = {
    RowFormat.INSTANCES: _instances,
    RowFormat.PROMPT_COMPLETION: _answers("completion", "completions"),
    RowFormat.PROMPT_RESPONSE: _answers("response", "responses"),
    RowFormat.OPENAI_PREFERENCE: _openai_preference,
}
_READ_AS = {
    RowFormat.INSTANCES: RowFormat.ALPACA,
    RowFormat.OPENAI_PREFERENCE: RowFormat.PREFERENCE,
}


def _text(fields: Fields, name: str) -> str:
    value = fields.get(name)
    if isinstance(value, str):
        return value
    if name not in fields:
        raise RowFault(RejectReason.MISSING_FIELD, f'there is no column "{name}"')
    raise wrong_type(f'"{name}"', value)


def _optional_text(fields: Fields, name: str) -> str:
    return "" if fields.get(name) is None else _text(fields, name)


def _system(fields: Fields) -> str:
    names: tuple[str, ...] = SYSTEM_COLUMNS
    if isinstance(fields.get("input"), list):
        names = (*names, INSTRUCTIONS_COLUMN)
    if fields.keys().isdisjoint(names):  # nearly always
        return ""
    column = first_filled(fields, names)
    if isinstance(fields.get(column), list):  # of parts, as Anthropic has it
        return turns_or_text({"role": "system", "content": fields[column]}, column, "system")[0].content
    return _optional_text(fields, column)


def _pair(user: str, answer: str) -> list[Message]:
    return [Message(role="user", content=user), Message(role="assistant", content=answer, trained=True)]


def _two_columns(prompt: str, answer: str) -> Callable[[Fields], list[Message]]:
    """Return the reader of a format with a prompt and an answer, each a text or turns."""

    def read(fields: Fields) -> list[Message]:
        return [
            *turns_or_text(fields[prompt], prompt, "user"),
            *turns_or_text(fields[answer], answer, "assistant"),
        ]

    return read


def _instruction(fields: Fields) -> list[Message]:
    """Read Alpaca and Dolly: what the instruction is about follows it behind an empty line."""
    instruction = _text(fields, "instruction")
    about = _optional_text(fields, first_filled(fields, ("input", "context")))
    parts = [part for part in (instruction, about) if part.strip()]
    return _pair("\n\n".join(parts), _text(fields, first_filled(fields, ANSWER_COLUMNS)))


def _input_output(fields: Fields) -> list[Message]:
    """Read a pair of texts, or what OpenAI's Responses were given and gave back."""
    if is_told(fields.get(INSTRUCTIONS_COLUMN)) and not isinstance(fields["input"], list):
        what = f'"{INSTRUCTIONS_COLUMN}" is not read beside an input that is a text'
        remedy = f"read both: --map instruction={INSTRUCTIONS_COLUMN}"
        raise UnreadError([Unread(what, remedy, INSTRUCTIONS_COLUMN)])
    return _two_columns("input", "output")(fields)


def _chat(fields: Fields) -> list[Message]:
    column = first_filled(fields, CHAT_COLUMNS)
    return read_turns(fields[column], column)


def _preference(fields: Fields) -> list[Message]:
    """Read the chosen side. Where it is a whole dialogue, the columns with the prompt only repeat its start."""
    chosen = _dialogue(fields["chosen"], "chosen", "assistant")
    if any(turn.role == "user" for turn in chosen):
        return chosen
    column = first_filled(fields, PROMPT_COLUMNS)
    if column not in fields:
        raise RowFault(RejectReason.MISSING_FIELD, "there is no column with a prompt")
    prompt = _dialogue(fields[column], column, "user")
    if prompt and prompt[-1].role == "assistant" and not (prompt[-1].content or prompt[-1].tool_calls):
        prompt.pop()  # a transcript ends in "Assistant:", where the answer is to follow
    return [*prompt, *chosen]


def _dialogue(value: object, column: str, role: Role) -> list[Message]:
    if isinstance(value, str) and is_transcript(value):
        return read_transcript(value)
    if isinstance(value, str) and column in CHAT_COLUMNS:
        return read_turns(value, column)
    return turns_or_text(value, column, role)


_TURNS: Mapping[RowFormat, Callable[[Fields], list[Message]]] = {
    RowFormat.ALPACA: _instruction,
    RowFormat.DOLLY: _instruction,
    RowFormat.MESSAGES: _chat,
    RowFormat.SHAREGPT: _chat,
    RowFormat.PREFERENCE: _preference,
    RowFormat.OPENORCA: _two_columns("question", "response"),
    RowFormat.PROMPT_COMPLETION: _two_columns("prompt", "completion"),
    RowFormat.PROMPT_RESPONSE: _two_columns("prompt", "response"),
    RowFormat.QUESTION_ANSWER: _two_columns("question", "answer"),
    RowFormat.INPUT_OUTPUT: _input_output,
}
