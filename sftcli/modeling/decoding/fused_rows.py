"""Rows of a model that ``fused_decode`` knows: those that go on and those that begin share one pass over the weights.

What all prompts begin with, such as a system message, is read once and copied.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F  # noqa: N812 - its usual name

from sftcli.modeling.decoding.fused_decode import FusedStep
from sftcli.modeling.decoding.kv_cache import SlotState


@dataclass(frozen=True, slots=True, kw_only=True)
class _Read:
    """A prompt in a pass: ``tokens`` of it are new, behind what its slot already holds."""

    slot: int
    begin: int  # among the tokens of the pass
    tokens: int
    length: int  # of the whole prompt
    mask: (
        torch.Tensor | None
    )  # (tokens, length), what to add to the scores; None where the whole prompt is new


class FusedRows:
    """Rows of a model whose passes ``fused`` knows."""

    def __init__(self, fused: FusedStep, num_slots: int, *, prefix: Sequence[int] = ()) -> None:
        self.fused = fused
        self.prefix = prefix
        self.state = SlotState(num_slots, fused.embedding.device)
        # One more slot holds the prefix.
        self.caches = fused.new_caches(num_slots + bool(prefix), self.state.room)
        self._has_prefix = False

    @property
    def capacity(self) -> int:
        """The most rows at once."""
        return self.state.num_slots

    def advance(self, tokens: torch.Tensor, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
        """Take the next token of every row and the prompts of new rows, in one pass."""
        state, count = self.state, self.state.size
        if prompts:
            self._begin_with_prefix(len(prompts))
        known = len(self.prefix)
        reads, begin = [], count
        for slot, prompt in enumerate(prompts, count):
            reads.append(self._read(slot, begin, len(prompt), known))
            begin += len(prompt) - known
        state.width = max(state.counts, default=0) + 1
        self._make_room(max([state.width, *(read.length + 1 for read in reads)]))
        logits = self._run(tokens, [prompt[known:] for prompt in prompts], reads)
        state.step()
        state.add([read.length for read in reads])
        return logits

    def remove(self, row: int) -> None:
        """Free the slot of ``row``; the last row moves there."""
        last, count = self.state.size - 1, self.state.counts[-1]
        if row != last:
            for cache in self.caches:
                cache[row, :, :, :count] = cache[last, :, :, :count]
        self.state.drop(row)

    def _run(
        self, tokens: torch.Tensor, prompts: Sequence[Sequence[int]], reads: Sequence[_Read]
    ) -> torch.Tensor:
        """Run the model on one token of every row and on what is new in ``prompts``; (rows + prompts, V)."""
        count, device = len(tokens), self.state.lengths.device
        positions, slots = [self.state.lengths[:count]], [self.state.slots[:count]]
        for read in reads:
            positions.append(torch.arange(read.length - read.tokens, read.length, device=device))
            slots.append(torch.full((read.tokens,), read.slot, device=device))
        last = [*range(count), *(read.begin + read.tokens - 1 for read in reads)]
        every = [tokens, *(torch.tensor(list(prompt), device=device) for prompt in prompts)]
        mask = self._mask()

        def attend(query: torch.Tensor, cache: torch.Tensor) -> torch.Tensor:
            seen = [self._look_back(query[:count], cache, mask)] if count else []
            seen += [self._look_within(query, cache, read) for read in reads]
            return torch.cat(seen) if len(seen) > 1 else seen[0]

        return self.fused.run(
            torch.cat(every),
            torch.cat(positions),
            torch.cat(slots),
            self.caches,
            attend,
            torch.tensor(last, device=device) if reads else None,
        )

    def _look_back(self, query: torch.Tensor, cache: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Let the one query of every row see its row, (B, heads, head size) -> (B, heads * head size).

        Heads that share keys are queries of one head, so that no key is copied.
        """
        count, width = len(query), self.state.width
        return F.scaled_dot_product_attention(
            query.view(count, self.fused.kv_heads, -1, self.fused.head_size),
            cache[:count, 0, :, :width],
            cache[:count, 1, :, :width],
            attn_mask=mask,
        ).reshape(count, -1)

    def _look_within(self, query: torch.Tensor, cache: torch.Tensor, read: _Read) -> torch.Tensor:
        """Let the queries of a prompt see it up to themselves, (n, heads, head size) -> (n, heads * head size).

        Heads that share keys are heads of one batch entry, and see the same keys.
        """
        fused = self.fused
        mine = query[read.begin : read.begin + read.tokens]
        mine = mine.view(read.tokens, fused.kv_heads, -1, fused.head_size).permute(1, 2, 0, 3)
        keys, values = (
            cache[read.slot, part, :, None, : read.length].expand(-1, mine.shape[1], -1, -1)
            for part in (0, 1)
        )
        seen = F.scaled_dot_product_attention(
            mine, keys, values, attn_mask=read.mask, is_causal=read.mask is None
        )
        return seen.permute(2, 0, 1, 3).reshape(read.tokens, -1)

    def _mask(self) -> torch.Tensor | None:
        """Return what to add to the scores of rows that go on, in the type of the scores."""
        mask = self.state.mask()
        return None if mask is None else self._added(mask)

    def _added(self, visible: torch.Tensor) -> torch.Tensor:
        zeros = torch.zeros(visible.shape, dtype=self.fused.embedding.dtype, device=visible.device)
        return zeros.masked_fill_(~visible, -torch.inf)

    def _read(self, slot: int, begin: int, length: int, known: int) -> _Read:
        tokens, mask = length - known, None
        if known:
            device = self.state.lengths.device
            mask = self._added(torch.ones(tokens, length, dtype=torch.bool, device=device).tril(known))
        return _Read(slot=slot, begin=begin, tokens=tokens, length=length, mask=mask)

    def _begin_with_prefix(self, count: int) -> None:
        """Put the prefix into the slots of the next ``count`` rows, having read it if it was not yet."""
        known = len(self.prefix)
        if not known:
            return
        state, slot = self.state, self.state.num_slots
        if not self._has_prefix:
            self._make_room(known + 1)
            self._run(state.slots[:0], [self.prefix], [self._read(slot, 0, known, 0)])
            self._has_prefix = True
        for cache in self.caches:
            cache[state.size : state.size + count, :, :, :known] = cache[slot, :, :, :known]

    def _make_room(self, positions: int) -> None:
        if self.state.grow(positions):
            more = self.state.room - self.caches[0].shape[3]
            self.caches = [F.pad(cache, (0, 0, 0, more)) for cache in self.caches]
