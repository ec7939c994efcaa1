"""Tokens to text as they come: whole characters only, and nothing of a text that ends the answer."""

from collections.abc import Sequence

from sftcli.modeling.tokenizer.chat_tokenizer import HFChatTokenizer

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_CONTEXT_TOKENS = 6  # decoders look at few tokens before a token


class AnswerText:
    """The text of one answer.

    ``push`` costs the same however long the answer is. Characters whose bytes are not all there, and the beginning of what
    may become a stop text, are held back until it is clear what they are.

    Args:
        tokenizer: Decodes.
        stops: Texts that end the answer; the first of them and all behind it is left out.
    """

    def __init__(self, tokenizer: HFChatTokenizer, stops: Sequence[str] = ()) -> None:
        self.tokenizer = tokenizer
        self.stops = tuple(stops)
        self.text = ""
        self.is_over = False
        self._ids: list[int] = []
        self._context, self._read = (
            0,
            0,
        )  # tokens from `_context` are decoded; those before `_read` are in `text`
        self._given = 0  # characters handed out

    def push(self, token: int) -> str:
        """Add a token; return the text that is certain now and was not before."""
        self._ids.append(token)
        if self.is_over:
            return ""
        known = self._decode(self._ids[self._context : self._read])
        whole = self._decode(self._ids[self._context :])
        if whole.endswith(_REPLACEMENT) or len(whole) <= len(known):
            return ""
        self.text += whole[len(known) :]
        self._read = len(self._ids)
        self._context = max(self._context, self._read - _CONTEXT_TOKENS)
        self._cut()
        return self._give(len(self.text) - self._held())

    def close(self) -> str:
        """End the answer; return the rest of its text. ``text`` is then whole."""
        if not self.is_over:
            self.text = self._decode(self._ids)
            self._cut()
        return self._give(len(self.text))

    def _decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids, skip_special=False)

    def _cut(self) -> None:
        found = [place for stop in self.stops if (place := self.text.find(stop)) >= 0]
        if found:
            self.text, self.is_over = self.text[: min(found)], True

    def _held(self) -> int:
        """Return how many characters at the end may be the beginning of a stop text."""
        if self.is_over:
            return 0
        return max(
            (
                size
                for stop in self.stops
                for size in range(1, min(len(stop), len(self.text)) + 1)
                if self.text.endswith(stop[:size])
            ),
            default=0,
        )

    def _give(self, end: int) -> str:
        piece = self.text[self._given : end]
        self._given = max(self._given, end)
        return piece
