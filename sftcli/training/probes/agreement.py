"""Whether the speedups give the loss and the gradients of the model itself, checked on real rows."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from sftcli.data.batches.batch import Batch, collate, collate_packed
from sftcli.data.example import Example
from sftcli.memory_faults import Attempt
from sftcli.modeling.kernels.document_attention import attend_as_before, attend_by_document
from sftcli.modeling.kernels.fuse import Fusion
from sftcli.modeling.kernels.fused_math import has_dropout
from sftcli.training.loss import plain_nll_sum, response_nll_sum
from sftcli.training.probes.choices import RowSharing
from sftcli.training.probes.untouched import left_as_it_was

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WORK = 12  # operations for a token and a weight: two passes, forward and backward


@dataclass(frozen=True, slots=True, kw_only=True)
class Tolerance:
    """By what part a loss, and the gradient of a weight, may differ.

    A gradient that is small beside that of all weights is a sum of larger numbers that cancel, such as that of a bias of keys,
    so ``floor`` of the whole gradient's size is added to its own.
    """

    loss: float
    gradient: float
    floor: float


# A softmax over 49,152 tokens in another order of sums moved one gain's gradient by 2.6e-4 (SmolLM2-135M, 2 rows); a
# leak of a thousandth between rows moves some gradient by more than 4e-4.
_TOLERANCES = {torch.float32: Tolerance(loss=1e-5, gradient=4e-4, floor=1e-3)}
_COARSE = Tolerance(loss=0.02, gradient=0.2, floor=0.1)  # where weights themselves are rounded


@dataclass(frozen=True, slots=True, kw_only=True)
class Ways:
    """Speedups over the model's own forward pass on each row alone."""

    layers: bool  # in their faster form
    rows: RowSharing
    head: bool  # at positions with loss alone

    def fewer(self) -> Iterator["Ways"]:
        """Yield these ways, then smaller sets, down to none; the least useful speedup is dropped first."""
        steps = [
            Ways(layers=layers, rows=rows, head=head)
            for rows in {self.rows: None, RowSharing.NONE: None}
            for head in {self.head: None, False: None}
            for layers in {self.layers: None, False: None}
        ]
        yield from sorted(steps, key=lambda ways: -ways.count)

    @property
    def count(self) -> int:
        """How many they are."""
        return self.layers + (self.rows is not RowSharing.NONE) + self.head


_OWN = Ways(layers=False, rows=RowSharing.NONE, head=False)  # the model itself


def agreed_ways(
    model: "PreTrainedModel",
    fusion: Fusion | None,
    rows: Sequence[Example],
    *,
    wanted: Ways,
    pad_id: int,
    with_gradients: bool = True,
) -> Ways:
    """Return the most of ``wanted`` with which loss and gradients on ``rows`` are those of the model's own forward pass.

    That is one with the attention and the layers of transformers, on each row by itself, and with all logits. Nothing of the
    model, and no random number, is other than before. Gradients take the memory of the weights that train.

    Args:
        model: As it was loaded, before weights are rounded: float32 tells apart what rounding would hide.
        fusion: Its layers' faster form; None where there is none.
        rows: A few real ones.
        wanted: What may be used.
        pad_id: What fills rows up.
        with_gradients: Compare them too.
    """
    weight = next(model.parameters())
    tolerance = _TOLERANCES.get(weight.dtype, _COARSE)
    if not wanted.count:
        return _OWN
    with left_as_it_was(model), nullcontext() if with_gradients else _ends_frozen(model):
        model.train(not has_dropout(model, attends=True))
        trial = _Trial(model, fusion, rows, pad_id, with_gradients=with_gradients)
        return next(ways for ways in wanted.fewer() if not ways.count or trial.agrees(ways, tolerance))


@contextmanager
def _ends_frozen(model: "PreTrainedModel") -> Iterator[None]:
    """Let embeddings and head have no gradients inside the block: the loss makes that of a head while it is computed."""
    layers = (model.get_input_embeddings(), model.get_output_embeddings())
    trained = [
        one for layer in layers if layer is not None for one in layer.parameters() if one.requires_grad
    ]
    for one in trained:
        one.requires_grad_(False)
    try:
        yield
    finally:
        for one in trained:
            one.requires_grad_(True)


class _Trial:
    """Loss and gradients of a model itself, computed once, with which any number of ways are compared."""

    def __init__(
        self,
        model: "PreTrainedModel",
        fusion: Fusion | None,
        rows: Sequence[Example],
        pad_id: int,
        *,
        with_gradients: bool,
    ) -> None:
        self.model = model
        self.fusion = fusion
        self.rows = rows
        self.pad_id = pad_id
        self.with_gradients = with_gradients
        self.trained = [weight for weight in model.parameters() if weight.requires_grad]
        self.loss = self._loss(_OWN)
        self.gradients: dict[torch.Tensor, torch.Tensor] = {}
        for weight in self.trained:
            if weight.grad is not None:
                self.gradients[weight], weight.grad = weight.grad, None
        self.sizes = {weight: float(gradient.norm()) for weight, gradient in self.gradients.items()}

    def agrees(self, ways: Ways, tolerance: Tolerance) -> bool:
        """Return whether loss and gradients in these ``ways`` are those of the model itself."""
        differences: dict[torch.Tensor, float] = {}
        with _compared(self.trained, self.gradients, differences):
            found = math.nan
            with Attempt():
                found = self._loss(ways)
        whole = sum(size**2 for size in self.sizes.values()) ** 0.5
        return abs(found - self.loss) <= tolerance.loss * abs(self.loss) and all(
            differences.get(weight, self.sizes.get(weight, 0.0))
            <= tolerance.gradient * (self.sizes.get(weight, 0.0) + tolerance.floor * whole)
            for weight in self.trained
        )

    def _loss(self, ways: Ways) -> float:
        total = 0.0
        compute = response_nll_sum if ways.head else plain_nll_sum
        batches = [self._together(ways.rows)] if ways.count else self._alone()
        with self._in_these(ways):
            for batch in batches:
                nll: torch.Tensor = compute(self.model, batch.to(self.model.device))
                if self.with_gradients:
                    nll.backward()
                total += nll.item()
        return total

    @contextmanager
    def _in_these(self, ways: Ways) -> Iterator[None]:
        if ways.rows is RowSharing.BOUNDS:
            attend_by_document(self.model)
        try:
            if self.fusion is None or ways.layers:
                yield
            else:
                with self.fusion.suspended():
                    yield
        finally:
            attend_as_before(self.model)

    def _alone(self) -> list[Batch]:
        return [collate([row], example_ids=[0], pad_id=self.pad_id) for row in self.rows]

    def _together(self, sharing: RowSharing) -> Batch:
        ids = range(len(self.rows))
        if sharing is RowSharing.NONE:
            return collate(self.rows, example_ids=ids, pad_id=self.pad_id)
        batch = collate_packed([self.rows], example_ids=ids, pad_id=self.pad_id)
        if sharing is RowSharing.BOUNDS or batch.documents is None:
            return batch
        return replace(batch, documents=replace(batch.documents, bounds=None))


@contextmanager
def _compared(
    trained: Sequence[torch.Tensor],
    wanted: dict[torch.Tensor, torch.Tensor],
    differences: dict[torch.Tensor, float],
) -> Iterator[None]:
    """Note how far each gradient that is made is from the one ``wanted``, and keep none: two of them are one too many."""

    def compare(weight: torch.Tensor) -> None:
        gradient, weight.grad = weight.grad, None
        assert gradient is not None
        expected = wanted.get(weight)
        differences[weight] = float((gradient if expected is None else gradient - expected).norm())

    handles = [weight.register_post_accumulate_grad_hook(compare) for weight in trained]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
