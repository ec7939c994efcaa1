"""How many tokens each routed expert gets, counted while the held-out rows are scored.

Every token of a row counts, its prompt too, and padding does not. Training steps are left alone, so that counting costs them
nothing, and held-out rows are the same each time. A model without experts is not touched.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice

import torch

from sftcli.data.batches.batch import Batch
from sftcli.events import ExpertLoad
from sftcli.modeling.kernels.experts import chosen_experts, experts_of
from sftcli.training.distributed.group import Group


class ExpertMeter:
    """Counts what the routers of ``model`` choose, by module of experts that says how many it holds (``num_experts``)."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model
        sizes = {name: getattr(module, "num_experts", None) for name, module in experts_of(model).items()}
        self.counts = {
            name: torch.zeros(size, dtype=torch.int64)
            for name, size in sizes.items()
            if isinstance(size, int)
        }

    @contextmanager
    def listening(self) -> Iterator[Callable[[Batch], None] | None]:
        """Yield what counts the choices of the newest pass inside the block, which was that of a batch; None without experts."""
        if not self.counts:
            yield None
            return
        with chosen_experts(self._model) as chosen:
            yield lambda batch: self._add(chosen, batch)

    def _add(self, chosen: Mapping[str, torch.Tensor], batch: Batch) -> None:
        tokens = batch.token_places
        for name, counts in self.counts.items():
            if name in chosen and len(chosen[name]) == batch.input_ids.numel():
                experts = chosen[name][tokens].flatten()
                # A number behind the last one stands for no expert.
                counts += torch.bincount(experts, minlength=len(counts))[: len(counts)].cpu()

    def load(self, group: Group) -> dict[str, ExpertLoad]:
        """Return the load of the experts of each layer, by the layer's number where its name has one, over all processes."""
        if not self.counts:
            return {}
        sums = iter(group.sum(torch.cat([*self.counts.values()]).tolist()))
        totals = {name: [*islice(sums, len(counts))] for name, counts in self.counts.items()}
        return {_layer(name): load_of(total) for name, total in totals.items() if any(total)}


def load_of(counts: Sequence[float]) -> ExpertLoad:
    """Return how even ``counts``, of which one is not 0, are."""
    shares = [count / sum(counts) for count in counts]
    entropy = -sum(share * math.log(share) for share in shares if share)
    return ExpertLoad(
        busiest=max(shares),
        unused=shares.count(0.0) / len(shares),
        entropy=entropy / math.log(len(shares)) if len(shares) > 1 else 1.0,
    )


def _layer(name: str) -> str:
    return next((part for part in name.split(".") if part.isdigit()), name)
