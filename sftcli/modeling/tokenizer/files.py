"""The files of a tokenizer folder, read and checked: what is there, which template, which tokens end an answer."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, Tokenizer

from sftcli.child import try_first
from sftcli.errors import DataError, Location, NotFoundError
from sftcli.foreign import foreign_file, refuse_pointer, without_panics
from sftcli.input_files import read_whole, read_whole_text
from sftcli.json_files import read_json

NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
DEFAULT_TEMPLATE = "default"
_TEMPLATE_FILE = "chat_template.jinja"
_CONFIGS = ("special_tokens_map.json", "tokenizer_config.json")  # the later one goes before the other
_AGAIN = "download the model again"
_MAX_ID = 2**32 - 1  # of the library
IN_TEXT = "sft_tokens_in_text"  # key of tokenizer_config.json


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerFiles:
    """The contents of a tokenizer folder.

    ``templates`` is name -> Jinja source, empty where the folder brings none. ``named`` is what the configuration calls
    ``bos_token`` and so on. ``in_text`` are tokens that any text may hold, whatever they look like. ``stop_ids`` is what the
    generation settings name. ``digest`` is of ``tokenizer.json``, which stands at ``path``.
    """

    tokenizer: Tokenizer
    named: Mapping[str, str]
    extra_special: tuple[str, ...]
    in_text: frozenset[str]
    templates: Mapping[str, str]
    stop_ids: tuple[int, ...]
    digest: str
    path: Path


def read_tokenizer_files(folder: Path) -> TokenizerFiles:
    """Read ``folder``; neither code nor pickles in it are touched.

    Raises:
        NotFoundError: There is no ``tokenizer.json``.
        DataError: A file is damaged, its parts do not fit together, or a child did not get through it (see ``trial``).
    """
    if (folder / "tokenizer.json").is_file():
        try_first(
            "sftcli.modeling.tokenizer.trial:try_tokenizer",
            folder,
            _digest_of(folder),
            versions=tokenizers.__version__,
            name=str(folder / "tokenizer.json"),
        )
    with without_panics():
        return read_untried(folder)


def _digest_of(folder: Path) -> str:
    """Return the hash of all that makes a tokenizer and its templates."""
    digest = hashlib.sha256()
    for path in (*(folder / name for name in ("tokenizer.json", *_CONFIGS)), *_template_files(folder)):
        if path.is_file():
            content = read_whole(path)
            digest.update(f"{path.name}\0{len(content)}\0".encode("utf-8", "surrogateescape"))
            digest.update(content)
    return digest.hexdigest()


def read_untried(folder: Path) -> TokenizerFiles:
    """Read ``folder`` as ``read_tokenizer_files``, which may end the process: for the child that tries it."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise NotFoundError(
            f"there is no tokenizer.json in {folder}",
            hint="put one there (transformers writes it with save_pretrained); sft generate takes another one with --tokenizer DIR",
        )
    with foreign_file(path, "is not a tokenizer", hint=_AGAIN):
        content = read_whole(path)
        tokenizer = Tokenizer.from_str(content.decode())
        tokenizer.no_truncation()  # a saved limit would cut rows without a word
        tokenizer.no_padding()
    config = {key: value for name in _CONFIGS for key, value in _read_object(folder / name).items()}
    with foreign_file(folder / "tokenizer_config.json", "does not fit tokenizer.json", hint=_AGAIN):
        _add_missing_tokens(tokenizer, config, path)
    named = {name: text for name in NAMED_TOKENS if (text := _token_text(config.get(name)))}
    return TokenizerFiles(
        tokenizer=tokenizer,
        named=named,
        extra_special=_extra_special(config),
        in_text=frozenset(_texts(config.get(IN_TEXT))),
        templates=_templates(folder, config),
        stop_ids=_stop_ids(folder),
        digest=hashlib.sha256(content).hexdigest(),
        path=path,
    )


def _read_object(path: Path) -> dict[str, object]:
    return read_json(path, hint=_AGAIN) if path.is_file() else {}


def _token_text(value: object) -> str:
    """Return the text of a token that is written as a string or as an object."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else ""


def _extra_special(config: Mapping[str, object]) -> tuple[str, ...]:
    texts: list[str] = []
    for key in ("additional_special_tokens", "extra_special_tokens"):
        values = config.get(key)
        texts += _texts(list(values.values()) if isinstance(values, dict) else values)
    return tuple(texts)


def _texts(values: object) -> list[str]:
    return [text for value in values if (text := _token_text(value))] if isinstance(values, list) else []


def _add_missing_tokens(tokenizer: Tokenizer, config: Mapping[str, object], path: Path) -> None:
    """Add the tokens that only ``tokenizer_config.json`` knows, under the ids it gives them."""
    listed = config.get("added_tokens_decoder")
    if not isinstance(listed, dict):
        return
    for key, value in sorted(listed.items(), key=lambda item: int(item[0])):
        text = _token_text(value)
        if not text or not isinstance(value, dict) or tokenizer.token_to_id(text) is not None:
            continue
        flags = {
            name: bool(value.get(name, False)) for name in ("lstrip", "rstrip", "single_word", "normalized")
        }
        tokenizer.add_tokens([AddedToken(text, special=bool(value.get("special", False)), **flags)])
        if tokenizer.token_to_id(text) != int(key):
            raise DataError(
                f"token {text!r} has id {key} in tokenizer_config.json and another in {path}",
                hint="the two files belong to different tokenizers; download the model again",
            )


def _templates(folder: Path, config: Mapping[str, object]) -> dict[str, str]:
    """Return name -> source; files go before the configuration, as transformers has it."""
    own = folder / _TEMPLATE_FILE
    if templates := {
        DEFAULT_TEMPLATE if file == own else file.stem: _read_text(file) for file in _template_files(folder)
    }:
        return templates
    match config.get("chat_template"):
        case str() as source:
            return {DEFAULT_TEMPLATE: source}
        case list() as entries:
            return {
                str(entry["name"]): str(entry["template"])
                for entry in entries
                if isinstance(entry, dict) and "name" in entry and "template" in entry
            }
    return {}


def _template_files(folder: Path) -> list[Path]:
    own = folder / _TEMPLATE_FILE
    return [
        *([own] if own.is_file() else []),
        *sorted((folder / "additional_chat_templates").glob("*.jinja")),
    ]


def _read_text(path: Path) -> str:
    with foreign_file(path, "is not UTF-8 text", hint=_AGAIN):
        refuse_pointer(path, str(path))
        return read_whole_text(path)


def _stop_ids(folder: Path) -> tuple[int, ...]:
    """Return the ids at which generation stops by the model's settings.

    Raises:
        DataError: One is none that a token can have.
    """
    for name in ("generation_config.json", "config.json"):
        value = _read_object(folder / name).get("eos_token_id")
        ids = value if isinstance(value, list) else [value]
        found = tuple(token for token in ids if isinstance(token, int))
        if strange := [token for token in found if isinstance(token, bool) or not 0 <= token <= _MAX_ID]:
            path = folder / name
            raise DataError(
                f"{path}: eos_token_id holds {json.dumps(strange[0]):.40}, which is no id of a token",
                hint="correct it, or download the model again",
                location=Location(file=str(path), key="eos_token_id"),
            )
        if found:
            return found
    return ()


def max_chars_per_token(tokenizer: Tokenizer) -> int:
    """Return the maximum number of text characters of a token; 0 if unbounded."""
    model = tokenizer.model
    if getattr(model, "unk_token", None) and not getattr(model, "byte_fallback", False):
        return 0  # one unknown token may stand for a whole text
    shrinks = 1 if tokenizer.normalizer is None else 4  # by composing letters with their marks
    return shrinks * max(map(len, tokenizer.get_vocab()))
