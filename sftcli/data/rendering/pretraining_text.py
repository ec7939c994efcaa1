"""Running text that is longer than a row: cut into rows, so that all of it is trained on."""

from dataclasses import replace

from sftcli.data.example import Example

NO_LIMIT = 2**31


def cut_text(example: Example, max_tokens: int) -> list[Example]:
    """Return ``example``, a piece of running text, in pieces of at most ``max_tokens`` tokens, at least 2.

    Each piece begins with the last token of the one before, which has no loss there. So every token but the first of
    the whole is predicted exactly once, and no piece is without loss.
    """
    if len(example.input_ids) <= max_tokens:
        return [example]
    pieces = []
    for begin in range(0, len(example.input_ids) - 1, max_tokens - 1):
        loss_mask = example.loss_mask[begin : begin + max_tokens].copy()
        loss_mask[0] = False
        ids = example.input_ids[begin : begin + max_tokens]
        pieces.append(replace(example, input_ids=ids, loss_mask=loss_mask))
    return pieces
