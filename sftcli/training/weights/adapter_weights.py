"""The weights of a model of which only an adapter trains."""

from collections.abc import Callable, Mapping

import torch

from sftcli.training.optim.optimizer import MasterWeights


class AdapterWeights(MasterWeights):
    """Float32 masters of the adapter alone. Snapshots hold nothing else, under the names that ``file_name`` gives."""

    keeps_frozen = False

    def __init__(
        self, model: torch.nn.Module, *, compute_dtype: torch.dtype, file_name: Callable[[str], str]
    ) -> None:
        super().__init__(model, compute_dtype=compute_dtype)
        self._file_names = {name: file_name(name) for name in self.masters}

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the masters by their names in files."""
        return {self._file_names[name]: master.detach() for name, master in self.masters.items()}

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Set the masters to ``tensors``, by their names in files, and publish them."""
        super().restore({name: tensors[file] for name, file in self._file_names.items()})
