"""The next token of every row from its logits: penalties, filters, and a draw that no other row can move."""

from collections.abc import Sequence

import numpy as np
import torch

from sftcli.config.schema.run import SamplingSettings
from sftcli.copies import Reading

_COLDEST = 1e-6  # what is colder leaves the most likely token only, and would divide by 0


class RowSampler:
    """Draws tokens for one row. It owns the row's generator and remembers which tokens the row holds."""

    def __init__(
        self,
        settings: SamplingSettings,
        *,
        seed: Sequence[int],
        prompt: Sequence[int],
        vocab_size: int,
        device: torch.device,
    ) -> None:
        self.settings = settings
        self.generator = _generator(seed, device) if settings.temperature else None
        self.seen: torch.Tensor | None = None  # (V,) bool; kept only where repetition is penalized
        if settings.repetition_penalty != 1:
            self.seen = torch.zeros(vocab_size, dtype=torch.bool, device=device)
            self.seen[torch.tensor(list(prompt), dtype=torch.int64, device=device)] = True


def sample(logits: torch.Tensor, samplers: Sequence[RowSampler]) -> torch.Tensor:
    """Return the next token of every row, (B,) int64, from ``logits`` (B, V). The rows share one set of settings."""
    settings = samplers[0].settings
    if settings.repetition_penalty != 1:
        logits = _penalized(logits.float(), samplers, settings.repetition_penalty)
    if settings.temperature < _COLDEST:
        chosen = logits.max(dim=-1).indices  # the first of equals, as with argmax, in half its time on a CPU
    else:
        probabilities = _filtered(logits.float() / settings.temperature, settings).softmax(dim=-1)
        chosen = _drawn(probabilities, samplers)
    for place, sampler in enumerate(samplers):
        if sampler.seen is not None:
            sampler.seen.index_fill_(0, chosen[place : place + 1], True)
    return chosen


def _generator(seed: Sequence[int], device: torch.device) -> torch.Generator:
    state = np.random.SeedSequence(list(seed)).generate_state(2, np.uint32)
    return torch.Generator(device).manual_seed(int(state[0]) << 31 | int(state[1]) >> 1)


def _drawn(probabilities: torch.Tensor, samplers: Sequence[RowSampler]) -> torch.Tensor:
    """Draw a token of each row, (B,).

    That is what ``torch.multinomial`` computes for one draw, to the bit, but for its checks: a device would have to answer
    two of them for each row, and here no row waits.
    """
    times = torch.empty_like(probabilities)
    for row, sampler in zip(times, samplers, strict=True):
        row.exponential_(generator=sampler.generator)
    return torch.div(probabilities, times, out=times).argmax(dim=-1)


def logprobs_of(logits: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """Return the log-probability of each row's ``chosen`` token (B,) under ``logits`` (B, V) as the model gives them.

    It is not finite where the greatest logit is not, or one is not a number.
    """
    logits = logits.float()
    return logits.gather(-1, chosen[:, None])[:, 0] - logits.logsumexp(dim=-1)


def read(chosen: torch.Tensor, logprobs: torch.Tensor) -> tuple[list[int], list[float]]:
    """Return tokens (B,) and their log-probabilities as numbers of the host, which waits for the device once."""
    both = Reading(torch.stack((chosen.int(), logprobs.view(torch.int32)))).numbers()
    return both[0].tolist(), both[1].view(torch.float32).tolist()


def _penalized(logits: torch.Tensor, samplers: Sequence[RowSampler], penalty: float) -> torch.Tensor:
    """Make tokens that a row holds less likely (Keskar et al. 2019, arXiv:1909.05858, as transformers has it)."""
    seen = torch.stack([sampler.seen for sampler in samplers if sampler.seen is not None])
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def _filtered(logits: torch.Tensor, settings: SamplingSettings) -> torch.Tensor:
    """Return ``logits`` (B, V) with what top-k, top-p and min-p leave out at minus infinity, in this order."""
    if settings.top_k:
        smallest_kept = logits.topk(min(settings.top_k, logits.shape[-1]), dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < smallest_kept, -torch.inf)
    if settings.top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True)
        probabilities = ordered.softmax(dim=-1)
        # The most likely token always stays.
        outside = probabilities.cumsum(dim=-1) - probabilities >= settings.top_p
        outside[:, 0] = False  # also where top-p is no more than 0 in this precision
        logits = logits.masked_fill(outside.scatter(-1, order, outside), -torch.inf)
    if settings.min_p:
        probabilities = logits.softmax(dim=-1)
        least = probabilities.amax(dim=-1, keepdim=True) * settings.min_p
        logits = logits.masked_fill(probabilities < least, -torch.inf)
    return logits
