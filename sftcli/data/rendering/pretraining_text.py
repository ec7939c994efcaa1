"""Pretraining text that is mixed into training: rendered, counted, and cut into rows so that all of it is trained on."""

from collections.abc import Iterator, Sequence
from itertools import chain

from sftcli.data.conversations.messages import Conversation, PlainText, Rejected, TokenRow
from sftcli.data.example import Example
from sftcli.data.quality.audit import SupervisionAudit
from sftcli.data.rendering.render import Renderer, Row, row_batches
from sftcli.data.rendering.tokenizer import ChatTokenizer
from sftcli.data.rendering.truncation import cut_text
from sftcli.errors import DataError, Location

NO_LIMIT = 2**31


class PlainTextShare:
    """Makes examples of plain text.

    Args:
        tokenizer: Gives the tokens, the first one and the last one of every text included.
        max_tokens: A longer text becomes several examples.
        audit: Counts the examples as rows.
    """

    def __init__(self, tokenizer: ChatTokenizer, *, max_tokens: int, audit: SupervisionAudit) -> None:
        self._renderer = Renderer(tokenizer, max_tokens=NO_LIMIT)
        self._max_tokens = max_tokens
        self._audit = audit
        self._texts = self._long = self._pieces = 0

    def take(self, rows: Sequence[Row], *, source: str) -> Iterator[Example]:
        """Yield the examples of ``rows`` of ``source``.

        Raises:
            DataError: One of them is a conversation.
        """
        rendered = self._renderer.render_all(row_batches(map(_plain, rows)))
        for result in chain.from_iterable(batch.results for batch in rendered):
            self._texts += 1
            if not isinstance(result, Example):
                self._audit.add(result, source=source)
                continue
            pieces = cut_text(result, self._max_tokens)
            if len(pieces) > 1:
                self._long += 1
                self._pieces += len(pieces)
            for piece in pieces:
                self._audit.add(piece, source=source)
                yield piece

    def note_cuts(self) -> None:
        """Say in the audit how many texts became several examples."""
        if self._long:
            self._audit.note(
                f"{self._long} of {self._texts} texts are longer than {self._max_tokens} tokens and became"
                f" {self._pieces} rows; nothing of them was left out"
            )


def _plain(row: Row) -> PlainText | Rejected:
    if isinstance(row, Conversation | TokenRow):
        what = "a conversation" if isinstance(row, Conversation) else "a row of token ids"
        raise DataError(
            f"{row.origin} is {what}, expected pretraining text in a column `text`",
            hint="name conversations with --data, and texts in data.text_sources",
            location=Location(file=row.origin.path, line=row.origin.line),
        )
    return row
