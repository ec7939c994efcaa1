"""Write the weights of a model folder one tensor at a time, so that the whole model is never in memory.

transformers takes all tensors at once. It is needed where files have other tensors than the model, such as experts that are fused while
they are loaded; elsewhere it does no more than to leave out tensors that are tied, and to choose the files.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from transformers import PreTrainedModel

from sftcli import storage
from sftcli.json_files import write_json
from sftcli.modeling.formats.stored_tensors import TYPES, file_header, grouped

_INDEX = "model.safetensors.index.json"


def names_to_stream(model: PreTrainedModel, shapes: Mapping[str, torch.Size]) -> list[str] | None:
    """Return which of the tensors of ``model`` files hold, under their own names; None where files have other ones."""
    from transformers.core_model_loading import revert_weight_conversion

    kept = [name for name in shapes if name not in model.all_tied_weights_keys]
    empty = {name: torch.empty(shapes[name], device="meta") for name in kept}
    written = revert_weight_conversion(model, dict(empty))
    same = {name: tensor.shape for name, tensor in written.items()} == {name: shapes[name] for name in kept}
    return kept if same else None


def write_streamed(
    folder: Path,
    tensors: Mapping[str, torch.Tensor],
    about: Mapping[str, tuple[torch.dtype, torch.Size]],
    most_bytes: int,
) -> None:
    """Write ``tensors``, each of which is asked for when its turn comes, as one file or as shards of at most ``most_bytes`` with an index.

    Args:
        folder: Where to.
        tensors: By name.
        about: Type and shape of each that is written.
        most_bytes: Of a shard; a tensor that is larger is one by itself.
    """
    sizes = {name: dtype.itemsize * shape.numel() for name, (dtype, shape) in about.items()}
    groups = grouped(sizes, most_bytes)
    files = [f"model-{number:05d}-of-{len(groups):05d}.safetensors" for number in range(1, len(groups) + 1)]
    if len(groups) == 1:
        files = ["model.safetensors"]
    for file, names in zip(files, groups, strict=True):
        storage.write_file(folder / file, _file_parts(names, tensors, about))
    if len(groups) > 1:
        places = {name: file for file, names in zip(files, groups, strict=True) for name in names}
        write_json(
            folder / _INDEX,
            {"metadata": {"total_size": sum(sizes.values())}, "weight_map": dict(sorted(places.items()))},
        )


def _file_parts(
    names: list[str], tensors: Mapping[str, torch.Tensor], about: Mapping[str, tuple[torch.dtype, torch.Size]]
) -> Iterator[bytes | memoryview]:
    order = sorted(names, key=lambda name: (-about[name][0].itemsize, name))
    yield file_header(
        {
            name: (TYPES[dtype], shape, dtype.itemsize * shape.numel())
            for name, (dtype, shape) in ((name, about[name]) for name in order)
        }
    )
    for name in order:
        yield tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
