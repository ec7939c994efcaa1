"""Float32 masters in the memory of float32 numbers alone: what the products run in is their upper half.

A float32 number is kept as the bfloat16 number nearest to it, which is the parameter that the model computes with, and as the
difference between their bits, which 16 bits hold (the idea is that of Split-SGD, Kalamkar et al. 2020, arXiv:2005.04680).
Together they are the float32 number, to the last bit: no update is lost, and there is no copy beside the masters.
"""

from collections.abc import Mapping

import torch

from sftcli.training.weights.masters import MasterWeights, stored_buffers

_HALF = 1 << 15


def split(exact: torch.Tensor, rounded: torch.Tensor, rest: torch.Tensor) -> None:
    """Put float32 ``exact`` into the bfloat16 ``rounded`` and the int16 ``rest``, all alike in shape.

    A number in the middle of two goes away from zero, where a cast takes the even one: else the difference would need 17 bits.
    """
    bits = exact.view(torch.int32)
    upper = (bits + _HALF) >> 16
    rest.copy_(bits - (upper << 16))
    rounded.view(torch.int16).copy_(upper)


def join(rounded: torch.Tensor, rest: torch.Tensor) -> torch.Tensor:
    """Return the float32 numbers that ``split`` was given."""
    return ((rounded.view(torch.int16).int() << 16) + rest.int()).view(torch.float32)


class SplitWeights(MasterWeights):
    """Masters of a model that computes in bfloat16, split; 4 bytes a weight where ``MasterWeights`` takes 6.

    Gradients are summed in float32 all the same. Only an optimizer that knows the ``remainders`` can update them.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__(model, compute_dtype=torch.bfloat16)

    def _split(self, name: str, parameter: torch.nn.Parameter) -> torch.nn.Parameter:
        exact = parameter.detach().float().contiguous()
        rest = torch.empty_like(exact, dtype=torch.int16)
        parameter.data = torch.empty_like(exact, dtype=torch.bfloat16)
        parameter.grad_dtype = torch.float32
        split(exact, parameter.detach(), rest)
        self.remainders[name] = rest
        return parameter

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return every weight of the model by name, masters joined; on the CPU, as a device may have no room for them."""
        return super().tensors() | {
            name: join(master.detach().cpu(), self.remainders[name].cpu())
            for name, master in self.masters.items()
        }

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Set the masters and buffers to ``tensors``, by name."""
        for name, master in self.masters.items():
            split(tensors[name].to(master.device), master.detach(), self.remainders[name])
        for name, buffer in stored_buffers(self.model).items():
            if name in tensors:
                buffer.copy_(tensors[name])
