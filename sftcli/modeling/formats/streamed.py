"""Write the weights of a model folder one tensor at a time, so that the whole model is never in memory.

transformers takes all tensors at once. It is needed where files have other tensors than the model, such as experts that are fused while
they are loaded; elsewhere it does no more than to leave out tensors that are tied, and to choose the files.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import PreTrainedModel

from sftcli import storage
from sftcli.json_files import write_json
from sftcli.modeling.formats.folder_check import INDEX
from sftcli.modeling.formats.stored_tensors import grouped, index_of, shard_name, tensor_file_parts


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
    files = [shard_name("model.safetensors", number, len(groups)) for number in range(len(groups))]
    for file, names in zip(files, groups, strict=True):
        storage.write_file(folder / file, tensor_file_parts(tensors, {name: about[name] for name in names}))
    if len(groups) > 1:
        places = {name: file for file, names in zip(files, groups, strict=True) for name in names}
        write_json(folder / INDEX, index_of(places, sum(sizes.values())))
