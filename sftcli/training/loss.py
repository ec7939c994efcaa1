"""Response-only loss: sums in nats, never means, so that micro-batches, held-out sets and processes add up exactly.

The loss of a global batch is ``sum(nll over response tokens) / number of response tokens``; the division is done once,
by the caller who knows the number.

Training may minimize another sum over the same tokens (``Loss``): in dynamic fine-tuning each token's negative log-likelihood
counts by the probability that the model gives it, which is a number there and has no gradient (Wu et al. 2025, "On the
Generalization of SFT: A Reinforcement Learning Perspective with Reward Rectification", arXiv:2508.05629). The gradient of the
likelihood alone is that of a reward of one over this probability; the weight takes that out, so that unlikely tokens no longer
pull the hardest.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast

import numpy as np
import torch
from torch.nn import functional

from sftcli.config.schema.training import Loss
from sftcli.copies import sent
from sftcli.data.batches.batch import IGNORED, Batch
from sftcli.events import ExpertLoad, StopFlag
from sftcli.figures import FEW_ROWS
from sftcli.memory_faults import is_out_of_memory
from sftcli.runtime import Context, applied, body_of, release_memory
from sftcli.training.distributed.group import Group

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# -> float32, summed over response tokens: the negative log-likelihood, a scalar. Or what is minimized instead, the negative
# log-likelihood, and perhaps the batch's part of the load-balancing loss, (2 or 3,).
BatchLoss = Callable[[Batch], torch.Tensor]

Found = TypeVar("Found")

_ALIGNED = 8  # columns, which products in bfloat16 want to be a multiple
MAX_CHUNK_LOGITS = 2**25  # logits alive at once: 128 MB in float32
# A GPU has memory for more, and each chunk reads the head and adds to its gradient once more.
CHUNK_LOGITS: Mapping[str, int] = {"cuda": 2**28}  # by type of device
_SUMS_IN_PRODUCT = frozenset({"cuda"})  # devices whose products of bfloat16 can add to float32


@dataclass(frozen=True, slots=True, kw_only=True)
class LogitTransform:
    """What a model does between its head and its softmax: ``softcap * tanh(scale * x / softcap)``."""

    scale: float = 1.0
    softcap: float | None = None

    @property
    def is_identity(self) -> bool:
        """Whether the softmax receives the head's output unchanged."""
        return self.scale == 1.0 and self.softcap is None

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """Return what the softmax gets."""
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits


def minimized(sums: torch.Tensor) -> torch.Tensor:
    """Return what is minimized of the ``sums`` of a ``BatchLoss``, with its gradient."""
    return sums[0] if sums.ndim else sums


def nll_of(sums: torch.Tensor) -> torch.Tensor:
    """Return the negative log-likelihood of the ``sums`` of a ``BatchLoss``."""
    return sums[1] if sums.ndim else sums


def three_sums(sums: torch.Tensor) -> torch.Tensor:
    """Return what is minimized, the negative log-likelihood, and the load-balancing loss or 0, (3,)."""
    return functional.pad(sums if sums.ndim else sums.expand(2), (0, 3 - max(2, sums.numel())))


class _Kept(Context, Protocol):
    weight_dtype: torch.dtype


class HeadNllSum(torch.autograd.Function):
    """Head and cross-entropy in chunks, with the gradients made in the forward pass.

    Logits exist for one chunk of positions at a time, so memory does not grow with vocabulary times batch. The
    gradients of a chunk are at hand as soon as its logits are, and are kept instead of them.
    """

    @staticmethod
    def forward(
        ctx: "_Kept",
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        transform: LogitTransform,
        loss: Loss = Loss.NLL,
    ) -> torch.Tensor:
        """Return the sums of a ``BatchLoss`` over ``targets`` (N,) given ``hidden`` (N, D); ``weight`` is (V, D)."""
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        shape = () if loss is Loss.NLL else (2,)
        sums = torch.zeros(shape, dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight: torch.Tensor | None = None
        grad_bias: torch.Tensor | None = None
        rows = max(1, chunk_logits(hidden.device) // weight.shape[0])
        add_product = _adding(hidden, is_alone=rows >= len(targets))
        for begin in range(0, len(targets), rows):
            chunk, wanted = hidden[begin : begin + rows], targets[begin : begin + rows]
            raw = functional.linear(chunk, weight, bias)
            found, grad_raw, nll = _nll_and_gradient(raw, wanted, transform, loss)
            sums += found
            _tell(nll)
            if not (needs_hidden or needs_weight or needs_bias):
                continue
            if grad_hidden is not None:
                torch.mm(grad_raw, weight, out=grad_hidden[begin : begin + rows])
            if needs_weight:
                grad_weight = add_product(grad_weight, grad_raw.t(), chunk)
            if needs_bias:
                grad_bias = _added(grad_bias, grad_raw.sum(0))
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.weight_dtype = weight.dtype
        return sums

    @staticmethod
    def backward(ctx: "_Kept", grad_sums: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Scale the gradients that the forward pass kept: those of what is minimized."""
        scale = minimized(grad_sums)
        kept: Sequence[torch.Tensor | None] = ctx.saved_tensors
        grad_hidden, grad_weight, grad_bias = kept
        dtype = ctx.weight_dtype
        return (
            None if grad_hidden is None else grad_hidden * scale.to(grad_hidden.dtype),
            None if grad_weight is None else (grad_weight.mul_(scale)).to(dtype),
            None if grad_bias is None else (grad_bias.mul_(scale)).to(dtype),
            *(None for _ in ctx.needs_input_grad[3:]),
        )


def _nll_and_gradient(
    raw: torch.Tensor, targets: torch.Tensor, transform: LogitTransform, loss: Loss
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the sums of ``raw`` (N, V), what the head gave, the gradient of what is minimized, and the nll of each row.

    The gradient, ``softmax - one_hot`` times the weight of a row, is made in the place of the logits, so that there is one tensor of their size and not four.
    """
    made = None
    if not transform.is_identity:
        with torch.enable_grad():
            raw = raw.detach().requires_grad_()
            made = transform(raw.float())
    logits = raw.float() if made is None else made.detach().clone()
    rows = torch.arange(len(targets), device=targets.device)
    wanted = logits[rows, targets]
    largest = logits.amax(-1, keepdim=True)
    sums = logits.sub_(largest).exp_().sum(-1, keepdim=True)
    nll = (sums.log() + largest)[:, 0] - wanted
    gradient = logits.div_(sums)
    gradient[rows, targets] -= 1.0
    if loss is Loss.DFT:
        gradient *= _weights(nll)[:, None]
    if made is None:
        return _summed(nll, loss), gradient.to(raw.dtype), nll
    (gradient,) = torch.autograd.grad(made, raw, gradient)
    return _summed(nll, loss), gradient, nll


_heard: ContextVar[list[torch.Tensor] | None] = ContextVar("heard", default=None)


@contextmanager
def each_token() -> Iterator[list[torch.Tensor]]:
    """Yield the list that losses of the block add the negative log-likelihood of each response token to, in their order.

    A loss of a batch is a sum: whoever wants to know more of it listens to the same pass.
    """
    found: list[torch.Tensor] = []
    token = _heard.set(found)
    try:
        yield found
    finally:
        _heard.reset(token)


def _tell(nll: torch.Tensor) -> None:
    if (found := _heard.get()) is not None:
        found.append(nll.detach())


def _weights(nll: torch.Tensor) -> torch.Tensor:
    """Return the probability of each token, without a gradient."""
    return nll.detach().neg().exp()


def _summed(nll: torch.Tensor, loss: Loss) -> torch.Tensor:
    """Return the sums of a ``BatchLoss`` from the negative log-likelihood of each token, (N,)."""
    if loss is Loss.NLL:
        return nll.sum()
    return torch.stack(((_weights(nll) * nll).sum(), nll.detach().sum()))


def chunk_logits(device: torch.device) -> int:
    """Return how many logits are alive at once on ``device``."""
    return CHUNK_LOGITS.get(device.type, MAX_CHUNK_LOGITS)


def _adding(
    hidden: torch.Tensor, *, is_alone: bool
) -> Callable[[torch.Tensor | None, torch.Tensor, torch.Tensor], torch.Tensor]:
    """Return what adds a product of two matrices in the dtype of ``hidden`` to a sum, which is float32 where it has parts.

    A single part needs no copy of the size of a head in another precision.
    """
    if is_alone or hidden.device.type not in _SUMS_IN_PRODUCT or not _knows_out_dtype():
        return lambda total, left, right: _added(total, left @ right)
    return _added_inside


@cache
def _knows_out_dtype() -> bool:
    """Return whether products of this torch can have another dtype than what they multiply."""
    return all("dtype_out" in getattr(torch.ops.aten, name).overloads() for name in ("mm", "addmm"))


def _added_inside(total: torch.Tensor | None, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Return ``total + left @ right`` in float32, in the place of ``total``: nothing else of its size is made."""
    if total is None:
        total = left.new_empty((left.shape[0], right.shape[1]), dtype=torch.float32)
        if left.dtype == total.dtype:
            return torch.mm(left, right, out=total)
        return torch.mm(left, right, out_dtype=total.dtype, out=total)
    if left.dtype == total.dtype:
        return total.addmm_(left, right)
    return torch.addmm(total, left, right, out_dtype=total.dtype, out=total)


def _added(total: torch.Tensor | None, part: torch.Tensor) -> torch.Tensor:
    """Return the sum, in float32 from the second part on: the first one alone needs no copy of the size of a head."""
    return part if total is None else total.float().add_(part)


def response_nll_sum(model: "PreTrainedModel", batch: Batch, loss: Loss = Loss.NLL) -> torch.Tensor:
    """Return the sums of a ``BatchLoss`` in nats over the response tokens of ``batch``.

    The head runs on response positions only.
    """
    hidden = body_of(model)(**batch.inputs, use_cache=False).last_hidden_state  # (B, T, D)
    wanted, targets = (
        part.flatten(0, 1).index_select(0, batch.loss_places) for part in (hidden, batch.targets)
    )
    head = cast("torch.nn.Linear", model.get_output_embeddings())
    features, weight = fold_adapter_into_head(head, wanted)
    bias: torch.Tensor | None = getattr(head, "bias", None)
    if not torch.is_grad_enabled():  # a Function asks its inputs alone, and would make gradients for nobody
        weight, bias = weight.detach(), None if bias is None else bias.detach()
    return applied(HeadNllSum, features, weight, bias, targets, logit_transform(model), loss)


def fold_adapter_into_head(head: torch.nn.Linear, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return features (N, D + rank) and a weight (V, D + rank) whose product is what ``head`` makes of ``hidden`` (N, D).

    A head without a LoRA adapter gives back both as they are. ``W x + s B (A x)`` is ``[W, B] [x, s A x]``.

    Raises:
        TypeError: The head has an adapter of another form, such as DoRA.
    """
    if hasattr(head, "token_adapter"):
        return _fold_rows_into_head(cast("Any", head).token_adapter, hidden)
    if not hasattr(head, "lora_A"):
        return hidden, head.weight
    layer = cast("Any", head)  # of peft, which is not imported here
    (name,) = layer.lora_A.keys()
    if layer.lora_variant or layer.lora_B[name].bias is not None:
        raise TypeError("the head's adapter is no plain LoRA")
    narrow = layer.lora_A[name](layer.lora_dropout[name](hidden)) * layer.scaling[name]
    return torch.cat((hidden, narrow), dim=-1), torch.cat((head.weight, layer.lora_B[name].weight), dim=-1)


def _fold_rows_into_head(layer: Any, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # noqa: ANN401 - of peft
    """Return the same for a head in which some rows train: ``[W without them, 1 at each] [x, rows x]``.

    So the rest, which is frozen, needs no gradient of the size of the head.
    """
    weight = layer.base_layer.weight
    (name,) = layer.trainable_tokens_delta.keys()
    rows = layer.trainable_tokens_delta[name].to(weight)
    ids = sent(torch.tensor(layer.token_indices[name]), weight.device)
    width = -len(ids) % _ALIGNED + len(ids)
    wide = functional.pad(weight, (0, width))
    wide[ids] = 0.0
    wide[ids, weight.shape[1] + torch.arange(len(ids), device=weight.device)] = 1.0
    scores = functional.pad(hidden @ rows.t(), (0, width - len(ids)))
    return torch.cat((hidden, scores), dim=-1), wide


def plain_nll_sum(model: "PreTrainedModel", batch: Batch, loss: Loss = Loss.NLL) -> torch.Tensor:
    """Return the same as ``response_nll_sum`` from the model's own logits, which keeps the logits of the full batch."""
    logits = model(**batch.inputs, use_cache=False).logits.flatten(0, 1).float()
    targets = batch.targets.flatten()
    if _heard.get() is not None:
        nll = functional.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="none")
        _tell(nll.index_select(0, batch.loss_places))
    if loss is Loss.NLL:
        return functional.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")
    return _summed(functional.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="none"), loss)


def logit_transform(model: "PreTrainedModel") -> LogitTransform:
    """Read from the model's config what it does to logits (Gemma 2 caps, Cohere multiplies, Granite divides)."""
    config = model.config.get_text_config()
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(
        getattr(config, "logits_scaling", None) or 1.0
    )
    return LogitTransform(scale=scale, softcap=getattr(config, "final_logit_softcapping", None))


@dataclass(frozen=True, slots=True, kw_only=True)
class NllSum:
    """Negative log-likelihood in nats, summed over ``response_tokens`` in ``rows``."""

    nll: float
    response_tokens: int
    rows: int
    row_nll: tuple[float, ...] = ()  # of each row, where they were asked for
    row_tokens: tuple[float, ...] = ()
    experts: Mapping[str, ExpertLoad] = field(default_factory=dict)  # by layer

    @property
    def loss(self) -> float:
        """Nats per response token."""
        return self.nll / self.response_tokens

    def fall_error(self, first: Sequence[float]) -> float | None:
        """Return the standard error of the fall of the loss since the rows had ``first``; None where it is not known."""
        if len(first) != len(self.row_nll):
            return None
        falls = [before - now for before, now in zip(first, self.row_nll, strict=True)]
        return ratio_standard_error(falls, self.row_tokens)


def ratio_standard_error(sums: Sequence[float], counts: Sequence[float]) -> float | None:
    """Return the standard error of ``sum(sums) / sum(counts)`` over rows, by linearization (Cochran 1977, 6.4).

    A few rows say too little about how rows scatter: None.
    """
    values, weights = np.asarray(sums, dtype=np.float64), np.asarray(counts, dtype=np.float64)
    rows = len(values)
    if rows < FEW_ROWS or not np.isfinite(values).all():
        return None
    residuals = values - values.sum() / weights.sum() * weights
    return float(np.sqrt(rows / (rows - 1) * (residuals**2).sum()) / weights.sum())


def in_halves(
    compute: Callable[[Batch], Found], batch: Batch, *, is_whole: bool = False
) -> Iterator[tuple[Batch, Found]]:
    """Yield ``batch`` with what ``compute`` makes of it; where memory runs out, halves of it, and so on down to one row.

    With ``is_whole`` it is not halved, as where a pass is an exchange with processes that would not halve theirs.
    """
    try:
        found = compute(batch)
    except Exception as error:
        if is_whole or not (batch.has_halves and is_out_of_memory(error)):
            raise
    else:
        yield batch, found
        return
    # Out here nothing holds the tensors of the failed pass any more.
    release_memory(batch.input_ids.device)
    for half in batch.halves():
        yield from in_halves(compute, half)


@torch.no_grad()
def heldout_nll(
    batch_loss: BatchLoss,
    batches: Iterable[Batch],
    *,
    stop: StopFlag,
    group: Group | None = None,
    device: torch.device | None = None,
    computes_all: bool = False,
    after_own: Callable[[Batch], None] | None = None,
    num_rows: int = 0,
) -> NllSum | None:
    """Sum the loss over ``batches``, distributed in ``group``; None when ``stop``, the same for all, was set before the end.

    With ``computes_all`` every process computes as often, as it must where a pass is an exchange. ``after_own`` is called behind
    the pass of each batch that counts here. With ``num_rows``, which the batches hold by their ids, each row has its sum too.
    Where memory runs out, a batch is computed in halves, which no exchange in a pass allows.
    """

    def measured(batch: Batch) -> tuple[float, list[torch.Tensor]]:
        with each_token() as heard:
            return nll_of(batch_loss(batch)).item(), heard

    group = group or Group()
    nll, tokens, rows = 0.0, 0, 0
    by_row, counts = np.zeros(num_rows), np.zeros(num_rows)
    is_whole = computes_all or group.parts > 1
    for batch, is_own in group.batches(batches):
        if stop.requested():
            return None
        if not (is_own or computes_all):
            continue
        batch = batch.to(device) if device else batch
        parts = list(in_halves(measured, batch, is_whole=is_whole))
        for part, (found, heard) in parts if is_own else ():
            if num_rows and heard:
                lengths = (part.targets != IGNORED).sum(1).tolist()
                own = torch.cat(heard).double().cpu().split(lengths)
                by_row[list(part.example_ids)] = [float(one.sum()) for one in own]
                counts[list(part.example_ids)] = lengths
            if after_own:
                after_own(part)
            nll += found
            tokens += part.response_tokens
            rows += 0 if group.part else len(part.example_ids)
    nll, all_tokens, all_rows, *each = group.sum([nll, tokens, rows, *by_row.tolist(), *counts.tolist()])
    return NllSum(
        nll=nll,
        response_tokens=int(all_tokens),
        rows=int(all_rows),
        row_nll=tuple(each[:num_rows]),
        row_tokens=tuple(each[num_rows:]),
    )
