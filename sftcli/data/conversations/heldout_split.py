"""Which conversations are held out: decided by a hash of the prompt, so that equal prompts stay on one side.

Nothing but the seed and the prompt counts: neither the order of rows, nor the machine, nor the Python version.
"""

import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from hashlib import blake2b

from sftcli.data.conversations.messages import Conversation
from sftcli.data.reading.record import Origin

KEY_BYTES = 16


def normalize(text: str) -> str:
    """Return ``text`` so that copies that differ in case, white space or Unicode form become equal."""
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(text.lower().split())


def split_key(conversation: Conversation) -> bytes:
    """Return the hash of the first user text, normalized: conversations with the same one belong together."""
    first = next((turn.content for turn in conversation.messages if turn.role == "user"), "")
    return digest_texts([normalize(first)])


def row_key(conversation: Conversation) -> bytes:
    """Return the hash of all turns and tools, contents normalized: equal for rows that are duplicates."""
    turns = [
        part
        for turn in conversation.messages
        for part in (turn.role, normalize(turn.content), turn.tool_calls)
    ]
    return digest_texts([conversation.tools, *turns])


def digest_texts(texts: Iterable[str]) -> bytes:
    """Return the hash of a list of texts."""
    data = [text.encode() for text in texts]
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


def find_overlap(
    train: Iterable[Conversation], heldout: Iterable[Conversation], *, max_examples: int = 5
) -> Overlap:
    """Return what is on both sides. ``train`` may be a stream; of ``heldout`` two hashes per row are held."""
    held = [(split_key(row), row_key(row), row.origin) for row in heldout]
    prompts, rows = {key for key, _, _ in held}, {key for _, key, _ in held}
    seen_prompts, seen_rows = dict[bytes, Origin](), set[bytes]()
    for row in train:
        if (key := split_key(row)) in prompts:
            seen_prompts.setdefault(key, row.origin)
            if (whole := row_key(row)) in rows:
                seen_rows.add(whole)
    shared = [(seen_prompts[key], origin) for key, _, origin in held if key in seen_prompts]
    return Overlap(
        heldout_rows=len(held),
        same_prompt=len(shared),
        same_row=sum(key in seen_rows for _, key, _ in held),
        examples=tuple(shared[:max_examples]),
    )
