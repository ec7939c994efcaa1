"""Checkpoint files of the Modern LLM pipeline, read without running code in them, and written atomically.

The only module that may call ``torch.load``, and only with ``weights_only=True``.
"""

import json
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError  # the error alone: nothing here reads a pickle by itself

import torch
from safetensors.torch import save_file

from sftcli import storage
from sftcli.errors import DataError, MismatchError, StorageError
from sftcli.foreign import damaged, foreign_file
from sftcli.json_files import read_json, write_json
from sftcli.memory_faults import is_out_of_memory
from sftcli.modeling.formats.claims import impossible_claim
from sftcli.modeling.formats.pt_config import AGAIN, checked_config, file_config, hf_config
from sftcli.modeling.modern_lm.config import ModernLMConfig
from sftcli.modeling.modern_lm.model import ModernLMForCausalLM, register

_TOP_KEYS = ("model_state", "optimizer", "optimizer_state", "config", "step", "run_name", "metadata")
_COMPILED = "_orig_mod."
_HEAD = "lm_head.weight"
_EMBED = "token_embed.weight"
_SHOWN = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class PtCheckpoint:
    """What a file holds: tensors by their names in the file, and the full configuration in the file's own names."""

    model_state: Mapping[str, torch.Tensor]
    config: Mapping[str, object]
    step: int
    run_name: str


def read_pt(path: Path) -> PtCheckpoint:
    """Read a checkpoint and prove that its tensors fit its configuration.

    Raises:
        DataError: It is damaged, holds more than tensors and plain values, or keys that are not known.
        MismatchError: Tensors and configuration disagree.
    """
    content = _load(path)
    if "model_state" not in content or "config" not in content:
        missing = "model_state" if "model_state" not in content else "config"
        raise DataError(f"{path} is not a Modern LLM checkpoint: it has no {missing!r}", hint=AGAIN)
    if unknown := [key for key in content if key not in _TOP_KEYS]:
        raise DataError(f"{path} holds {unknown[0]!r}, which is not a key of such a file", hint=AGAIN)
    config = checked_config(path, content["config"])
    state = content["model_state"]
    if not isinstance(state, Mapping) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise DataError(f"{path}: model_state is not a dictionary of tensors", hint=AGAIN)
    tensors = {str(name).removeprefix(_COMPILED): tensor for name, tensor in state.items()}
    with foreign_file(path, "holds tensors that cannot be used", hint=AGAIN):
        _check_shapes(path, config, tensors)
    step, run_name = content.get("step", 0), content.get("run_name", "")
    return PtCheckpoint(
        model_state=tensors,
        config=config,
        step=step if isinstance(step, int) else 0,
        run_name=str(run_name or ""),
    )


def _refuse_packed(path: Path) -> None:
    """Refuse an archive whose entries are compressed: torch writes none, and a small file could fill the memory."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        if sum(entry.file_size for entry in archive.infolist()) > path.stat().st_size:
            raise DataError(
                f"{path} would unpack to more than its size: its entries are compressed", hint=AGAIN
            )


def _load(path: Path) -> Mapping[str, object]:
    with foreign_file(path, "is damaged or cut off", hint=AGAIN):
        _refuse_packed(path)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about the file's age; what is wrong with it is told below
                content = torch.load(path, map_location="cpu", weights_only=True)
        except UnpicklingError as error:
            raise damaged(
                path,
                "holds more than tensors and plain values, or is damaged; it was not opened, as that could run code",
                hint=AGAIN,
            ) from error
    if not isinstance(content, Mapping):
        raise DataError(f"{path} does not hold a dictionary", hint=AGAIN)
    return content


def model_differences(folder: Path, keys: Mapping[str, object]) -> list[str]:
    """Return, a sentence each, where ``keys`` of a pipeline's configuration differ from the model in ``folder``."""
    if not keys:
        return []
    content = read_json(folder / "config.json")
    if content.get("model_type") != ModernLMConfig.model_type:
        return [
            f"the model is not one of the pipeline's, so these keys are ignored: {', '.join(sorted(keys))}"
        ]
    held = file_config(ModernLMConfig.from_dict(content))
    return [
        f"the configuration says that {key} is {value!r}, the checkpoint that it is {held[key]!r}, which is used"
        for key, value in keys.items()
        if held[key] != value
    ]


def _file_name(name: str) -> str:
    return name.removeprefix("model.")


def _check_shapes(path: Path, config: Mapping[str, object], tensors: Mapping[str, torch.Tensor]) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if claim := impossible_claim(config, shapes):
        raise MismatchError(f"{path}: config says {claim}", hint=AGAIN)
    with torch.device("meta"):
        model = ModernLMForCausalLM(hf_config(config))
    wanted = {_file_name(name): tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    wanted.setdefault(_HEAD, wanted[_EMBED])
    if wrong := [name for name in wanted if name in shapes and shapes[name] != wanted[name]]:
        named = [f"{name} is {shapes[name]}, its config says {wanted[name]}" for name in wrong]
        raise MismatchError(f"{path}: {', '.join(named[:_SHOWN])}{_more(named)}")
    if missing := [f"{name} {shape}" for name, shape in wanted.items() if name not in tensors]:
        raise MismatchError(f"{path} lacks {', '.join(missing[:_SHOWN])}{_more(missing)}")
    if extra := [name for name in tensors if name not in wanted]:
        shown = [f"{name} {shapes[name]}" for name in extra[:_SHOWN]]
        raise MismatchError(
            f"{path} holds tensors its config does not define: {', '.join(shown)}{_more(extra)}"
        )
    if config["tie_embeddings"] and not torch.equal(tensors[_HEAD], tensors[_EMBED]):
        raise MismatchError(f"{path}: config.tie_embeddings is true, but {_HEAD} and {_EMBED} differ")


def _more(names: Sequence[str]) -> str:
    return f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""


def write_model_folder(checkpoint: PtCheckpoint, folder: Path) -> None:
    """Write configuration and weights of ``checkpoint`` as a Hugging Face folder; tokenizer files are not its matter."""
    config = hf_config(checkpoint.config)
    content = json.loads(config.to_json_string(use_diff=True))
    content |= {"architectures": [ModernLMForCausalLM.__name__], "dtype": "float32"}
    content["tie_word_embeddings"] = config.tie_word_embeddings
    write_json(folder / "config.json", content)
    tensors = {}
    for name, tensor in checkpoint.model_state.items():
        if name == _HEAD and config.tie_word_embeddings:
            continue
        tensors[name if name == _HEAD else f"model.{name}"] = tensor.float().clone().contiguous()
    target = folder / "model.safetensors"
    storage.disk.let_library_write(folder, lambda: save_file(tensors, target, metadata={"format": "pt"}))
    storage.disk.copy_mode(folder / "config.json", target)


def write_pt(
    path: Path,
    *,
    config: ModernLMConfig,
    weights: Mapping[str, torch.Tensor],
    optimizer: Mapping[str, torch.Tensor],
    group: Mapping[str, object],
    step: int,
    run_name: str,
) -> None:
    """Write a checkpoint that the original program loads strictly, atomically.

    Args:
        path: Where to.
        config: Of the model.
        weights: By parameter name, a shared tensor once.
        optimizer: ``moment/parameter name`` -> tensor; may be empty.
        group: AdamW's settings (lr, betas, eps, weight_decay).
        step: Steps finished.
        run_name: Name of the run, such as ``local-full-sft``.

    Raises:
        StorageError: The disk is full or writing failed; an older file is intact.
    """
    state = OrderedDict(
        (_file_name(name), t.detach().float().cpu().contiguous()) for name, t in weights.items()
    )
    if _HEAD not in state:
        state[_HEAD] = state[_EMBED]
    moments = _optimizer_state(weights, optimizer, group)
    about = {"step": step, "run_name": run_name, "config": file_config(config)}
    content = {
        "model_state": state,
        "optimizer_state": moments,
        "optimizer": moments,
        "metadata": about,
        **about,
    }
    hint = "free space or choose another run.root"
    try:
        with storage.whole_file(path, hint=hint) as fresh:
            storage.disk.let_library_write(fresh.parent, lambda: torch.save(content, fresh))
            _check_written(fresh, state)
    except (OSError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        raise StorageError(f"could not write {path}: {error}", hint=hint) from error


def _check_written(path: Path, state: Mapping[str, torch.Tensor]) -> None:
    """Read the weights of a new file again and compare them with those that it was made of."""
    found = torch.load(path, weights_only=True, mmap=True)["model_state"]
    for name in found.keys() ^ state.keys():
        raise StorageError(f"{path} failed verification: {name} is missing or unexpected")
    for name, tensor in state.items():
        if not torch.equal(found[name], tensor):
            raise StorageError(f"{path} failed verification: {name} holds other numbers")


def _optimizer_state(
    weights: Mapping[str, torch.Tensor], optimizer: Mapping[str, torch.Tensor], group: Mapping[str, object]
) -> dict[str, object]:
    """Return what ``torch.optim.AdamW.state_dict`` gives for one group of all parameters in the model's order."""
    moments = ("step", "exp_avg", "exp_avg_sq")
    state = {
        index: {moment: optimizer[f"{moment}/{name}"].detach().cpu() for moment in moments}
        for index, name in enumerate(weights)
        if f"step/{name}" in optimizer
    }
    fixed = {"amsgrad": False, "maximize": False, "foreach": None, "capturable": False, "differentiable": False,
             "fused": None, "decoupled_weight_decay": True}  # fmt: skip
    return {"state": state, "param_groups": [{**group, **fixed, "params": list(range(len(weights)))}]}


register()
