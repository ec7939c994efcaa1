"""Token-level decoding: prompts in, answers out, with a key-value cache. Knows nothing about text."""

from collections import deque
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from itertools import takewhile
from typing import TYPE_CHECKING

import torch

from sftcli.config.schema.run import SamplingSettings
from sftcli.events import StopFlag
from sftcli.modeling.decoding.fused_decode import fused_step
from sftcli.modeling.decoding.fused_rows import FusedRows
from sftcli.modeling.decoding.kv_cache import Rows
from sftcli.modeling.decoding.row_kinds import fitting_rows
from sftcli.modeling.decoding.sampling import RowChooser, choose

if TYPE_CHECKING:
    from transformers import PreTrainedModel

OnToken = Callable[[int, int], None]  # (row, token id), each as soon as it is known
IsOver = Callable[[int, Sequence[int]], bool]  # (row, its tokens so far) -> whether the answer ends here

MAX_ROWS = 32  # rows decoded together
_MAX_READ = (
    1024  # tokens of prompts that are read in one pass, so that a pass takes about a second on a laptop
)
_MIN_PREFIX = 8  # tokens that prompts must share for it to be worth a pass of their own


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """The new tokens of one prompt, the stop token left out; ``stopped`` is false where the length ran out."""

    ids: tuple[int, ...]
    stopped: bool


OnAnswer = Callable[[int, Answer], None]  # (row, its answer), each as soon as it is complete


@dataclass(slots=True)
class _Running:
    """A row that is being decoded."""

    index: int
    chooser: RowChooser
    ids: list[int] = field(default_factory=list)


@torch.inference_mode()
def decode(
    model: "PreTrainedModel",
    prompts: Sequence[Sequence[int]],
    *,
    settings: SamplingSettings,
    stop_ids: AbstractSet[int],
    stop: StopFlag,
    max_rows: int = MAX_ROWS,
    seeds: Sequence[Sequence[int]] | None = None,
    on_token: OnToken | None = None,
    on_answer: OnAnswer | None = None,
    is_over: IsOver | None = None,
) -> list[Answer]:
    """Continue every prompt until a stop token, ``is_over``, ``max_new_tokens``, or ``stop``.

    Prompts are started in the order given; at most ``max_rows`` run together, and the next one takes the place of each
    that ends. Each row samples from a generator of its own, seeded by ``settings.seed`` and its entry of ``seeds`` (its
    number by default), so what is drawn does not depend on which rows share its batch. The logits do, by the rounding of
    products whose shape changes with the batch: in float32 that decides between tokens that are as good as equally likely,
    in bfloat16 now and then between others. Rows cut by ``stop`` are returned as they are, but not given to ``on_answer``.
    """
    rows = make_rows(model, min(max_rows, len(prompts)), prefix=_shared_prefix(prompts))
    waiting = deque(range(len(prompts)))
    running: list[_Running] = []
    answers = _Answers(len(prompts), settings.max_new_tokens, stop_ids, on_token, on_answer, is_over)
    while (waiting or running) and not stop.requested():
        last = torch.tensor([row.ids[-1] for row in running], dtype=torch.int64, device=model.device)
        new = _next_prompts(waiting, prompts, rows.capacity - len(running))
        logits = rows.advance(last, [prompts[index] for index in new])
        for index in new:
            seed = (settings.seed, *(seeds[index] if seeds is not None else (index,)))
            chooser = RowChooser(
                settings, seed=seed, prompt=prompts[index], vocab_size=logits.shape[-1], device=logits.device
            )
            running.append(_Running(index, chooser))
        chosen = choose(logits, [row.chooser for row in running]).tolist()
        ended = [place for place, token in enumerate(chosen) if answers.take(running[place], token)]
        for place in reversed(ended):
            rows.remove(place)
            running[place] = running[-1]
            running.pop()
    for row in running:
        answers.keep(row, stopped=False)
    return answers.answers


class _Answers:
    """Takes tokens as they come and tells when a row ends."""

    def __init__(
        self,
        count: int,
        max_new_tokens: int,
        stop_ids: AbstractSet[int],
        on_token: OnToken | None,
        on_answer: OnAnswer | None,
        is_over: IsOver | None,
    ) -> None:
        self.answers = [Answer(ids=(), stopped=False)] * count
        self._max_new_tokens = max_new_tokens
        self._stop_ids = stop_ids
        self._on_token = on_token
        self._on_answer = on_answer
        self._is_over = is_over

    def take(self, row: _Running, token: int) -> bool:
        """Add a token to a row; return whether the row ends with it."""
        stopped = token in self._stop_ids
        if not stopped:
            row.ids.append(token)
            if self._on_token is not None:
                self._on_token(row.index, token)
            stopped = self._is_over is not None and self._is_over(row.index, row.ids)
        ended = stopped or len(row.ids) >= self._max_new_tokens
        if ended:
            self.keep(row, stopped=stopped)
            if self._on_answer is not None:
                self._on_answer(row.index, self.answers[row.index])
        return ended

    def keep(self, row: _Running, *, stopped: bool) -> None:
        """Make the answer of a row that goes no further."""
        self.answers[row.index] = Answer(ids=tuple(row.ids), stopped=stopped)


def make_rows(model: "PreTrainedModel", count: int, *, prefix: Sequence[int] = ()) -> Rows:
    """Return the way to decode ``count`` rows of ``model`` together, whose prompts all begin with ``prefix``."""
    fused = fused_step(model)
    if fused is None:
        return fitting_rows(model)(model, max(1, count))
    return FusedRows(fused, max(1, count), prefix=prefix)


def _shared_prefix(prompts: Sequence[Sequence[int]]) -> Sequence[int]:
    """Return what every prompt begins with, of each at least the last token left out; nothing where it is short."""
    if len(prompts) < 2:
        return ()
    first, *others = (prompt[:-1] for prompt in prompts)
    shared = sum(
        1 for _ in takewhile(lambda tokens: len(set(tokens)) == 1, zip(first, *others, strict=False))
    )
    return first[:shared] if shared >= _MIN_PREFIX else ()


def _next_prompts(waiting: deque[int], prompts: Sequence[Sequence[int]], places: int) -> list[int]:
    """Take the next prompts to read together, at most ``places``, and at least one where there is a place."""
    new: list[int] = []
    size = 0
    while waiting and len(new) < places and (not new or size + len(prompts[waiting[0]]) <= _MAX_READ):
        size += len(prompts[waiting[0]])
        new.append(waiting.popleft())
    return new
