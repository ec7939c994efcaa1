"""Examples to tensors: the only place where targets are shifted, and the plan of which rows make which step.

The plan is a pure function of the seed and the step, so a resumed run needs no cursor beyond its step number.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from sftcli.data.example import Example

IGNORED = -100  # the target of a position without loss; what torch's cross-entropy ignores by default


class ExampleSource(Protocol):
    """Random access to examples whose lengths are known without reading them."""

    @property
    def num_tokens(self) -> Sequence[int]:
        """Length of every example in tokens."""
        ...

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Example: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Rows of one forward and backward pass, padded on the right.

    ``targets[b, t]`` is the token after ``input_ids[b, t]`` where that token has loss, else ``IGNORED``::

        input_ids   <user> hi <end> <bot> hello <stop> pad
        targets        -    -    -  hello <stop>   -    -

    No attention mask is needed: padding stands behind every real token, and attention is causal.
    """

    input_ids: torch.Tensor  # (B, T) int64
    targets: torch.Tensor  # (B, T) int64
    example_ids: tuple[int, ...]  # index of each row in its dataset
    response_tokens: int  # targets that are not IGNORED, at least 1
    tokens: int  # padding excluded

    @property
    def padding_tokens(self) -> int:
        """Positions that hold padding."""
        return self.input_ids.numel() - self.tokens

    def to(self, device: torch.device) -> "Batch":
        """Return the batch with its tensors on ``device``."""
        return Batch(
            input_ids=self.input_ids.to(device, non_blocking=True),
            targets=self.targets.to(device, non_blocking=True),
            example_ids=self.example_ids,
            response_tokens=self.response_tokens,
            tokens=self.tokens,
        )


def collate(examples: Sequence[Example], *, example_ids: Sequence[int], pad_id: int) -> Batch:
    """Pad ``examples`` on the right to the longest and shift their targets by one."""
    width = max(len(example.input_ids) for example in examples)
    input_ids = np.full((len(examples), width), pad_id, dtype=np.int64)
    targets = np.full((len(examples), width), IGNORED, dtype=np.int64)
    for row, example in enumerate(examples):
        count = len(example.input_ids)
        input_ids[row, :count] = example.input_ids
        # The first token of a row has no position that predicts it.
        targets[row, : count - 1] = np.where(example.loss_mask[1:], example.input_ids[1:], IGNORED)
    return Batch(
        input_ids=torch.from_numpy(input_ids),
        targets=torch.from_numpy(targets),
        example_ids=tuple(example_ids),
        response_tokens=int((targets != IGNORED).sum()),
        tokens=sum(len(example.input_ids) for example in examples),
    )


class BatchPlan:
    """Which examples make which optimizer step: every epoch is a seeded permutation, epochs follow without a gap."""

    def __init__(
        self,
        examples: ExampleSource,
        *,
        batch_size: int,
        micro_batch_size: int,
        pad_id: int,
        seed: int,
    ) -> None:
        self.examples = examples
        self.batch_size = batch_size
        self.micro_batch_size = micro_batch_size
        self.pad_id = pad_id
        self.seed = seed
        self._epoch_order: tuple[int, np.ndarray] = (-1, np.empty(0, dtype=np.int64))

    def example_ids(self, step: int) -> list[int]:
        """Return the examples of the step after ``step`` finished ones, in plan order."""
        begin = step * self.batch_size
        return [self._at(position) for position in range(begin, begin + self.batch_size)]

    def window(self, step: int) -> list[Batch]:
        """Return the micro-batches of the step after ``step`` finished ones, rows of like length together."""
        lengths = self.examples.num_tokens
        ids = sorted(self.example_ids(step), key=lambda index: (-lengths[index], index))
        return list(_batches(self.examples, ids, self.micro_batch_size, self.pad_id))

    def epoch(self, step: int) -> float:
        """Return the passes over the examples after ``step`` finished steps."""
        return step * self.batch_size / len(self.examples)

    def _at(self, position: int) -> int:
        epoch, index = divmod(position, len(self.examples))
        if self._epoch_order[0] != epoch:
            # RandomState over MT19937 is frozen by numpy's compatibility policy: the order never changes with a release.
            generator = np.random.RandomState(np.random.MT19937(np.random.SeedSequence([self.seed, epoch])))
            self._epoch_order = (epoch, generator.permutation(len(self.examples)))
        return int(self._epoch_order[1][index])


def batches_in_order_of_length(
    examples: ExampleSource, *, rows: Sequence[int], max_batch_tokens: int, pad_id: int
) -> Iterator[Batch]:
    """Yield each of ``rows`` once, longest first, in batches of at most ``max_batch_tokens`` positions (or one row)."""
    lengths = examples.num_tokens
    order = sorted(rows, key=lambda index: (-lengths[index], index))
    while order:
        count = max(1, max_batch_tokens // lengths[order[0]])
        yield from _batches(examples, order[:count], count, pad_id)
        order = order[count:]


def _batches(examples: ExampleSource, ids: Sequence[int], rows: int, pad_id: int) -> Iterator[Batch]:
    for begin in range(0, len(ids), rows):
        part = ids[begin : begin + rows]
        yield collate([examples[index] for index in part], example_ids=part, pad_id=pad_id)
