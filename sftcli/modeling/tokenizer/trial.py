"""What a child does with a tokenizer and its templates before the command does: all that the command will do.

Jinja and ``tokenizers`` alone are imported, so that it costs little.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer

from sftcli.child import UnfitError
from sftcli.errors import DataError
from sftcli.modeling.tokenizer.files import max_chars_per_token, read_untried
from sftcli.modeling.tokenizer.template import ChatTemplate, TemplateRefusedError

MAX_TOKEN_ID = 10_000_000  # the largest vocabularies have under a million tokens
MAX_GROWTH = 1000  # what a character may become; compatibility forms make 18 of one
MAX_ADDED = 1000  # tokens that are put around a text
_RUNS = (
    "a",
    "ab ",
    " ",
    "\n",
    "7",
    "-",
    ".",
    "\u00e9",
    "e\u0301",
    "\u6f22",
    "\ufdfa",
    "\U0001f469\u200d",
    "\t\r",
    "<|",
    "\0",
)
_REPEATED = 2000
_CONVERSATIONS: tuple[list[dict[str, object]], ...] = (
    [{"role": "user", "content": "Is 1 a number?"}],
    [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "Is 1 a number?"},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "And 2?"},
    ],
)
_TOOLS: list[object] = [
    {"type": "function", "function": {"name": "add", "description": "", "parameters": {"type": "object", "properties": {}}}}
]  # fmt: skip


def try_tokenizer(folder: Path) -> None:
    """Build the tokenizer in ``folder``, let it read odd texts, and let its templates write.

    Raises:
        UnfitError: Its ids or what it makes of a text are out of all proportion.
        SftError: A file is damaged.
    """
    files = read_untried(folder)
    tokenizer = files.tokenizer
    for part in (tokenizer.normalizer, tokenizer.pre_tokenizer, tokenizer.decoder, tokenizer.post_processor):
        state = None if part is None else json.loads(part.__getstate__())
        if (growth := _growth(state)) > MAX_GROWTH:
            raise UnfitError(f"it makes a text up to {growth:.2g} times as long")
        if (added := sum(_added(state))) > MAX_ADDED:
            raise UnfitError(f"it puts {added} tokens around each text")
    ids = tokenizer.get_vocab(with_added_tokens=True).values()
    if (largest := max(ids, default=0)) > MAX_TOKEN_ID:
        raise UnfitError(f"it has a token with the id {largest}; the limit is {MAX_TOKEN_ID}")
    _read_odd_texts(tokenizer)
    tokenizer.to_str()
    max_chars_per_token(tokenizer)
    for name, source in files.templates.items():
        _write(source, name, dict(files.named))


def _growth(part: object) -> float:
    """Return how many times as long a part of the pipeline makes a text at most, by the texts that it puts in."""
    if isinstance(part, list):
        return math.prod(map(_growth, part))
    if not isinstance(part, dict):
        return 1
    put_in = [part.get(key) for key in ("content", "prepend", "replacement")]
    longest = max((len(text) for text in put_in if isinstance(text, str)), default=0)
    inner = [part[key] for key in ("normalizers", "pretokenizers", "decoders") if key in part]
    return max(1, longest) * math.prod(map(_growth, inner))


def _added(part: object) -> Iterator[int]:
    """Yield how many tokens each part of a post-processor puts around a text."""
    if not isinstance(part, dict):
        return
    for processor in part.get("processors", ()):
        yield from _added(processor)
    known = part.get("special_tokens")
    known = known if isinstance(known, dict) else {}
    for piece in part.get("single", ()):
        token = piece.get("SpecialToken")
        if token is not None:
            yield len(known.get(token.get("id"), {}).get("ids", ()))


def _read_odd_texts(tokenizer: Tokenizer) -> None:
    mixed = "".join(_RUNS) * (_REPEATED // 10)
    for text in (
        *(f"{run * _REPEATED}!" for run in _RUNS),
        mixed,
    ):  # what ends otherwise makes a pattern go back
        for adds in (False, True):
            ids = tokenizer.encode(text, add_special_tokens=adds).ids
            tokenizer.decode(ids, skip_special_tokens=False)


def _write(source: str, name: str, named: dict[str, object]) -> None:
    template = ChatTemplate(source, name=name)
    for messages in _CONVERSATIONS:
        for tools in (None, _TOOLS):
            try:
                template.render(messages, tools=tools, add_generation_prompt=True, variables=named)
            except TemplateRefusedError:  # of these turns; the command says of which row it is
                continue
            except DataError:
                return
