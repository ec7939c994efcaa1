"""Which tokens of a tokenizer steer, and which of them end an answer."""

import json
import re
import secrets
from collections.abc import Sequence

from tokenizers import AddedToken, Tokenizer

from sftcli.errors import DataError, UsageError
from sftcli.modeling.tokenizer.builtin_templates import NEEDED_TOKENS
from sftcli.modeling.tokenizer.files import TokenizerFiles

# What names itself a control token, flagged so or not; other bracketed tokens are markup.
_CONTROL_LOOK = re.compile(r"<[|\uff5c].*[|\uff5c]>")
# The same inside a text, and what steers by the habit of a family.
MARKER = re.compile(
    r"<[|\uff5c][^\s<>]{1,60}?[|\uff5c]>|<(?:start|end)_of_(?:turn|role)>|\[/?(?:INST|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_CALLS"
    r"|TOOL_RESULTS)\]|<</?SYS>>"
)


def classify(files: TokenizerFiles) -> tuple[frozenset[int], frozenset[int]]:
    """Return the ids of control and of markup tokens; tokens that are control without the flag get it.

    Those that any text may hold are neither.
    """
    control, markup = set[int](), set[int]()
    named = {*files.named.values(), *files.extra_special}
    for token, entry in files.tokenizer.get_added_tokens_decoder().items():
        text = entry.content
        if text in files.in_text:
            continue
        if entry.special or text in named or _CONTROL_LOOK.fullmatch(text):
            control.add(token)
            if not entry.special:
                files.tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False)])
        elif not (text[0].isalnum() or text[-1].isalnum() or text.replace("\u2581", " ").isspace()):
            markup.add(token)
    return frozenset(control), frozenset(markup)


def find_stop_ids(files: TokenizerFiles, stop_texts: Sequence[str]) -> frozenset[int]:
    """Return the ids at which generation stops: those that ``files`` name, and those of ``stop_texts``.

    Raises:
        UsageError: A text is no token, or there is none at all.
    """
    ids = set(files.stop_ids)
    for text in (files.named.get("eos_token"), *stop_texts):
        if text is None:
            continue
        token = files.tokenizer.token_to_id(text)
        if token is None:
            raise UsageError(
                f"the stop token {text!r} is not a token of this tokenizer", hint="name one that is"
            )
        ids.add(token)
    ids = {token for token in ids if files.tokenizer.id_to_token(token) is not None}
    if not ids:
        raise UsageError(
            "neither the tokenizer nor the generation settings define a stop token",
            hint='set "eos_token" in tokenizer_config.json',
        )
    return frozenset(ids)


def check_needed_tokens(files: TokenizerFiles, template: str) -> None:
    """Make sure that the tokenizer has the tokens that the built-in ``template`` writes.

    Raises:
        UsageError: One is missing.
    """
    missing = [text for text in NEEDED_TOKENS.get(template, ()) if files.tokenizer.token_to_id(text) is None]
    if missing:
        raise UsageError(
            f"the template {template!r} needs the tokens {' and '.join(missing)}, which this tokenizer lacks",
            hint=f"add them: --set model.new_tokens='{json.dumps(missing)}'; or choose alpaca or modern-llm, which need none",
        )


def without_control_tokens(tokenizer: Tokenizer, *, hidden: frozenset[int], prefix_space: bool) -> Tokenizer:
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
    """Make a serialized tokenizer blind for added tokens without moving the ids of the others."""
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
    """Return a serialized normalizer or pre-tokenizer that puts no space in front of a text."""
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
