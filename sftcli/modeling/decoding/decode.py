"""Token-level decoding: prompts in, tokens out as they are drawn. Knows nothing about text."""

import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from itertools import takewhile
from typing import TYPE_CHECKING, Literal, cast

import torch

from sftcli.config.schema.run import SamplingSettings
from sftcli.errors import DataError, MismatchError
from sftcli.events import StopFlag
from sftcli.memory_faults import is_out_of_memory
from sftcli.modeling.architecture import not_finite
from sftcli.modeling.config_values import config_value, positions_of_model
from sftcli.modeling.decoding.decoder import Decoder
from sftcli.modeling.decoding.kv_cache import Rows
from sftcli.modeling.decoding.sampling import RowSampler, logprobs_of, read, sample
from sftcli.runtime import memory_bytes, pass_sizes, reachable_memory_bytes, release_memory

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_FEWEST_ROWS = 32  # that are decoded together on CUDA, however little memory is free
_COPIES = 4  # of the logits of a row in float32, while its token is drawn
_MIN_PREFIX = 8  # tokens that prompts must share for it to be worth a pass of their own
_SHORTEN = "shorten the prompt, or name a model with more"

Finish = Literal["", "stop", "length", "stopped"]  # "stopped" by the user


@dataclass(slots=True, kw_only=True)
class Row:
    """The answer to one prompt as it grows; ``finish`` is "" until it ends."""

    index: int  # of the prompt
    ids: list[int] = field(default_factory=list)  # without the stop token
    token: int | None = None  # the newest of ``ids``; None where the row ends without another one
    finish: Finish = ""
    # Sum over the tokens drawn, the stop token included, before penalties, filters and temperature. It is not compared: its
    # last digits depend on the rows beside it.
    logprob: float = field(default=0.0, compare=False)
    drawn: int = 0  # tokens that ``logprob`` is of

    def take(self, token: int, logprob: float, stop_ids: AbstractSet[int], max_new_tokens: int) -> None:
        """Add a token, or end with it."""
        self.logprob += logprob
        self.drawn += 1
        if token in stop_ids:
            self.token, self.finish = None, "stop"
            return
        self.token = token
        self.ids.append(token)
        if len(self.ids) >= max_new_tokens:
            self.finish = "length"

    def end(self) -> None:
        """End the answer with the token it has just got."""
        self.finish = "stop"

    @property
    def confidence(self) -> float:
        """Geometric mean of the probabilities of the tokens drawn, 0 to 1, to five decimals; 0 where none was drawn."""
        return round(math.exp(self.logprob / self.drawn), 5) if self.drawn else 0.0


def decode(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    *,
    settings: SamplingSettings,
    stop_ids: AbstractSet[int],
    stop: StopFlag,
    max_rows: int | None = None,
    seeds: Sequence[Sequence[int]] | None = None,
) -> Iterator[Row]:
    """Continue every prompt, and yield its row at each new token and where it ends.

    A row ends at a stop token, at ``max_new_tokens``, or where who iterates calls ``Row.end``; once ``stop`` is set all that
    are left end as "stopped", those that were never begun too. So each row comes with a ``finish`` once, the last time.

    Prompts are started in the order given; at most ``max_rows`` (where it is not said, what suits the device) run together, and the
    next one takes the place of each that ends. Each row samples from a generator of its own, seeded by ``settings.seed`` and its entry of ``seeds`` (its
    number by default), so what is drawn does not depend on which rows share its batch. The logits do, by the rounding of
    products whose shape changes with the batch: in float32 that decides between tokens that are as good as equally likely,
    in bfloat16 now and then between others.

    Where memory runs out half as many rows go on together, and those that ran are read anew with what they have.

    An answer that has come to the last of the positions that the model was made for ends as "length".

    Raises:
        DataError: A prompt is longer than that or empty, or the model gives no finite numbers.
        MismatchError: A prompt holds a token that the model has no embedding for.
    """
    positions = positions_of_model(decoder.model)
    require_positions(map(len, prompts), positions)
    _require_tokens(prompts)
    _require_embeddings(decoder, prompts)
    if max_rows is None:
        longest = max(map(len, prompts), default=0) + settings.max_new_tokens
        max_rows = _most_rows(decoder.model, min(longest, positions or longest))
    most_tokens = pass_sizes(decoder.model.device).prompt_tokens
    batch = _Batch(decoder, prompts, settings, seeds, max_rows)
    waiting = deque(Row(index=index) for index in range(len(prompts)))
    while (waiting or batch.running) and not stop.requested():
        new = _next_rows(waiting, prompts, batch.free, most_tokens)
        drawn = None
        try:
            drawn = batch.step(new)
        except Exception as error:
            if not (is_out_of_memory(error) and batch.capacity > 1):
                raise
        if drawn is None:  # out here nothing holds the tensors of the failed pass any more
            waiting.extendleft(reversed(batch.begin_again_smaller(new)))
            continue
        for row, token, logprob in drawn:
            # The last token of an answer is not read.
            left = positions - len(prompts[row.index]) + 1 if positions else settings.max_new_tokens
            row.take(token, logprob, stop_ids, min(settings.max_new_tokens, left))
            yield row
        batch.drop_ended()
    for row in [*batch.running, *waiting]:
        row.token, row.finish = None, "stopped"
        yield row


def require_positions(
    lengths: Iterable[int], positions: int, *, what: str = "a prompt", hint: str = _SHORTEN
) -> None:
    """Compare prompts of so many tokens with the ``positions`` of a model, 0 where it has no limit.

    Raises:
        DataError: One is longer; ``what`` it is called, ``hint`` says what to do.
    """
    if positions and (longest := max(lengths, default=0)) > positions:
        raise DataError(
            f"{what} has {longest:,} tokens, and the model was made for {positions:,} positions", hint=hint
        )


def _require_tokens(prompts: Sequence[Sequence[int]]) -> None:
    if not all(prompts):
        raise DataError(
            "a prompt has no tokens: there is nothing to continue",
            hint="the chat template writes nothing in front of the answer; use the one that the model was trained with",
        )


def _require_embeddings(decoder: Decoder, prompts: Sequence[Sequence[int]]) -> None:
    kind = type(decoder.model).__name__
    rows = len(cast("torch.nn.Embedding", decoder.model.get_input_embeddings()).weight)
    for prompt in prompts:
        if max(prompt, default=0) >= rows:
            raise MismatchError(
                f"a prompt holds token {max(prompt):,}, and the embeddings of {kind} have {rows:,} rows",
                hint="use the model's own tokenizer",
            )


class _Batch:
    """The rows that are decoded together, each with its sampler.

    Only its own methods run without gradients: what iterates over ``decode`` must not.
    """

    def __init__(
        self,
        decoder: Decoder,
        prompts: Sequence[Sequence[int]],
        settings: SamplingSettings,
        seeds: Sequence[Sequence[int]] | None,
        max_rows: int,
    ) -> None:
        self.model, self.device = decoder.model, decoder.model.device
        self.prompts = prompts
        self.settings = settings
        self.seeds = seeds
        self.running: list[Row] = []
        self.samplers: list[RowSampler] = []
        self.known: dict[int, RowSampler] = {}  # of rows that begin again
        self.without_gradients = torch.no_grad if decoder.goes_on_training else torch.inference_mode
        self._make_rows = decoder.make_rows
        self.rows = self._rows(max(1, min(max_rows, len(prompts))))
        self.last = self._none_drawn()

    def _rows(self, count: int) -> Rows:
        with self.without_gradients():
            return self._make_rows(count, _shared_prefix(self.prompts))

    def _none_drawn(self) -> torch.Tensor:
        """Return the last tokens of no rows. They stay on the device: each sent there would be waited for."""
        return torch.empty(0, dtype=torch.int64, device=self.device)

    @property
    def capacity(self) -> int:
        """How many rows may run together."""
        return self.rows.capacity

    @property
    def free(self) -> int:
        """How many rows may join."""
        return self.capacity - len(self.running)

    def begin_again_smaller(self, new: Sequence[Row]) -> list[Row]:
        """Let go of all rows, ``new`` ones too, and return them; half as many may join, and each draws on where it was."""
        rows = {
            row.index: row for row in (*self.running, *new)
        }  # of the new ones some may be running already
        self.known |= {row.index: sampler for row, sampler in zip(self.running, self.samplers, strict=False)}
        count, self.running, self.samplers = self.capacity // 2, [], []
        del self.rows
        release_memory(self.device)
        self.rows, self.last = self._rows(count), self._none_drawn()
        return list(rows.values())

    def step(self, new: Sequence[Row]) -> list[tuple[Row, int, float]]:
        """Return the next token of every row with its log-probability, after ``new`` ones have joined."""
        with self.without_gradients():
            logits = self.rows.advance(self.last, [[*self.prompts[row.index], *row.ids] for row in new])
            self.running += new
            self.samplers += [self._sampler(row.index, logits) for row in new]
            self.last = sample(logits, self.samplers)
            tokens, logprobs = read(self.last, logprobs_of(logits, self.last))
        if not all(map(math.isfinite, logprobs)):
            raise not_finite(self.model)
        return list(zip(self.running, tokens, logprobs, strict=True))

    def drop_ended(self) -> None:
        """Let go of the rows that have ended; the last row takes the place of each."""
        for place in reversed(range(len(self.running))):
            if self.running[place].finish:
                with self.without_gradients():
                    self.rows.remove(place)
                    self.last[place] = self.last[-1]
                    self.last = self.last[:-1]
                self.running[place], self.samplers[place] = self.running[-1], self.samplers[-1]
                self.running.pop()
                self.samplers.pop()

    def _sampler(self, index: int, logits: torch.Tensor) -> RowSampler:
        if index in self.known:
            return self.known.pop(index)
        own = (index,) if self.seeds is None else self.seeds[index]
        return RowSampler(
            self.settings,
            seed=(self.settings.seed, *own),
            prompt=self.prompts[index],
            vocab_size=logits.shape[-1],
            device=logits.device,
        )


def _shared_prefix(prompts: Sequence[Sequence[int]]) -> Sequence[int]:
    """Return what every prompt begins with, of each at least the last token left out; nothing where it is short."""
    if len(prompts) < 2:
        return ()
    first, *others = (prompt[:-1] for prompt in prompts)
    shared = sum(
        1 for _ in takewhile(lambda tokens: len(set(tokens)) == 1, zip(first, *others, strict=False))
    )
    return first[:shared] if shared >= _MIN_PREFIX else ()


def _most_rows(model: "PreTrainedModel", longest: int) -> int:
    """Return how many rows of up to ``longest`` tokens are decoded together: on CUDA fewer where half of what is free is less."""
    most, row = pass_sizes(model.device).decode_rows, longest * _cached_bytes(model)
    if model.device.type != "cuda" or not row:
        return most
    row += 4 * _COPIES * (config_value(model, "vocab_size") or 0)
    free = reachable_memory_bytes(model.device) - memory_bytes(model.device)
    return min(most, max(_FEWEST_ROWS, free // (2 * row)))


def _cached_bytes(model: "PreTrainedModel") -> int:
    """Return what keys and values of a token take; 0 where the configuration does not say."""
    names = ("num_hidden_layers", "hidden_size", "num_attention_heads")
    layers, width, heads = (config_value(model, name) or 0 for name in names)
    kept = config_value(model, "num_key_value_heads") or heads
    size = config_value(model, "head_dim") or (width // heads if heads else 0)
    return int(2 * layers * kept * size * model.dtype.itemsize)


def _next_rows(
    waiting: deque[Row], prompts: Sequence[Sequence[int]], places: int, most_tokens: int
) -> list[Row]:
    """Take the next rows to read the prompts of together, ``most_tokens`` of them in at most ``places``.

    At least one is taken where there is a place.
    """
    new: list[Row] = []
    size = 0
    while waiting and len(new) < places and (not new or size + len(prompts[waiting[0].index]) <= most_tokens):
        size += len(prompts[waiting[0].index])
        new.append(waiting.popleft())
    return new
