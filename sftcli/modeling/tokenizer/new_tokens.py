"""Tokens that a user adds to a tokenizer. They go into its files, so that transformers reads the same ids from them.

A new token is never split, in whose text it stands; that makes it another than markup such as ``<think>``, which users cannot
write. One that names itself a control token (``<|tool|>``, ``[INST]``) becomes one: templates alone write it, and text that
is decoded without special tokens lacks it.
"""

from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken

from sftcli import storage
from sftcli.errors import DataError
from sftcli.foreign import foreign_file, without_panics
from sftcli.json_files import read_json, replace_json
from sftcli.modeling.tokenizer.files import IN_TEXT, TokenizerFiles, read_tokenizer_files
from sftcli.modeling.tokenizer.special_tokens import MARKER


def add_tokens(folder: Path, texts: Iterable[str]) -> dict[str, int]:
    """Add ``texts``, none of which is a token yet, to the tokenizer in ``folder``; return the id of each.

    Raises:
        DataError: The tokenizer does not read one of them back.
    """
    files = read_tokenizer_files(folder)
    entries = {text: _entry(text) for text in texts}
    with foreign_file(files.path, "takes no new tokens"), without_panics():
        files.tokenizer.add_tokens(list(entries.values()))
        ids = {text: _id_of(text, files, folder) for text in entries}
    storage.replace_file(folder / "tokenizer.json", files.tokenizer.to_str(pretty=True).encode())
    path = folder / "tokenizer_config.json"
    config = read_json(path) if path.is_file() else {}
    if isinstance(listed := config.get("added_tokens_decoder"), dict):
        listed |= {str(ids[text]): _plain(entry) for text, entry in entries.items()}
    in_text = [text for text, entry in entries.items() if not entry.special]
    replace_json(path, config | {IN_TEXT: sorted({*files.in_text, *in_text})})
    return ids


def _entry(text: str) -> AddedToken:
    return AddedToken(text, special=bool(MARKER.fullmatch(text)), normalized=False)


def _id_of(text: str, files: TokenizerFiles, folder: Path) -> int:
    token = files.tokenizer.token_to_id(text)
    read = files.tokenizer.encode(f"a{text}b", add_special_tokens=False).ids
    if token is None or read.count(token) != 1:
        raise DataError(
            f"the tokenizer in {folder} does not read the new token {text!r} as one token",
            hint="choose another text for it",
        )
    return token


def _plain(entry: AddedToken) -> dict[str, object]:
    flags = ("special", "normalized", "lstrip", "rstrip", "single_word")
    return {"content": entry.content} | {name: getattr(entry, name) for name in flags}
