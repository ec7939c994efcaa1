"""Which conversations are held out: decided by a hash of the prompt, so that equal prompts stay on one side.

Nothing but the seed and the prompt counts: neither the order of rows, nor the machine, nor the Python version.
"""

import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from hashlib import blake2b

from sftcli.data.conversations.messages import Conversation, TokenRow
from sftcli.data.reading.record import Origin

KEY_BYTES = 16


def normalize(text: str) -> str:
    """Return ``text`` so that copies that differ in case, white space or Unicode form become equal."""
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(text.lower().split())


def split_key(conversation: Conversation | TokenRow) -> bytes:
    """Return the hash of the first user text, normalized: conversations with the same one belong together.

    Of tokens it is that of those in front of the first trained one.
    """
    if isinstance(conversation, TokenRow):
        return digest_texts(
            ["tokens", *map(str, conversation.input_ids[: conversation.loss_mask.index(True)])]
        )
    first = next((turn.content for turn in conversation.messages if turn.role == "user"), "")
    return digest_texts([normalize(first)])


def row_key(conversation: Conversation | TokenRow) -> bytes:
    """Return the hash of all turns and tools, contents normalized, or of all tokens: equal for rows that are duplicates."""
    if isinstance(conversation, TokenRow):
        return digest_texts(["tokens", *map(str, conversation.input_ids)])
    turns = [
        part
        for turn in conversation.messages
        for part in (turn.role, normalize(turn.content), turn.tool_calls)
    ]
    return digest_texts([conversation.tools, *turns])


def source_key(row: Conversation | TokenRow) -> bytes:
    """Return the hash of all that the source says: as ``row_key``, and two rows that think otherwise or set other template variables differ."""
    key = row_key(row)
    if isinstance(row, TokenRow):
        return key
    thoughts = [turn.thinking and normalize(turn.thinking) for turn in row.messages]
    return digest_texts([key.hex(), row.variables, *thoughts]) if row.variables or any(thoughts) else key


def digest_texts(texts: Iterable[str]) -> bytes:
    """Return the hash of a list of texts."""
    data = [text.encode("utf-8", "surrogatepass") for text in texts]  # half a pair is rejected later, by name
    # The length goes first, so that no two lists of texts give the same bytes.
    framed = [part for text in data for part in (len(text).to_bytes(8, "big"), text)]
    return blake2b(b"".join(framed), digest_size=KEY_BYTES).digest()


def _rank(key: bytes, seed: int) -> int:
    """Return the place of a key in the order that ``seed`` makes, in [0, 2**64)."""
    return int.from_bytes(
        blake2b(key, digest_size=8, key=seed.to_bytes(8, "big", signed=True)).digest(), "big"
    )


def choose_heldout(
    rows_per_key: Mapping[bytes, int], *, fraction: float, max_rows: int, seed: int
) -> frozenset[bytes]:
    """Return the split keys that are held out, so that they hold about ``fraction`` of the rows.

    Keys are taken in the order of ``seed`` as long as their rows fit into the fraction and into ``max_rows``. There is at
    least one, the smallest, when the fraction is above 0 and there are at least two keys; one always stays for training.
    """
    if fraction <= 0 or len(rows_per_key) < 2:
        return frozenset()
    room = min(max_rows, max(1, round(fraction * sum(rows_per_key.values()))))
    order = sorted(rows_per_key, key=lambda key: (_rank(key, seed), key))
    chosen = set[bytes]()
    for key in order:
        if rows_per_key[key] <= room and len(chosen) < len(order) - 1:
            chosen.add(key)
            room -= rows_per_key[key]
    return frozenset(chosen) or frozenset({min(order, key=lambda key: rows_per_key[key])})


@dataclass(frozen=True, slots=True, kw_only=True)
class Overlap:
    """How many held-out rows are in the training rows too."""

    heldout_rows: int
    same_prompt: int  # held-out rows whose first user text a training row has
    same_row: int  # held-out rows that a training row equals in all turns
    examples: tuple[tuple[Origin, Origin], ...]  # (training, held-out) of the same prompt, the first few


class OverlapFinder:
    """Finds what is on both sides: takes all held-out rows first, and holds two hashes of each, then those trained on.

    A row is known by its ``split_key`` and its ``row_key``.
    """

    def __init__(self, *, max_examples: int = 5) -> None:
        self._max_examples = max_examples
        self._held: list[tuple[bytes, bytes, Origin]] = []
        self._first_trained: dict[bytes, Origin | None] = {}  # by the prompt of a held-out row
        self._is_trained: dict[bytes, bool] = {}  # by the key of a held-out row

    def add_heldout(self, prompt: bytes, whole: bytes, origin: Origin) -> None:
        """Take a row that is held out."""
        self._held.append((prompt, whole, origin))
        self._first_trained[prompt], self._is_trained[whole] = None, False

    def add_trained(self, prompt: bytes, whole: bytes, origin: Origin) -> None:
        """Take a row that is trained on."""
        if prompt in self._first_trained:
            self._first_trained[prompt] = self._first_trained[prompt] or origin
        if whole in self._is_trained:
            self._is_trained[whole] = True

    def find(self) -> Overlap:
        """Return what is on both sides."""
        shared = [
            (first, origin)
            for key, _, origin in self._held
            if (first := self._first_trained[key]) is not None
        ]
        return Overlap(
            heldout_rows=len(self._held),
            same_prompt=len(shared),
            same_row=sum(self._is_trained[key] for _, key, _ in self._held),
            examples=tuple(shared[: self._max_examples]),
        )
