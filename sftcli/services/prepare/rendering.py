"""Rows to examples, batch by batch, with all that is asked about a row later, so that the row itself can be let go."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sftcli.config.schema.data import Thinking, TrainOn
from sftcli.data.conversations.as_messages import messages_line
from sftcli.data.conversations.heldout_split import row_key, source_key, split_key
from sftcli.data.conversations.messages import Conversation, Rejected, Role, TokenRow
from sftcli.data.example import Example
from sftcli.data.quality.duplicates import Marks, mark_rows
from sftcli.data.rendering.render import RenderedRows, Renderer, Row
from sftcli.modeling.tokenizer.chat_tokenizer import HFChatTokenizer
from sftcli.modeling.tokenizer.variables import Value


@dataclass(frozen=True, slots=True, kw_only=True)
class RenderOrder:
    """How rows are rendered, in whichever process. ``compares`` asks for the keys of whole rows too."""

    model_folder: Path
    template: str | None
    variables: Mapping[str, Value]
    max_tokens: int
    cuts: bool
    allow_control_tokens: frozenset[Role]
    train_on: TrainOn
    thinking: Thinking
    compares: bool
    strips_stop_text: bool = False
    keeps_messages: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class RenderedBatch:
    """What became of some rows of one source.

    ``prompts`` has the ``split_key`` of each row that is a conversation, and ``wholes`` its ``row_key``, where it is asked
    for; nothing for the others. ``marks`` are those of the rows that are kept.
    """

    results: Sequence[Example | Rejected]
    prompts: Sequence[bytes]
    wholes: Sequence[bytes]
    marks: Marks
    messages: Sequence[
        str
    ] = ()  # lines of those that are kept, where they are asked for; empty where a row has none

    @property
    def kept(self) -> list[Example]:
        """The rows that are trained or scored on."""
        return [result for result in self.results if isinstance(result, Example)]


class BatchRenderer:
    """Renders batches as ``order`` says, in this process."""

    def __init__(self, tokenizer: HFChatTokenizer, order: RenderOrder) -> None:
        self._compares, self._keeps_messages = order.compares, order.keeps_messages
        self._renderer = Renderer(
            tokenizer,
            max_tokens=order.max_tokens,
            cuts=order.cuts,
            allow_control_tokens=order.allow_control_tokens,
            train_on=order.train_on,
            thinking=order.thinking,
            strips_stop_text=order.strips_stop_text,
        )

    def render(self, rows: Sequence[Row]) -> RenderedBatch:
        """Return what becomes of ``rows``, in this thread."""
        return self._told_of(self._renderer.render_batch(rows))

    def render_all(self, batches: Iterable[Sequence[Row]]) -> Iterator[RenderedBatch]:
        """Yield what becomes of each of ``batches``, in order."""
        return map(self._told_of, self._renderer.render_all(batches))

    def _told_of(self, batch: RenderedRows) -> RenderedBatch:
        kept = [
            row
            for row, result in zip(batch.rows, batch.results, strict=True)
            if isinstance(result, Example) and not isinstance(row, Rejected)
        ]
        return RenderedBatch(
            results=[
                replace(result, row=_named(row)) if isinstance(result, Example) else result
                for row, result in zip(batch.rows, batch.results, strict=True)
            ],
            prompts=[
                split_key(row) if isinstance(row, Conversation | TokenRow) else b"" for row in batch.rows
            ],
            wholes=[
                row_key(row) if self._compares and isinstance(row, Conversation | TokenRow) else b""
                for row in batch.rows
            ],
            marks=mark_rows(kept),
            messages=[messages_line(row) for row in kept] if self._keeps_messages else (),
        )


def _named(row: Row) -> str:
    """Return the hash by which fixes name ``row``; running text has none."""
    if isinstance(row, Conversation):
        return row.row
    return source_key(row).hex() if isinstance(row, TokenRow) else ""
