"""Turn a ``.pt`` file of the Modern LLM pipeline and a tokenizer into a model folder in the cache, once."""

import hashlib
from pathlib import Path

from sftcli import storage
from sftcli.cache import CACHE_HINT
from sftcli.errors import MismatchError
from sftcli.events import EventSink, Notice
from sftcli.input_files import read_whole
from sftcli.json_files import write_json
from sftcli.modeling.formats.cached_source import CachedSource, file_sizes, whole_source, write_source
from sftcli.modeling.formats.gguf.gguf_import import models_folder
from sftcli.modeling.hub.snapshot import Patience, cached_snapshot, fetch_snapshot
from sftcli.modeling.tokenizer.builtin_templates import MODERN_LLM
from sftcli.modeling.tokenizer.chat_tokenizer import load_chat_tokenizer

DEFAULT_TOKENIZER = "gpt2"
_FORMAT = 1


def converted_pt(path: Path, *, tokenizer: str | None, emit: EventSink) -> tuple[Path, str]:
    """Return the model folder made of ``path``, and the file's SHA-256; convert it if not cached.

    Args:
        path: The file.
        tokenizer: A folder or a hub name; None takes ``gpt2``.
        emit: Told before a conversion.

    Raises:
        DataError, MismatchError: The file is damaged or does not fit its configuration, or the tokenizer has more
            tokens than the model.
        NotFoundError, NetworkError: The tokenizer is not there.
    """
    digest = storage.file_sha256(path)
    name = tokenizer or DEFAULT_TOKENIZER
    source = _tokenizer_here(name)
    if source is None:
        from sftcli.modeling.formats.pt_file import read_pt

        read_pt(path)  # what is wrong with the file itself comes before a download
        source = fetch_snapshot(name, revision=None, emit=emit, patience=Patience(), weights=False).folder
    key = hashlib.sha256(f"{_FORMAT}:{digest}:{_tokenizer_hash(source)}".encode()).hexdigest()
    folder = models_folder() / f"modern-lm-{key[:16]}"
    source_of = whole_source(folder)
    if source_of is not None and source_of.pt_sha256 == digest:
        return folder, digest
    _convert(path, folder, source, digest, emit)
    return folder, digest


def _convert(path: Path, folder: Path, source: Path, digest: str, emit: EventSink) -> None:
    from sftcli.modeling.formats.folder_write import copy_tokenizer
    from sftcli.modeling.formats.pt_file import read_pt, write_model_folder

    checkpoint = read_pt(path)
    emit(Notice(text=f"converting {path.name} to a model folder, once"))
    with storage.atomic_folder(folder, hint=CACHE_HINT) as fresh:
        write_model_folder(checkpoint, fresh)
        copy_tokenizer(source, fresh)
        storage.write_file(fresh / "chat_template.jinja", [MODERN_LLM.encode("utf-8")])
        chat = load_chat_tokenizer(fresh)
        rows = checkpoint.config["vocab_size"]
        assert isinstance(rows, int)
        if chat.vocab_size > rows:
            raise MismatchError(
                f"the tokenizer {source} has {chat.vocab_size} tokens, but {path} has embeddings for {rows}",
                hint="name the tokenizer that the model was trained with: --tokenizer NAME_OR_DIR",
            )
        generation = {"eos_token_id": sorted(chat.stop_ids), "pad_token_id": chat.pad_id}
        write_json(fresh / "generation_config.json", generation)
        write_source(fresh, CachedSource(files=file_sizes(fresh), pt=path.name, pt_sha256=digest))


def _tokenizer_here(name: str) -> Path | None:
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    cached = cached_snapshot(name, None)
    if cached is not None and (cached.folder / "tokenizer.json").is_file():
        return cached.folder
    return None


def _tokenizer_hash(folder: Path) -> str:
    digest = hashlib.sha256()
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        digest.update(read_whole(folder / name) if (folder / name).is_file() else b"")
        digest.update(b"\0")
    return digest.hexdigest()
