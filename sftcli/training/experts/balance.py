"""The load-balancing loss of routed experts, over all tokens of a step.

It is that of the Switch Transformer (Fedus et al. 2021, arXiv:2101.03961, equations 4 to 6) as transformers computes it: the
share of choices that each expert gets, times the mean probability that its routers give it, summed over the experts and scaled
by their number, over the tokens of all layers together. Even routing makes it the number of experts that a token chooses.

What is balanced are the tokens of a whole step, its prompts and pretraining text included and padding left out. The shares of
choices have no gradient, and probabilities add up, so that micro-batches, packing and processes move it by rounding alone. Where
a step has several micro-batches, or processes share their rows, a pass without gradients counts the choices first.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from sftcli.data.batches.batch import Batch
from sftcli.errors import Location, UsageError
from sftcli.memory_faults import Attempt
from sftcli.runtime import body_of
from sftcli.training.distributed.group import Group
from sftcli.training.loss import BatchLoss, minimized, nll_of
from sftcli.training.random_streams import capture_rng, restore_rng

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOLERANCE = 1e-3  # to the class's own value: routers may compute in bfloat16


class BalancedLoss:
    """A ``BatchLoss`` of three sums: what is minimized, the negative log-likelihood, and this batch's part of the balance loss.

    Args:
        batch_loss: What it adds to.
        model: Whose routers.
        coefficient: Of the load-balancing loss beside the loss of a response token.
        group: The processes that share a step.
        computes_all: Whether every process must compute as often as the others.
    """

    def __init__(
        self,
        batch_loss: BatchLoss,
        model: "PreTrainedModel",
        *,
        coefficient: float,
        group: Group | None = None,
        computes_all: bool = False,
    ) -> None:
        self.batch_loss = batch_loss
        self.coefficient = coefficient
        self.group = group or Group()
        self.computes_all = computes_all
        self._model = model
        self._num_chosen = int(model.config.get_text_config().num_experts_per_tok)
        self._counts: torch.Tensor | None = None  # of choices in this step, by expert
        self._tokens = self._response_tokens = 0  # of this step

    def begin(self, window: Sequence[Batch]) -> None:
        """Learn what the step is made of, at the same time in all processes; no random number is other than before."""
        self._tokens = sum(batch.tokens for batch in window)
        self._response_tokens = sum(batch.response_tokens for batch in window)
        self._counts = self._counted(window) if len(window) > 1 or self.group.parts > 1 else None

    def __call__(self, batch: Batch) -> torch.Tensor:
        """Return the sums for a micro-batch of the step."""
        with router_logits(self._model) as logits:
            sums = self.batch_loss(batch)
        routed = probabilities(logits, batch)
        counts = self._choices(routed) if self._counts is None else self._counts
        part = balance(counts, sum_of(routed), rows=len(routed) * self._tokens)
        whole = minimized(sums) + self.coefficient * self._response_tokens * part
        return torch.stack((whole, nll_of(sums).detach(), part.detach()))

    @torch.no_grad()
    def _counted(self, window: Sequence[Batch]) -> torch.Tensor:
        rng, device = capture_rng(), self._model.device
        counts: torch.Tensor | None = None
        for batch, is_own in self.group.batches(window):
            if (
                is_own or self.computes_all or counts is None
            ):  # else it would not know how many experts there are
                moved = batch.to(device)
                with router_logits(self._model) as logits:
                    self.batch_loss(moved)
                found = self._choices(probabilities(logits, moved)) * is_own
                counts = found if counts is None else counts + found
        restore_rng(rng)
        assert counts is not None  # a step has a micro-batch
        return torch.tensor(self.group.sum(counts.tolist()), dtype=torch.float32, device=device)

    def _choices(self, routed: Sequence[torch.Tensor]) -> torch.Tensor:
        return choices(routed, self._num_chosen)


@contextmanager
def router_logits(model: "PreTrainedModel") -> Iterator[list[torch.Tensor]]:
    """Yield a list that receives the logits of every router in the passes inside the block, with their gradients.

    A layer that is computed again in the backward pass, behind the block, adds nothing.
    """
    found: list[torch.Tensor] = []

    def ask(_: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:  # noqa: ANN401 - torch's
        return args, kwargs | {"output_router_logits": True}

    def keep(_: torch.nn.Module, __: object, outputs: Any) -> None:  # noqa: ANN401 - a class for each family
        found.extend(getattr(outputs, "router_logits", None) or ())

    body = body_of(model)
    handles = [
        body.register_forward_pre_hook(ask, with_kwargs=True),
        body.register_forward_hook(keep),
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def probabilities(logits: Sequence[torch.Tensor], batch: Batch) -> list[torch.Tensor]:
    """Return for each router the probabilities of experts (tokens, experts) for the tokens of ``batch`` that are no padding."""
    tokens = batch.token_places  # found once: a mask would be searched for each layer
    return [layer.flatten(0, -2)[tokens].softmax(-1) for layer in logits]


def choices(routed: Sequence[torch.Tensor], num_chosen: int) -> torch.Tensor:
    """Return how often each expert is among the ``num_chosen`` most likely ones, over all layers, (experts,) float32."""
    chosen = torch.cat([layer.detach().topk(num_chosen).indices.flatten() for layer in routed])
    return torch.bincount(chosen, minlength=routed[0].shape[-1]).float()


def sum_of(routed: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the sum of the probabilities of each expert, over all layers, (experts,) float32."""
    return torch.stack([layer.float().sum(0) for layer in routed]).sum(0)


def balance(counts: torch.Tensor, sums: torch.Tensor, *, rows: int) -> torch.Tensor:
    """Return the loss of choices ``counts`` and sums of probabilities over ``rows`` tokens of layers."""
    return len(counts) * ((counts / rows) * (sums / rows)).sum()


@torch.no_grad()
def require_balance(model: "PreTrainedModel", batch: Batch) -> None:
    """Make sure that the load-balancing loss of ``model`` on ``batch`` is the one that its class computes.

    Raises:
        UsageError: Its class computes none, or another.
    """
    name, batch = type(model).__name__, batch.to(model.device)
    asked = {"use_cache": False, "output_router_logits": True}
    is_same = False
    with Attempt():
        outputs: Any = model(**batch.inputs, attention_mask=batch.is_token.long(), **asked)
        with router_logits(model) as logits:
            body_of(model)(**batch.inputs, use_cache=False)
        # Of the same pass: rounding may turn a choice around.
        routed = probabilities(outputs.router_logits, batch)
        counts = choices(routed, int(model.config.get_text_config().num_experts_per_tok))
        found = balance(counts, sum_of(routed), rows=len(routed) * batch.tokens)
        is_same = len(logits) == len(routed) and bool(
            torch.isclose(found, outputs.aux_loss.float(), rtol=TOLERANCE)
        )
    if not is_same:
        raise UsageError(
            f"training.router_aux_loss is set, and {name} has no load-balancing loss that is known here",
            hint="leave it 0: experts are then trained by the loss of their tokens alone",
            location=Location(key="training.router_aux_loss"),
        )
