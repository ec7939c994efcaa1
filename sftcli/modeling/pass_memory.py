"""How much memory a pass over a long row takes, foreseen from passes over short pieces of it.

A machine that runs out of memory ends the process that asks for more, without a word; only a device with memory of its own
raises an error. So rows that are long for their model are measured on a CPU before it works on them.
"""

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sftcli.errors import ResourceError
from sftcli.figures import size
from sftcli.modeling.attention import attention_of
from sftcli.modeling.config_values import config_value
from sftcli.runtime import free_memory_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SPARE = 1.15  # for gaps between blocks, and what libraries take inside an operation
_LARGEST_PIECE = 1024  # tokens that are measured at most
_FEWEST = 64  # below this a row is not what takes the memory


@dataclass(frozen=True, slots=True)
class PassMemory:
    """Bytes of a pass, as a polynomial in the tokens of its rows: attention that keeps every pair grows with their square."""

    fixed: float
    token: float
    pair: float

    def at(self, tokens: int, *, rows: int = 1) -> int:
        """Return the bytes of a pass over ``rows`` rows of so many tokens each."""
        return round(SPARE * (self.fixed + rows * (self.token * tokens + self.pair * tokens**2)))

    def longest(self, free: int) -> int:
        """Return how many tokens a row may have whose pass takes ``free`` bytes."""
        low, high = 0, 1
        while self.at(high) <= free and high < 2**30:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.at(middle) <= free else (low, middle)
        return low


class _Meter(TorchDispatchMode):
    """Counts the bytes of the tensors that operations make, as long as these live; ``peak`` is the most."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.held = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> object:
        """Call ``func``, and count what it makes: not what was there before."""
        self._note((args, kwargs or {}), is_made=False)
        made = func(*args, **(kwargs or {}))
        self._note(made, is_made=True)
        return made

    def _note(self, values: object, *, is_made: bool) -> None:
        for value in tree_leaves(values):
            if (
                not isinstance(value, torch.Tensor) or value.is_mkldnn
            ):  # laid out for products before, its storage unknown
                continue
            storage = value.untyped_storage()
            if (key := storage._cdata) not in self._known:
                self._known.add(key)
                taken = storage.nbytes() if is_made else 0
                weakref.finalize(storage, self._release, key, taken)
                self.held += taken
                self.peak = max(self.peak, self.held)

    def _release(self, key: int, taken: int) -> None:
        self._known.discard(key)
        self.held -= taken


def measure_pass(take: Callable[[int], object], longest: int) -> PassMemory:
    """Return the memory of passes, from ``take``, which makes one over a piece of so many tokens; ``longest`` is what there is."""
    top = min(_LARGEST_PIECE, max(longest, 4))
    sizes = (top // 4, top // 2, top)
    peaks = []
    for tokens in sizes:
        with _Meter() as meter:
            take(tokens)
        peaks.append(meter.peak)
    pair, token, fixed = np.polyfit(sizes, peaks, 2).tolist()
    if pair < 0:  # some part does not grow on: what was seen last is continued
        pair, token = 0.0, (peaks[2] - peaks[1]) / (sizes[2] - sizes[1])
        fixed = peaks[2] - token * sizes[2]
    return PassMemory(fixed=fixed, token=token, pair=pair)


def may_be_short(model: "PreTrainedModel", tokens: int, *, longest: int, more: int = 0) -> bool:
    """Return whether a pass over ``tokens`` tokens, in rows of ``longest`` at most, could take a good part of what is free.

    It takes less than the largest that this is counted from, and ``more`` bytes beside it; where that is little nothing has
    to be measured. Only on a CPU does it matter.
    """
    if model.device.type != "cpu" or longest < _FEWEST:
        return False
    names = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
    layers, hidden, inner, heads, vocabulary = (config_value(model, name) for name in names)
    if not all(isinstance(value, int) for value in (layers, hidden, inner, heads, vocabulary)):
        return True
    pairs = 6 * heads * longest if attention_of(model) == "eager" else 0  # the others keep no scores
    numbers = tokens * (layers * (48 * hidden + 8 * inner + pairs) + 3 * vocabulary)
    return bool(2 * (4 * numbers + more) > free_memory_bytes())


def require_row_memory(
    model: "PreTrainedModel",
    take: Callable[[int], object],
    longest: int,
    *,
    row: str,
    doing: str,
    hint: Callable[[int], str],
) -> None:
    """Refuse a row of ``longest`` tokens whose pass takes more than is free; ``take`` makes one over a piece of so many tokens.

    Raises:
        ResourceError: As ``require_memory``.
    """
    if may_be_short(model, longest, longest=longest):
        memory = measure_pass(take, longest)
        require_memory(memory, free_memory_bytes(), row=row, tokens=longest, doing=doing, hint=hint)


def require_memory(
    memory: PassMemory, free: int, *, row: str, tokens: int, doing: str, hint: Callable[[int], str]
) -> None:
    """Refuse a row whose pass takes more memory than is ``free``; ``hint`` says what to do where so many tokens would fit.

    Raises:
        ResourceError: It does.
    """
    if (need := memory.at(tokens)) > free:
        raise ResourceError(
            f"{row} has {tokens:,} tokens: {doing} takes about {size(need)} of memory, and {size(max(0, free))} are free",
            hint=hint(memory.longest(free)),
        )
