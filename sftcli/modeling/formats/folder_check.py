"""What a model folder must contain, checked on its files alone: nothing heavy is imported and no tensor is read."""

import json
import math
from pathlib import Path
from typing import Any

from sftcli.errors import ConsentError, DataError, NotFoundError, UsageError
from sftcli.foreign import damaged, foreign_file
from sftcli.json_files import read_json
from sftcli.modeling.formats.claims import impossible_claim
from sftcli.modeling.formats.config_check import CONFIG, check_config

UNSAFE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
CONVERT_HINT = (
    "convert it to safetensors on a machine where you trust the file: "
    "AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)"
)
# Bounds on what is parsed whole: a header is JSON that takes ten times its size in memory. Shards of the largest open
# models stay under 10 MB and 50,000 tensors; tokenizers and lists of shards under 50 MB.
_HEADER_LIMIT_BYTES = 32 << 20
_MAX_TENSORS = 200_000
INDEX = "model.safetensors.index.json"  # says which shard of a model holds which tensor


def check_model_folder(folder: Path) -> None:
    """Raise unless ``folder`` holds a configuration and complete safetensors weights.

    Raises:
        UsageError: It is a LoRA adapter, or its weights are quantized.
        NotFoundError: It is empty, has no configuration or no weights, or a part of the weights is missing.
        ConsentError: Its weights are pickle files.
        DataError: A file is damaged, or the configuration is of a far larger model.
    """
    if not (folder / CONFIG).is_file():
        raise _no_config(folder)
    check_config(folder)
    if claim := impossible_claim(read_json(folder / CONFIG), tensor_shapes(folder)):
        raise DataError(
            f"{folder / CONFIG} says {claim}",
            hint="the two are of different models: copy or download both again",
        )


def _no_config(folder: Path) -> UsageError | NotFoundError:
    adapter = folder / "adapter_config.json"
    if adapter.is_file():
        base = read_json(adapter).get("base_model_name_or_path")
        of = f" of {base}" if isinstance(base, str) and not Path(base).is_absolute() else ""
        return UsageError(
            f"{folder} is a LoRA adapter{of}, not a model",
            hint=f"merge it into its base model first: sft export {folder} --to hf --out MERGED",
        )
    if not any(folder.iterdir()):
        return NotFoundError(
            f"the folder {folder} is empty", hint="name a folder that holds config.json and weights"
        )
    below = sorted(folder.glob("*/config.json"))
    hint = f"did you mean {below[0].parent}?" if below else "name a folder that holds config.json and weights"
    return NotFoundError(f"{folder} holds no model: config.json is missing", hint=hint)


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a model folder, by its index where it has one.

    Raises:
        NotFoundError: There are no weights.
        ConsentError: There are pickle weights only.
        DataError: The index is damaged or names a file elsewhere.
    """
    index = folder / INDEX
    if index.is_file():
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict) or not shards:
            raise DataError(f"{index} has no weight_map")
        names = sorted({str(name) for name in shards.values()})
        if outside := [name for name in names if Path(name).name != name]:
            raise DataError(f"{index} names a file outside of its folder: {outside[0]!r}")
        return [folder / name for name in names]
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    unsafe = sorted(path.name for path in folder.iterdir() if path.suffix in UNSAFE_SUFFIXES)
    if unsafe:
        raise ConsentError(
            f"{folder / unsafe[0]} is a pickle file, which can run code when opened; refused",
            hint=CONVERT_HINT,
        )
    raise NotFoundError(
        f"{folder} holds no weights: model.safetensors is missing", hint="copy or download the folder again"
    )


def check_safetensors(path: Path) -> None:
    """Raise unless the header of a safetensors file is sound and agrees with the size of the file.

    Raises:
        NotFoundError: It does not exist.
        DataError: It is damaged, cut off, or something else.
    """
    safetensors_header(path)


def safetensors_header(path: Path) -> tuple[dict[str, Any], int]:
    """Return the header of a safetensors file, after checking it, and the offset of the tensor data.

    Raises:
        NotFoundError: It does not exist.
        DataError: It is damaged, cut off, or something else.
    """
    with foreign_file(path, "has a damaged header"):
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if 8 + _HEADER_LIMIT_BYTES < 8 + length <= size:
                raise DataError(
                    f"{path} has a header of {length >> 20} MB; the limit is {_HEADER_LIMIT_BYTES >> 20} MB"
                )
            if size < 8 or not 2 <= length <= size - 8:
                raise damaged(path, "is not a safetensors file, or is cut off")
            header = json.loads(file.read(length))
        if len(header) > _MAX_TENSORS:
            raise DataError(f"{path} lists {len(header)} tensors; the limit is {_MAX_TENSORS}")
        tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
        if wrong := next((name for name, entry in tensors.items() if not _is_tensor(entry)), None):
            raise damaged(
                path, f"has a damaged header: {wrong!r} is no tensor with a type, a shape and bytes"
            )
        ends = [entry["data_offsets"][1] for entry in tensors.values()]
    if size != (expected := 8 + length + max(ends, default=0)):
        raise damaged(path, f"is {size} bytes long, its header says {expected}")
    return header, 8 + length


def _is_tensor(entry: object) -> bool:
    """Return whether a header's ``entry`` says where the numbers of a tensor are, and not less than half a byte for each."""
    match entry:
        case {"dtype": str(), "shape": list(shape), "data_offsets": [int(begin), int(end)]}:
            counts = all(type(length) is int and length >= 0 for length in shape)
            return counts and 0 <= begin <= end and math.prod(shape) <= 2 * (end - begin)
    return False


def tensor_shapes(folder: Path) -> dict[str, list[int]]:
    """Return the shape of each tensor in a model folder, from the headers of its files.

    Raises:
        NotFoundError, ConsentError, DataError: As ``check_model_folder``.
    """
    return {
        name: entry["shape"]
        for path in weight_files(folder)
        for name, entry in safetensors_header(path)[0].items()
        if name != "__metadata__"
    }
