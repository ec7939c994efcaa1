"""Stop tokens that are written as text at the end of answers, by whoever joined rows to strings for another model."""

from collections.abc import Iterable
from dataclasses import replace

from sftcli.data.conversations.messages import Conversation, Message

# Of many models. A row may have been written for any of them.
_KNOWN = (
    "</s>",
    "<eos>",
    "<end_of_turn>",
    "<turn|>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|end_of_turn|>",
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
)


class StopTexts:
    """Finds the texts of stop tokens at the end of answers: of ``own``, and of those that are widely known."""

    def __init__(self, own: Iterable[str]) -> None:
        self._texts = tuple(dict.fromkeys((*own, *_KNOWN)))

    def ends(self, message: Message) -> bool:
        """Return whether a message is an answer that ends in one."""
        return message.role == "assistant" and message.content.rstrip().endswith(self._texts)

    def strip(self, row: Conversation) -> Conversation:
        """Return ``row`` without them; the white space behind them goes too."""
        if not any(map(self.ends, row.messages)):
            return row
        return replace(row, messages=tuple(map(self._stripped, row.messages)))

    def _stripped(self, message: Message) -> Message:
        while self.ends(message):
            text = message.content.rstrip()
            end = max((stop for stop in self._texts if text.endswith(stop)), key=len)
            message = replace(message, content=text.removesuffix(end))
        if message.without_loss:
            size = len(message.content)
            edges = [min(edge, size) for edge in message.without_loss]
            pairs = zip(edges[::2], edges[1::2], strict=True)
            message = replace(
                message, without_loss=tuple(edge for pair in pairs if pair[0] < pair[1] for edge in pair)
            )
        return message
