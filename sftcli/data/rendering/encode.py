"""Drafts to token ids: all segments that are read alike with one call of the tokenizer."""

from collections.abc import Sequence
from itertools import chain

import numpy as np
import numpy.typing as npt

from sftcli.config.schema.data import Thinking
from sftcli.data.conversations.messages import Message, Role, RowFaultError
from sftcli.data.rendering.draft import Draft, Drafter
from sftcli.data.rendering.tokenizer import ChatTokenizer, Reading
from sftcli.errors import DataError


def encode(drafts: Sequence[Draft], tokenizer: ChatTokenizer) -> None:
    """Give every segment of every draft its ids, with one call for all segments that are read alike."""
    queues: dict[tuple[Reading, bool], list[tuple[Draft, int]]] = {}
    for draft in drafts:
        for index, segment in enumerate(draft.segments):
            if segment.ids is None:
                queues.setdefault((draft.reading(segment), segment.continued), []).append((draft, index))
    for (reading, continued), queue in queues.items():
        texts = [draft.segment_text(index) for draft, index in queue]
        rows = tokenizer.encode_many(texts, reading=reading, continued=continued)
        for (draft, index), ids in zip(queue, rows, strict=True):
            draft.ids[index] = ids


def laid_out(drafts: Sequence[Draft]) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.uint8]]:
    """Return the ids of ``drafts``, and what stands at each of them as ``Places``."""
    segments = [ids for draft in drafts for ids in draft.ids]
    places = np.array([segment.places for draft in drafts for segment in draft.segments], dtype=np.uint8)
    return np.array(list(chain.from_iterable(segments)), dtype=np.int32), places.repeat(
        list(map(len, segments))
    )


class PromptEncoder:
    """Prompts to ids; what was learned about shapes of conversations is kept for the next ones.

    Args:
        tokenizer: Gives template and tokens.
        allow_control_tokens: Whose contents may write control tokens, as in training.
        thinking: With ``drop`` earlier answers have none.
    """

    def __init__(
        self,
        tokenizer: ChatTokenizer,
        *,
        allow_control_tokens: frozenset[Role] = frozenset(),
        thinking: Thinking = Thinking.TRAIN,
    ) -> None:
        self._tokenizer = tokenizer
        self._drafter = Drafter(tokenizer, allow_control_tokens, thinking)

    def encode(self, messages: Sequence[Message], *, tools: str = "", variables: str = "") -> list[int]:
        """Return the ids that ask for an answer to ``messages``, as training has them before an answer.

        ``tools`` and ``variables`` are JSON text, as a ``Conversation`` has them.

        Raises:
            DataError: The template refuses the messages, or their control tokens cannot be told from the template's.
        """
        try:
            draft = self._drafter.draft_prompt(tuple(messages), tools=tools, variables=variables)
        except RowFaultError as fault:
            raise DataError(f"the prompt cannot be rendered: {fault.detail}") from fault
        encode([draft], self._tokenizer)
        return [token for part in draft.ids for token in part]


def encode_prompt(tokenizer: ChatTokenizer, messages: Sequence[Message], *, tools: str = "") -> list[int]:
    """Return the ids of one prompt, as ``PromptEncoder`` does."""
    return PromptEncoder(tokenizer).encode(messages, tools=tools)
