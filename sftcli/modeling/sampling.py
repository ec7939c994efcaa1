"""Token-level decoding: prompts in, answers out, with a key-value cache. Knows nothing about text."""

import inspect
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from transformers import DynamicCache

from sftcli.config.schema import SamplingSettings
from sftcli.events import StopFlag

if TYPE_CHECKING:
    from transformers import PreTrainedModel

OnToken = Callable[[int, int], None]  # (row, token id), each as soon as it is known


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """The new tokens of one prompt, the stop token left out; ``stopped`` is false where the length ran out."""

    ids: tuple[int, ...]
    stopped: bool


@torch.inference_mode()
def decode(
    model: "PreTrainedModel",
    prompts: Sequence[Sequence[int]],
    *,
    settings: SamplingSettings,
    stop_ids: AbstractSet[int],
    pad_id: int,
    stop: StopFlag,
    on_token: OnToken | None = None,
) -> list[Answer]:
    """Continue every prompt until a stop token, ``max_new_tokens``, or ``stop``.

    Each row samples from a generator of its own, seeded by ``settings.seed`` and its number, so a row's answer does not
    depend on which rows it shares a batch with.
    """
    device = model.device
    input_ids, attention_mask = _pad_left(prompts, pad_id=pad_id, device=device)
    generators = [torch.Generator(device).manual_seed(settings.seed + row) for row in range(len(prompts))]
    position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)
    cache = {_cache_argument(model): DynamicCache(config=model.config)}
    new_ids: list[list[int]] = [[] for _ in prompts]
    running = set(range(len(prompts)))
    is_padded = bool((attention_mask == 0).any())
    for _ in range(settings.max_new_tokens):
        output = model(
            input_ids=input_ids,
            attention_mask=attention_mask if is_padded else None,
            position_ids=position_ids,
            use_cache=True,
            logits_to_keep=1,
            **cache,  # filled in place
        )
        chosen = _choose(output.logits[:, -1], settings, generators)
        for row, token in enumerate(chosen.tolist()):
            if row not in running:
                continue
            if token in stop_ids:
                running.discard(row)
                continue
            new_ids[row].append(token)
            if on_token is not None:
                on_token(row, token)
        if not running or stop.requested():
            break
        input_ids = chosen[:, None]
        position_ids = position_ids[:, -1:] + 1
        attention_mask = torch.cat([attention_mask, attention_mask.new_ones(len(prompts), 1)], dim=1)
    return [Answer(ids=tuple(ids), stopped=row not in running) for row, ids in enumerate(new_ids)]


def _cache_argument(model: "PreTrainedModel") -> str:
    """Return what this release of transformers calls the cache: ``cache``, or ``past_key_values`` in older ones."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def _pad_left(
    prompts: Sequence[Sequence[int]], *, pad_id: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and mask, (B, T) int64: prompts end in the last column, so that new tokens follow all of them."""
    width = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[pad_id] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    mask = torch.tensor(
        [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device
    )
    return ids, mask


def _choose(
    logits: torch.Tensor, settings: SamplingSettings, generators: Sequence[torch.Generator]
) -> torch.Tensor:
    """Return the next token of every row, (B,) int64, from ``logits`` (B, V)."""
    if settings.temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits.float() / settings.temperature
    if settings.top_k:
        smallest_kept = logits.topk(min(settings.top_k, logits.shape[-1]), dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < smallest_kept, -torch.inf)
    if settings.top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True)
        probabilities = ordered.softmax(dim=-1)
        outside = (
            probabilities.cumsum(dim=-1) - probabilities >= settings.top_p
        )  # the most likely one always stays
        logits = logits.masked_fill(outside.scatter(-1, order, outside), -torch.inf)
    probabilities = logits.softmax(dim=-1)
    rows = [
        torch.multinomial(row, 1, generator=generator)
        for row, generator in zip(probabilities, generators, strict=True)
    ]
    return torch.cat(rows)
