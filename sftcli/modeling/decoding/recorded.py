"""Steps of rows that are recorded once and then replayed: on CUDA a step is launched as a whole, not operation by operation.

A recording has fixed tensors and fixed Python values. So a step is recorded for a number of rows and a width of the cache,
both rounded up: rows beyond those that run hold nothing, and a mask hides positions beyond a row's own. What it reads that
changes lies in tensors that stay where they are: the tokens, the lengths, the cache.
"""

from collections.abc import Callable
from typing import Protocol

import torch

from sftcli.memory_faults import CANNOT, is_out_of_memory
from sftcli.modeling.decoding.kv_state import KVCacheState

Work = Callable[[], torch.Tensor]
_TRIALS = 2  # of a step before it is recorded: libraries set themselves up in the first
_PARTS = 4  # widths between one power of two and the next; a step looks at no more than a quarter too much


class Recorder(Protocol):
    """Records what a function launches."""

    def record(self, work: Work) -> Work:
        """Return what launches the same again, on the same tensors, and returns the same result tensor with new numbers."""


class CudaGraphs:
    """Records CUDA graphs, which share what memory they work in."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()

    def record(self, work: Work) -> Work:
        """Run ``work`` beside the present stream, then record it."""
        present, beside = torch.cuda.current_stream(self._device), torch.cuda.Stream(self._device)
        beside.wait_stream(present)
        with torch.cuda.stream(beside):
            for _ in range(_TRIALS):
                work()
        present.wait_stream(beside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            result = work()

        def replay() -> torch.Tensor:
            graph.replay()
            return result

        return replay


def recorder_for(device: torch.device) -> Recorder | None:
    """Return what records steps on ``device``; None where nothing does."""
    return CudaGraphs(device) if device.type == "cuda" else None


class RecordedSteps:
    """The steps of some rows, each recorded when its number of rows and its width come up first.

    The first that cannot be recorded raises what it raises, which a trial on short texts finds. Should a later one fail where
    others did not, steps run as they are from there on.

    Args:
        recorder: Records; None lets every step run as it is.
        state: Of the rows.
        step: Returns the logits behind the tokens of all rows, (B,) -> (B, V), and writes their keys and values in place.
    """

    def __init__(
        self, recorder: Recorder | None, state: KVCacheState, step: Callable[[torch.Tensor], torch.Tensor]
    ) -> None:
        self._recorder = recorder
        self._state = state
        self._step = step
        self._tokens = torch.zeros_like(state.lengths)
        self._recorded: dict[tuple[int, int], Work] = {}
        self._has_recorded = False

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        """Take a step of ``tokens`` (B,), one of every row; return the logits (B, V)."""
        if self._recorder is None:
            return self._step(tokens)
        count, state = len(tokens), self._state
        rows, width = _rows(count, state.num_slots), min(_width(state.width), state.room)
        self._tokens[:count] = tokens
        if (rows, width) not in self._recorded:
            try:
                with state.fixed(rows, width):
                    self._recorded[rows, width] = self._recorder.record(
                        lambda: self._step(self._tokens[:rows])
                    )
            except CANNOT as error:
                if is_out_of_memory(error) or not self._has_recorded:
                    raise
                self._recorder = None
                return self._step(tokens)
            self._has_recorded = True
        return self._recorded[rows, width]()[:count]

    def forget(self) -> None:
        """Forget what was recorded: the cache has moved."""
        self._recorded.clear()


def _rows(count: int, most: int) -> int:
    return min(1 << (count - 1).bit_length(), most)


def _width(positions: int) -> int:
    """Return ``positions`` rounded up to a multiple of a quarter of a power of two."""
    part = max((1 << (positions - 1).bit_length()) // (2 * _PARTS), 32)
    return -(-positions // part) * part
