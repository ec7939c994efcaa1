"""What rendering asks of a tokenizer."""

from collections.abc import Mapping, Sequence
from typing import Literal, Protocol

Reading = Literal["template", "answer", "text"]


class ChatTokenizer(Protocol):
    """What rendering needs: a template, three readings of text, and which tokens mean something to the model.

    ``template`` reads text as the tokenizer reads any; ``answer`` leaves control tokens text; ``text`` leaves markup
    such as ``<think>`` text too.
    """

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""

    @property
    def max_chars_per_token(self) -> int:
        """No token stands for more characters of a text; 0 where that is not known."""

    @property
    def control_texts(self) -> Mapping[str, int]:
        """Text -> id of control and markup tokens."""

    @property
    def control_ids(self) -> frozenset[int]:
        """Tokens that no content may become."""

    @property
    def markup_ids(self) -> frozenset[int]:
        """Tokens that only templates and answers may write."""

    @property
    def stop_ids(self) -> frozenset[int]:
        """Tokens at which generation stops."""

    @property
    def eos_text(self) -> str:
        """The stop token for texts that bring none."""

    @property
    def text_prefix(self) -> str:
        """Control tokens that stand in front of plain text."""

    @property
    def prefix_space(self) -> Literal["never", "first", "always"]:
        """When text gets a space in front: not at all, at the start, or behind every control token too."""

    def mentions(self, text: str) -> bool:
        """Return whether the template's source holds ``text``."""

    @property
    def switches(self) -> Sequence[str]:
        """Variables that the template asks about and may be set by name, those of thinking first."""

    def render(
        self,
        messages: Sequence[Mapping[str, object]],
        *,
        tools: Sequence[object] | None,
        add_generation_prompt: bool,
        variables: Mapping[str, object] | None = None,
    ) -> str:
        """Return the template's text with ``variables`` of the row set.

        Raises:
            DataError: The template refuses; the message is its own.
        """

    def encode_many(
        self, texts: Sequence[str], *, reading: Reading, continued: bool = False
    ) -> list[list[int]]:
        """Return ids of each text; ``continued`` texts stand in the middle of others."""

    def decode_many(self, rows: Sequence[Sequence[int]]) -> list[str]:
        """Return the text of each row as it reads in the middle of a text, control tokens included."""

    def normalize(self, text: str) -> str:
        """Return the text in the normal form in which it is tokenized."""
