"""Examples to tensors: the only place where targets are shifted, and the plan of which micro-batches make which step."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Protocol

import numpy as np
import torch
from torch.nn import functional

from sftcli.copies import sent
from sftcli.data.batches.order import EpochOrder, TextSteps
from sftcli.data.batches.packing import best_fit_even, group_alike
from sftcli.data.example import Example

Inputs = dict[str, torch.Tensor | int | tuple[int, ...]]  # of a model, by name

IGNORED = -100  # the target of a position without loss; what torch's cross-entropy ignores by default
_PIECE_ANSWER = 8  # tokens
_TEXT_STREAM = 1  # keeps the order of text rows apart from that of instruction rows


class ExampleSource(Protocol):
    """Random access to examples whose lengths are known without reading them."""

    @property
    def num_tokens(self) -> Sequence[int]:
        """Length of every example in tokens."""
        ...

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Example: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Documents:
    """Where the documents of packed rows are. Padding counts as documents of one token, so that it sees itself only."""

    position_ids: (
        torch.Tensor
    )  # (B, T) int64, from 0 in each document; of a part of rows, those of its positions
    bounds: (
        torch.Tensor | None
    )  # (documents + 1,) int32: where each begins and the last ends; None with several rows
    lengths: tuple[int, ...]  # tokens of each, row after row; what is on the host needs no wait for a device

    def part(self, positions: slice, padding: int) -> "Documents":
        """Return the same documents, behind them ``padding`` positions that fill the rows up, for ``positions`` of the rows alone."""
        bounds = self.bounds
        if bounds is not None:
            bounds = torch.cat([bounds, bounds[-1] + torch.arange(1, padding + 1, dtype=bounds.dtype)])
        return Documents(
            position_ids=functional.pad(self.position_ids, (0, padding))[:, positions],
            bounds=bounds,
            lengths=self.lengths + (1,) * padding,
        )

    def to(self, device: torch.device) -> "Documents":
        """Return the same with its tensors on ``device``."""
        bounds = None if self.bounds is None else sent(self.bounds, device)
        return replace(self, position_ids=sent(self.position_ids, device), bounds=bounds)

    @property
    def inputs(self) -> Inputs:
        """What a model of transformers is told beside the ids; the names are those of its kernels for packed rows.

        ``document_lengths`` is for ``modeling.kernels.document_attention``; other attention does not look at it.
        """
        arguments: Inputs = {"position_ids": self.position_ids}
        if self.bounds is not None:
            longest = max(self.lengths)
            arguments |= {"cu_seq_lens_q": self.bounds, "cu_seq_lens_k": self.bounds}
            arguments |= {"max_length_q": longest, "max_length_k": longest, "document_lengths": self.lengths}
        return arguments


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Rows of one forward and backward pass, padded on the right.

    ``targets[b, t]`` is the token after ``input_ids[b, t]`` where that token has loss, else ``IGNORED``::

        input_ids   <user> hi <end> <bot> hello <stop> pad
        targets        -    -    -  hello <stop>   -    -

    No attention mask is needed: padding stands behind every real token, and attention is causal. Where ``documents``
    is set, a row holds several examples one after the other, and no target crosses from one to the next::

        input_ids   <bot> hello <stop> <bot> bye <stop>
        targets     hello <stop>   -    bye <stop>   -
        positions     0     1      2     0    1     2
    """

    input_ids: torch.Tensor  # (B, T) int64
    targets: torch.Tensor  # (B, T) int64
    # (N,) int64: where ``targets``, flattened, are not IGNORED, in order. A device that had to search would make its host wait.
    loss_places: torch.Tensor
    example_ids: tuple[int, ...]  # index of each example in its dataset; pretraining text counts down from -1
    response_tokens: int  # targets that are not IGNORED, at least 1 but in a part of rows
    fills: tuple[int, ...]  # tokens of each row, padding excluded
    attended_pairs: int  # of positions that attention compares: causal, within an example
    documents: Documents | None = None  # None: each row is one example
    is_text: bool = False  # pretraining text instead of instruction rows
    parts: int = 1  # processes that share the rows, of which this one has successive positions

    def __post_init__(self) -> None:
        # A place of other rows would have a loss too, and a wrong one.
        if len(self.loss_places) != self.response_tokens:
            raise ValueError(f"{len(self.loss_places)} places for {self.response_tokens} targets with loss")

    @property
    def tokens(self) -> int:
        """Positions that hold no padding."""
        return sum(self.fills)

    @property
    def is_token(self) -> torch.Tensor:
        """Which positions hold no padding, (B, T) bool."""
        return sent(torch.from_numpy(self._holds_token()), self.input_ids.device)

    @property
    def token_places(self) -> torch.Tensor:
        """Where ``is_token``, flattened, is true, (N,) int64 in order; found on the host."""
        return sent(torch.from_numpy(np.flatnonzero(self._holds_token())), self.input_ids.device)

    def _holds_token(self) -> np.ndarray:
        return np.arange(self.input_ids.shape[1]) < np.asarray(self.fills)[:, None]

    @property
    def padding_tokens(self) -> int:
        """Positions that hold padding."""
        return self.input_ids.numel() - self.tokens

    @property
    def inputs(self) -> Inputs:
        """What the model gets, by name; ``row_parts`` is for ``modeling.kernels.document_attention``."""
        inputs: Inputs = {"input_ids": self.input_ids, **(self.documents.inputs if self.documents else {})}
        return inputs | {"row_parts": self.parts} if self.parts > 1 else inputs

    @property
    def has_halves(self) -> bool:
        """Whether there are several rows, of one example each."""
        return self.documents is None and len(self.example_ids) > 1

    def halves(self) -> "tuple[Batch, Batch]":
        """Return the first half of the rows and the rest, as wide as they are; ``has_halves`` must hold."""
        middle = len(self.example_ids) // 2
        return self._rows(0, middle), self._rows(middle, len(self.example_ids))

    def _rows(self, begin: int, end: int) -> "Batch":
        fills, targets = self.fills[begin:end], self.targets[begin:end]
        return replace(
            self,
            input_ids=self.input_ids[begin:end],
            targets=targets,
            loss_places=(places := (targets.flatten() != IGNORED).nonzero()[:, 0]),
            example_ids=self.example_ids[begin:end],
            response_tokens=len(places),
            fills=fills,
            attended_pairs=sum(count * (count + 1) // 2 for count in fills),
        )

    def part(self, index: int, parts: int) -> "Batch":
        """Return the positions that process ``index`` of ``parts`` computes; rows are filled up so that all get as many.

        Losses of all parts add up to those of the rows, as no target is lost. Attention has to bring the parts together.
        """
        if parts == 1:
            return self
        width = -(-self.input_ids.shape[1] // parts)
        padding = parts * width - self.input_ids.shape[1]
        own = slice(index * width, (index + 1) * width)
        targets = functional.pad(self.targets, (0, padding), value=IGNORED)[:, own]
        loss_places = (targets.flatten() != IGNORED).nonzero()[:, 0]
        return replace(
            self,
            input_ids=functional.pad(self.input_ids, (0, padding))[:, own],
            targets=targets,
            loss_places=loss_places,
            response_tokens=len(loss_places),
            fills=tuple(min(max(fill - own.start, 0), width) for fill in self.fills),
            attended_pairs=self.attended_pairs // parts,  # each process has a part of the heads
            documents=(self.documents or _one_in_each_row(self.input_ids)).part(own, padding),
            parts=parts,
        )

    def to(self, device: torch.device) -> "Batch":
        """Return the batch with its tensors on ``device``."""
        return replace(
            self,
            input_ids=sent(self.input_ids, device),
            targets=sent(self.targets, device),
            loss_places=sent(self.loss_places, device),
            documents=self.documents.to(device) if self.documents else None,
        )


def collate(examples: Sequence[Example], *, example_ids: Sequence[int], pad_id: int) -> Batch:
    """Pad ``examples`` on the right to the longest and shift their targets by one."""
    return _lay_out([[example] for example in examples], example_ids, pad_id)


def piece_of(example: Example, tokens: int) -> Example:
    """Return the beginning of ``example``, its last few tokens with loss."""
    mask = np.zeros(min(tokens, len(example.input_ids)), dtype=np.bool_)
    mask[-_PIECE_ANSWER:] = True
    return replace(example, input_ids=example.input_ids[:tokens], loss_mask=mask)


def collate_packed(packs: Sequence[Sequence[Example]], *, example_ids: Sequence[int], pad_id: int) -> Batch:
    """Put the examples of each pack into one row, and say where they are; ``example_ids`` follow the packs."""
    batch = _lay_out(packs, example_ids, pad_id)
    positions = np.zeros(batch.input_ids.shape, dtype=np.int64)
    lengths = [[len(example.input_ids) for example in pack] for pack in packs]
    for row, counts in enumerate(lengths):
        positions[row, : sum(counts)] = np.concatenate([np.arange(count) for count in counts])
    bounds = torch.tensor([0, *np.cumsum(lengths[0])], dtype=torch.int32) if len(packs) == 1 else None
    documents = Documents(
        position_ids=torch.from_numpy(positions), bounds=bounds, lengths=tuple(chain.from_iterable(lengths))
    )
    return replace(batch, documents=documents)


def _lay_out(packs: Sequence[Sequence[Example]], example_ids: Sequence[int], pad_id: int) -> Batch:
    lengths = [[len(example.input_ids) for example in pack] for pack in packs]
    fills = list(map(sum, lengths))
    input_ids = np.full((len(packs), max(fills)), pad_id, dtype=np.int64)
    targets = np.full(input_ids.shape, IGNORED, dtype=np.int64)
    for row, pack in enumerate(packs):
        begin = 0
        for example in pack:
            end = begin + len(example.input_ids)
            input_ids[row, begin:end] = example.input_ids
            # The first token of an example has no position that predicts it.
            targets[row, begin : end - 1] = np.where(example.loss_mask[1:], example.input_ids[1:], IGNORED)
            begin = end
    loss_places = np.flatnonzero(targets != IGNORED)
    return Batch(
        input_ids=torch.from_numpy(input_ids),
        targets=torch.from_numpy(targets),
        loss_places=torch.from_numpy(loss_places),
        example_ids=tuple(example_ids),
        response_tokens=len(loss_places),
        fills=tuple(fills),
        attended_pairs=sum(count * (count + 1) // 2 for count in chain.from_iterable(lengths)),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Packing:
    """How examples share rows: up to ``row_tokens`` in a row, ``rows`` rows in a micro-batch."""

    row_tokens: int
    rows: int = 1

    def reduced(self, size: int, whole: int) -> "Packing":
        """Return what fits into a micro-batch of ``size`` where this is one of ``whole``; a row is never cut."""
        if self.rows == 1:
            return replace(self, row_tokens=max(1, self.row_tokens * size // whole))
        return replace(self, rows=max(1, self.rows * size // whole))


@dataclass(frozen=True, slots=True, kw_only=True)
class TextShare:
    """Running text that takes ``fraction`` of the steps."""

    examples: ExampleSource
    fraction: float


class BatchPlan:
    """Which examples make which optimizer step, and which micro-batches; a pure function of the step.

    Args:
        examples: Instruction rows.
        batch_size: Examples in a step.
        micro_batch_size: Most examples in a micro-batch that is not packed.
        pad_id: What fills rows up.
        seed: Of the order.
        keys: Of each example where epochs go from the lowest to the highest; None shuffles.
        packing: How examples share rows; None gives each its own.
        text: Whose rows take some of the steps.
    """

    def __init__(
        self,
        examples: ExampleSource,
        *,
        batch_size: int,
        micro_batch_size: int,
        pad_id: int,
        seed: int,
        keys: Sequence[float] | None = None,
        packing: Packing | None = None,
        text: TextShare | None = None,
    ) -> None:
        self.examples = examples
        self.batch_size = batch_size
        self.micro_batch_size = micro_batch_size
        self.pad_id = pad_id
        self.packing = packing
        self._order = EpochOrder(len(examples), seed=[seed], keys=keys)
        self._text = text
        self._text_steps = TextSteps(text.fraction if text else 0.0, seed=seed)
        self._text_order = EpochOrder(len(text.examples) if text else 0, seed=[seed, _TEXT_STREAM])

    @property
    def micro_batch_tokens(self) -> int:
        """Most positions of a micro-batch of packed rows; 0 without packing."""
        return self.packing.row_tokens * self.packing.rows if self.packing else 0

    def example_ids(self, step: int) -> list[int]:
        """Return the examples of the step after ``step`` finished ones, in plan order; text rows on a step of text."""
        is_text, before = self._text_steps.is_text(step), self._text_steps.before(step)
        order, begin = (self._text_order, before) if is_text else (self._order, step - before)
        return order.rows(begin * self.batch_size, (begin + 1) * self.batch_size)

    def window(self, step: int) -> list[Batch]:
        """Return the micro-batches of the step after ``step`` finished ones."""
        is_text = self._text_steps.is_text(step)
        examples = self._text.examples if self._text and is_text else self.examples
        ids = self.example_ids(step)
        batches = (
            self._padded(examples, ids) if self.packing is None else self._packed(examples, ids, self.packing)
        )
        return [_of_text(batch) for batch in batches] if is_text else batches

    def example(self, example_id: int) -> Example:
        """Return an example of a batch by its id."""
        if example_id >= 0:
            return self.examples[example_id]
        assert self._text is not None
        return self._text.examples[-1 - example_id]

    def epoch(self, step: int) -> float:
        """Return the passes over the instruction rows after ``step`` finished steps."""
        return (step - self._text_steps.before(step)) * self.batch_size / len(self.examples)

    def _padded(self, examples: ExampleSource, ids: Sequence[int]) -> list[Batch]:
        groups = group_alike([examples.num_tokens[index] for index in ids], self.micro_batch_size)
        return [_collate(examples, [ids[place] for place in group], self.pad_id) for group in groups]

    def _packed(self, examples: ExampleSource, ids: Sequence[int], packing: Packing) -> list[Batch]:
        packs = best_fit_even([examples.num_tokens[index] for index in ids], packing.row_tokens)
        chosen = [[ids[place] for place in pack] for pack in packs]
        return [
            collate_packed(
                [[examples[index] for index in pack] for pack in chosen[begin : begin + packing.rows]],
                example_ids=list(chain.from_iterable(chosen[begin : begin + packing.rows])),
                pad_id=self.pad_id,
            )
            for begin in range(0, len(chosen), packing.rows)
        ]


def batches_in_order_of_length(
    examples: ExampleSource, *, rows: Sequence[int], max_batch_tokens: int, pad_id: int
) -> Iterator[Batch]:
    """Yield each of ``rows`` once, longest first, in batches of at most ``max_batch_tokens`` positions (or one row)."""
    lengths = examples.num_tokens
    order = sorted(rows, key=lambda index: (-lengths[index], index))
    while order:
        count = max(1, max_batch_tokens // lengths[order[0]])
        yield _collate(examples, order[:count], pad_id)
        order = order[count:]


def _one_in_each_row(input_ids: torch.Tensor) -> Documents:
    """Return the positions of rows of one example each, which a model numbers itself as long as it sees all of them."""
    positions = torch.arange(input_ids.shape[1]).expand_as(input_ids)
    return Documents(position_ids=positions, bounds=None, lengths=())


def _of_text(batch: Batch) -> Batch:
    return replace(batch, is_text=True, example_ids=tuple(-1 - index for index in batch.example_ids))


def _collate(examples: ExampleSource, ids: Sequence[int], pad_id: int) -> Batch:
    return collate([examples[index] for index in ids], example_ids=ids, pad_id=pad_id)
