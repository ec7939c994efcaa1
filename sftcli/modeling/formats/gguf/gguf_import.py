"""Turn a GGUF file into a Hugging Face folder in the cache, once. Heavy libraries load only while it converts.

The numbers are those of the file, each tensor in the type of the matrices or, where that would round it, in float32.
Quantized numbers, which have no type of their own, are rounded to bfloat16.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, cast

from sftcli import storage
from sftcli.cache import CACHE_HINT, cache_folder
from sftcli.errors import DataError, NotFoundError
from sftcli.events import EventSink, Notice, Progressed, Warned
from sftcli.foreign import damaged, foreign_file, without_panics
from sftcli.json_files import read_json, write_json
from sftcli.memory_faults import is_out_of_memory
from sftcli.modeling.formats.cached_source import SOURCE_FILE, SOURCES, CachedSource, file_sizes, write_source
from sftcli.modeling.formats.gguf.gguf_header import GGUF_MAGIC, GgufHeader, read_header
from sftcli.modeling.formats.older_config import with_older_keys, with_older_tokenizer_keys

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

_CONFIG_NOISE = ("_model_name_or_path", "_name_or_path")
_TOKENIZER_NOISE = ("backend", "is_local", "local_files_only", "name_or_path")
_HINT = "the file may be truncated, or its architecture unknown to transformers; name a Hugging Face folder"
_GENERATION_KEYS = {"bos_token_id", "eos_token_id", "pad_token_id", "transformers_version"}


def models_folder() -> Path:
    """Return the folder of the cache that holds converted models."""
    return cache_folder() / "models"


def converted_gguf(gguf: Path, *, prefix: str, emit: EventSink) -> tuple[Path, str]:
    """Return the Hugging Face folder made of ``gguf`` and the file's SHA-256; convert it if not cached.

    Args:
        gguf: The file.
        prefix: Start of the folder's name in the cache; the start of the hash follows.
        emit: Told before a conversion and when a broken folder is made anew.

    Raises:
        DataError: The file is not GGUF, is damaged, or holds an architecture that transformers does not convert.
    """
    with foreign_file(gguf, "cannot be converted"), gguf.open("rb") as file:
        if file.read(4) != GGUF_MAGIC:
            raise damaged(gguf, "is not a GGUF file", hint="name a .gguf file or a Hugging Face folder")
    digest = storage.file_sha256(gguf)
    folder = models_folder() / f"{prefix}-{digest[: 8 if prefix != 'gguf' else 16]}"
    with foreign_file(gguf, "cannot be converted", hint=_HINT):
        header = read_header(gguf)
    if header.rope_scaling:  # which transformers leaves out without a word
        raise DataError(
            f"{gguf} scales its rotary positions ({header.rope_scaling}), which cannot be converted",
            hint="name the Hugging Face folder that it was made of",
        )
    source = read_source(folder, emit)
    if source is not None and source.gguf_sha256 == digest and source.exact == header.is_exact:
        _refuse_unread(gguf, header, folder)
        return folder, digest
    size = gguf.stat().st_size / 1e6
    emit(Notice(text=f"converting {gguf.name} ({size:.0f} MB) to a {header.dtype} model folder, once"))
    with storage.atomic_folder(folder, hint=CACHE_HINT) as fresh:
        _convert(gguf, header, fresh, emit)
        _refuse_unread(gguf, header, fresh)
        made = CachedSource(
            files=file_sizes(fresh),
            gguf=gguf.name,
            gguf_sha256=digest,
            dtype=header.dtype,
            exact=header.is_exact,
        )
        write_source(fresh, made)
    return folder, digest


def read_source(folder: Path, emit: EventSink) -> CachedSource | None:
    """Return what ``folder`` was made of, or None if it is missing or broken."""
    if not folder.is_dir():
        return None
    try:
        source = SOURCES.read(folder / SOURCE_FILE)
        fault = source.fault(folder)
    except (DataError, NotFoundError) as error:
        fault = error.message
    else:
        if not fault:
            return source
    emit(Warned(text=f"the cached model {folder} is damaged ({fault}); rebuilding it"))
    return None


def _convert(gguf: Path, header: GgufHeader, folder: Path, emit: EventSink) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    from sftcli.modeling.libraries import quiet_libraries

    quiet_libraries()
    # alone in a folder, so that transformers sees no other file beside it
    with (
        storage.scratch_folder(folder.parent, hint=CACHE_HINT) as alone,
        _progress_as_events(f"convert {gguf.name}", emit),
    ):
        name = "model.gguf"
        _link(gguf, alone / name)
        with (
            foreign_file(gguf, "cannot be converted", hint=_HINT),
            without_panics(),
            _told_of(gguf, alone / name),
        ):
            loaded: object = AutoModelForCausalLM.from_pretrained(
                alone,
                gguf_file=name,
                dtype=torch.float32 if header.is_exact else torch.bfloat16,
                quantization_config=GgufConfig(dequantize=True),
                output_loading_info=True,
                trust_remote_code=False,
                local_files_only=True,
            )
            tokenizer = AutoTokenizer.from_pretrained(
                alone, gguf_file=name, trust_remote_code=False, local_files_only=True
            )
        model, info = cast("tuple[PreTrainedModel, dict[str, set[str]]]", loaded)
        if missing := sorted(info["missing_keys"]):
            raise DataError(f"{gguf} lacks {len(missing)} tensors of the model, for example {missing[0]}")
        if header.is_exact:
            _narrow(model, getattr(torch, header.dtype))
        storage.disk.let_library_write(folder, lambda: model.save_pretrained(folder))
        storage.disk.let_library_write(folder, lambda: tokenizer.save_pretrained(folder))
    _clean(folder, context_tokens=int(model.config.max_position_embeddings), dtype=header.dtype)
    if header.pre_tokenizer == "smollm":
        _split_digits(folder / "tokenizer.json")


def _refuse_unread(gguf: Path, header: GgufHeader, folder: Path) -> None:
    """Refuse a file with a number that transformers leaves out and that is another than the one in the ``folder`` made of it."""
    if not header.unread:
        return
    from transformers import AutoConfig

    with foreign_file(folder / "config.json", "cannot be loaded"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    taken = {name: getattr(config, name, None) for name in header.unread}
    if (scalar := getattr(config, "query_pre_attn_scalar", None)) is not None:
        taken["attention.scale"] = scalar**-0.5
    for name, value in header.unread.items():
        expected = taken.get(name) or (0.0 if name.endswith("softcapping") else 1.0)
        if not math.isclose(value, expected, rel_tol=1e-5):
            raise DataError(
                f"{gguf} has {name} {value:g}, and transformers, which converts it, takes {expected:g}",
                hint="name the Hugging Face folder that it was made of",
            )


def _narrow(model: "PreTrainedModel", dtype: "torch.dtype") -> None:
    """Let each tensor of the float32 ``model`` take half the room in ``dtype``, where that rounds none of its numbers."""
    for tensor in (*model.parameters(), *model.buffers()):
        if not tensor.is_floating_point():
            continue
        narrow = tensor.data.to(dtype)
        if narrow.to(tensor.dtype).equal(tensor.data):
            tensor.data = narrow


@contextmanager
def _told_of(gguf: Path, copy: Path) -> Iterator[None]:
    """Let errors of transformers name ``gguf`` in place of the ``copy`` it reads, and the fault in place of what it takes it for."""
    try:
        yield
    except Exception as error:
        cause = error.__context__ if isinstance(error.__context__, UnicodeDecodeError) else error
        text = str(cause).replace(str(copy), gguf.name)
        if text == str(error) or is_out_of_memory(error):
            raise
        raise ValueError(text) from error


def _link(gguf: Path, place: Path) -> None:
    try:
        storage.disk.link(place, gguf.resolve())
    except OSError:
        storage.copy_file(gguf, place)


@contextmanager
def _progress_as_events(task: str, emit: EventSink) -> Iterator[None]:
    """Report the tensors that transformers converts as events; its own bar ignores the switch for bars."""
    from transformers import modeling_gguf_pytorch_utils as module

    def follow(tensors: Sequence[object], **_options: object) -> Iterator[object]:
        for done, tensor in enumerate(tensors, start=1):
            yield tensor
            emit(Progressed(task=task, done=done, total=len(tensors), unit="tensors"))

    names = vars(module)
    theirs = names["tqdm"]
    names["tqdm"] = follow
    try:
        yield
    finally:
        names["tqdm"] = theirs


def _clean(folder: Path, *, context_tokens: int, dtype: str) -> None:
    """Remove what only says how the folder came to be, and name classes and positions as older readers know them too."""
    named = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": context_tokens}
    _edit(
        folder / "config.json",
        lambda content: with_older_keys(_without(content, _CONFIG_NOISE) | {"dtype": dtype}),
    )
    _edit(
        folder / "generation_config.json",
        lambda content: _without(content, content.keys() - _GENERATION_KEYS),
    )
    _edit(
        folder / "tokenizer_config.json",
        lambda content: with_older_tokenizer_keys(
            _without(content, _TOKENIZER_NOISE) | named, takes_types=False
        ),
    )


def _edit(path: Path, change: Callable[[dict[str, object]], dict[str, object]]) -> None:
    write_json(path, change(read_json(path)))


def _without(content: dict[str, object], names: Iterable[str]) -> dict[str, object]:
    return {key: value for key, value in content.items() if key not in set(names)}


def _split_digits(path: Path) -> None:
    """Cut numbers into single digits, as SmolLM2 was trained: the conversion of transformers forgets this step.

    Without it "  5" becomes other tokens than those the model has seen.
    """
    tokenizer = read_json(path)
    digits = {"type": "Digits", "individual_digits": True}
    tokenizer["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, tokenizer["pre_tokenizer"]]}
    storage.write_file(path, [json.dumps(tokenizer, ensure_ascii=False).encode()])
