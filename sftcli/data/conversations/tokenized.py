"""Rows of token ids that something else made: what can be told of them without a text.

Which tokens are trained is said by labels, where -100 is none, or by a mask. A label has to be the token itself: a label
of the token behind it would train the model to predict two tokens ahead. Padding is taken off.
"""

from collections.abc import Mapping, Sequence
from itertools import groupby

from sftcli.data.conversations.keys.meaning import Unread, UnreadError
from sftcli.data.conversations.messages import RejectReason, RowFault, TokenRow, wrong_type
from sftcli.data.reading.record import Origin

MASK_COLUMNS = ("loss_mask", "completion_mask", "assistant_masks")
ID_COLUMN, LABELS_COLUMN, PADDING_COLUMN = "input_ids", "labels", "attention_mask"
POSITIONS_COLUMN = "position_ids"
NO_LOSS = -100


def read_tokens(fields: Mapping[str, object], origin: Origin) -> TokenRow:
    """Return a row of token ids.

    Raises:
        RowFault: The columns do not fit each other, or nothing is trained.
        UnreadError: Several texts are packed into the row.
    """
    ids = _numbers(fields, ID_COLUMN)
    begin, end = _unpadded(fields, ids)
    if fields.get(POSITIONS_COLUMN) is not None:
        positions = _column(fields, POSITIONS_COLUMN, ids)[begin:end]
        if positions != list(range(positions[0], positions[0] + len(positions))):
            what = f'"{POSITIONS_COLUMN}" is not read: it packs several texts into a row, and they would see each other'
            raise UnreadError([Unread(what, "write a row for each of them", POSITIONS_COLUMN)])
    trained = _trained(fields, ids)
    if any(trained[:begin]) or any(trained[end:]):
        raise RowFault(RejectReason.WRONG_TYPE, f'"{PADDING_COLUMN}" hides a token that is trained')
    is_text = all(trained[begin:end])
    trained, ids = [False, *trained[begin + 1 : end]], ids[begin:end]  # nothing comes before the first token
    if not any(trained):
        raise RowFault(RejectReason.NOTHING_TRAINED, "no token behind the first is trained")
    return TokenRow(
        input_ids=tuple(ids),
        loss_mask=tuple(trained),
        origin=origin,
        num_trained_turns=0 if is_text else sum(is_run for is_run, _ in groupby(trained)),
    )


def _numbers(fields: Mapping[str, object], name: str) -> list[int]:
    value = fields.get(name)
    if not isinstance(value, list) or not value:
        raise wrong_type(f'"{name}"', value, "a list with at least one number")
    if stranger := [number for number in value if not isinstance(number, int)]:
        raise wrong_type(f'an item of "{name}"', stranger[0], "a whole number")
    return value


def _column(fields: Mapping[str, object], name: str, ids: Sequence[int]) -> list[int]:
    """Return a column beside the ids, which has as many numbers."""
    numbers = _numbers(fields, name)
    if len(numbers) != len(ids):
        detail = f'"{name}" has {len(numbers)} numbers, "{ID_COLUMN}" has {len(ids)}'
        raise RowFault(RejectReason.WRONG_TYPE, detail)
    return numbers


def _zeros_and_ones(fields: Mapping[str, object], name: str, ids: Sequence[int]) -> list[bool]:
    numbers = _column(fields, name, ids)
    if other := next((number for number in numbers if number not in (0, 1)), None):
        raise RowFault(RejectReason.WRONG_TYPE, f'"{name}" holds {other}, expected 0 or 1')
    return [number == 1 for number in numbers]


def _unpadded(fields: Mapping[str, object], ids: Sequence[int]) -> tuple[int, int]:
    """Return where the tokens begin and end that are no padding."""
    if fields.get(PADDING_COLUMN) is None:
        return 0, len(ids)
    seen = _zeros_and_ones(fields, PADDING_COLUMN, ids)
    begin = seen.index(True) if any(seen) else len(ids)
    end = begin + sum(seen)
    if not all(seen[begin:end]) or begin == end:
        what = "nothing but padding" if begin == end else "padding between tokens"
        raise RowFault(RejectReason.WRONG_TYPE, f'"{PADDING_COLUMN}" says that there is {what}')
    return begin, end


def _trained(fields: Mapping[str, object], ids: Sequence[int]) -> list[bool]:
    """Return which tokens are trained; all but padding where nothing is said."""
    said = {name: _zeros_and_ones(fields, name, ids) for name in MASK_COLUMNS if fields.get(name) is not None}
    if fields.get(LABELS_COLUMN) is not None:
        labels = _column(fields, LABELS_COLUMN, ids)
        for place, (label, token) in enumerate(zip(labels, ids, strict=True)):
            if label not in (NO_LOSS, token):
                detail = f'"{LABELS_COLUMN}" has {label} at {place}, where the token is {token}'
                raise RowFault(
                    RejectReason.WRONG_TYPE, f"{detail}: labels are the tokens themselves, or -100"
                )
        said[LABELS_COLUMN] = [label != NO_LOSS for label in labels]
    if not said:
        padding = fields.get(PADDING_COLUMN)
        return [True] * len(ids) if padding is None else _zeros_and_ones(fields, PADDING_COLUMN, ids)
    first, *others = said
    if other := next((name for name in others if said[name] != said[first]), None):
        raise RowFault(RejectReason.WRONG_TYPE, f'"{first}" and "{other}" say differently what is trained')
    return said[first]
