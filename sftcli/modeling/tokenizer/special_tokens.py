"""Which tokens of a tokenizer steer, and which of them end an answer."""

import re
from collections.abc import Sequence

from tokenizers import AddedToken

from sftcli.errors import UsageError
from sftcli.modeling.tokenizer.builtin_templates import NEEDED_TOKENS
from sftcli.modeling.tokenizer.files import TokenizerFiles

# What names itself a control token, flagged so or not; other bracketed tokens are markup.
_CONTROL_LOOK = re.compile(r"<[|\uff5c].*[|\uff5c]>")


def classify(files: TokenizerFiles) -> tuple[frozenset[int], frozenset[int]]:
    """Return the ids of control and of markup tokens; tokens that are control without the flag get it."""
    control, markup = set[int](), set[int]()
    named = {*files.named.values(), *files.extra_special}
    for token, entry in files.tokenizer.get_added_tokens_decoder().items():
        text = entry.content
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
            "neither the tokenizer nor the generation settings name a token that ends an answer",
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
            hint="choose alpaca or modern-llm, which need none",
        )
