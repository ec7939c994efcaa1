"""Copies of a tokenizer that do less than the original, with the same ids."""

import json
import secrets

from tokenizers import Tokenizer

from sftcli.errors import DataError


def blinded_tokenizer(tokenizer: Tokenizer, *, hidden: frozenset[int], prefix_space: bool) -> Tokenizer:
    """Return a copy of ``tokenizer`` that reads the added tokens ``hidden`` as plain text.

    Args:
        tokenizer: Left as it is.
        hidden: Ids of added tokens.
        prefix_space: Whether the copy still puts a space in front of texts, where the original does.

    Raises:
        DataError: The tokenizer's ids would change.
    """
    content = json.loads(tokenizer.to_str())
    _hide_tokens(content, hidden)
    if not prefix_space:
        for part in ("normalizer", "pre_tokenizer"):
            content[part] = _without_prefix_space(content[part])
    copy = Tokenizer.from_str(json.dumps(content))
    for token, entry in tokenizer.get_added_tokens_decoder().items():
        if token not in hidden and copy.token_to_id(entry.content) != token:
            raise DataError(
                f"the tokenizer's added tokens are not in the order of their ids: {entry.content!r}",
                hint="save the tokenizer again with transformers",
            )
    return copy


def _hide_tokens(content: dict[str, object], ids: frozenset[int]) -> None:
    """Make a serialised tokenizer blind for added tokens without moving the ids of the others."""
    added, model = content["added_tokens"], content["model"]
    assert isinstance(added, list)
    assert isinstance(model, dict)
    vocab = model["vocab"]
    known = set(vocab) if isinstance(vocab, dict) else {entry[0] for entry in vocab}
    kept = []
    for entry in added:
        if entry["id"] not in ids:
            kept.append(entry)
        elif (
            entry["content"] not in known
        ):  # its place in the list is its id: keep the place, take away the name
            kept.append({**entry, "content": f"\U000f0000{secrets.token_hex(16)}"})
    content["added_tokens"] = kept


def _without_prefix_space(part: object) -> object:
    """Return a serialised normalizer or pre-tokenizer that puts no space in front of a text."""
    if not isinstance(part, dict):
        return part
    match part.get("type"):
        case "Prepend":
            return None
        case "Metaspace":
            return {**part, "prepend_scheme": "never"}
        case "ByteLevel":
            return {**part, "add_prefix_space": False}
        case "Sequence":
            key = "normalizers" if "normalizers" in part else "pretokenizers"
            inner = [_without_prefix_space(child) for child in part[key]]
            return {**part, key: [child for child in inner if child is not None]}
    return part
