"""How the answer of a server differs from our greedy one, and by how much its numbers do."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import TYPE_CHECKING

import torch

from sftcli.modeling.decoding.decode import Row
from sftcli.modeling.tokenizer.chat_tokenizer import HFChatTokenizer
from sftcli.services.server.dialects import ServerAnswer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# All are choices. Nats by which our model prefers its own token, up to which rounding may turn a choice around: of a server that
# computes precisely, at most, and as a multiple of how far its log-probabilities are off, which is 7 of vLLM in bfloat16. Numbers that
# are further off than those of 16 bits, an adapter beside them included, are no rounding of the same model: a forgotten adapter is near too.
TIE = 0.05
MOST_TIE = 0.2
TIE_OF_OFF = 8
OFF_OF_16_BITS = 0.06
# Nats a token, on average, by which log-probabilities may differ.
OFF = 0.1

RUNS_ON = "the server does not stop where the answer ends"
ENDS_EARLY = "the server ends answers early"
CUT = "the server cuts answers: the context or the number of tokens that it was started with is too small"
WORDS_OTHER = (
    "the server answers the same prompt in other words: its weights are rounded too coarsely, or are others"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """One answer beside ours. ``what`` is "" where it is the same; ``gap`` is by how many nats our model prefers its own words."""

    what: str = ""
    detail: str = ""
    gap: float = math.inf
    off: tuple[float, ...] = field(
        default=(), repr=False
    )  # log-probability of each common token: theirs less ours


def tie_of(off: Sequence[float]) -> float:
    """Return the nats up to which rounding may turn a choice around, by how far log-probabilities are ``off`` where they are told."""
    if not off:
        return MOST_TIE
    mean = fmean(off)
    return min(MOST_TIE, max(TIE, TIE_OF_OFF * mean)) if mean <= OFF_OF_16_BITS else TIE


class AnswerComparer:
    """Compares answers of one model.

    Args:
        model: Is asked how likely it finds the tokens.
        tokenizer: Its tokenizer.
    """

    def __init__(self, model: "PreTrainedModel", tokenizer: HFChatTokenizer) -> None:
        self._model, self._tokenizer = model, tokenizer

    def compare(self, prompt: Sequence[int], ours: Row, theirs: ServerAnswer) -> Compared:
        """Return how ``theirs`` differs from ``ours``, the greedy answer to ``prompt``."""
        own, other = _whole(self._decode(ours.ids)), _whole(theirs.text)
        logprobs = self._logprobs(prompt, ours.ids)
        off = tuple(self._off(ours.ids, logprobs, theirs))
        if own == other:
            runs_on = ours.finish == "stop" and theirs.finish == "length"
            return Compared(what=RUNS_ON if runs_on else "", detail=self._stops() if runs_on else "", off=off)
        has_stop = any(text and text in other for text in self._stop_texts())
        if ours.finish == "stop" and other.startswith(own) and (theirs.finish == "length" or has_stop):
            return Compared(what=RUNS_ON, detail=self._stops(), off=off)
        if own.startswith(other):
            what = ENDS_EARLY if theirs.finish == "stop" else CUT
            return Compared(what=what, detail=f"after {other[-40:]!r}", off=off)
        gap = self._gap(ours, other, logprobs)
        return Compared(what=WORDS_OTHER, detail=f"{own[:60]!r} became {other[:60]!r}", gap=gap, off=off)

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special=True)

    def _stop_texts(self) -> list[str]:
        return [self._tokenizer.decode([token], skip_special=False) for token in self._tokenizer.stop_ids]

    def _stops(self) -> str:
        return f"no stop there: {' or '.join(sorted(map(repr, self._stop_texts())))}"

    @torch.inference_mode()
    def _logprobs(self, prompt: Sequence[int], answer: Sequence[int]) -> torch.Tensor:
        """Return the log-probabilities (answer + 1, vocabulary) at each token of ``answer`` and behind it."""
        ids = torch.tensor([[*prompt, *answer]], device=self._model.device)
        logits = self._model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 :]
        return torch.log_softmax(logits.float(), dim=-1).cpu()

    def _off(self, ids: Sequence[int], logprobs: torch.Tensor, theirs: ServerAnswer) -> list[float]:
        """Return how much the server's log-probabilities of the tokens that both begin with differ from ours."""
        found = []
        texts = self._tokenizer.decode_many([[token] for token in ids])
        for place, (token, text, (said, logprob)) in enumerate(
            zip(ids, texts, theirs.tokens or (), strict=False)
        ):
            if said != text and said.strip() != text.strip():
                break
            found.append(logprob - float(logprobs[place, token]))
        return found

    def _gap(self, ours: Row, other: str, logprobs: torch.Tensor) -> float:
        """Return by how many nats our model prefers its own token where the answers part."""
        place = next(
            (
                n
                for n in range(len(ours.ids))
                if not other.startswith(self._decode(ours.ids[: n + 1]).lstrip())
            ),
            len(ours.ids),
        )
        rest = other[len(self._decode(ours.ids[:place]).lstrip()) :]
        read = self._tokenizer.encode_many([rest], reading="answer", continued=True)[0]
        token = read[0] if read else min(self._tokenizer.stop_ids)
        return float(logprobs[place].max() - logprobs[place, token])


def _whole(text: str) -> str:
    """Return ``text`` without what its end leaves of a character of several tokens: servers do not send it."""
    return text.rstrip("\ufffd").strip()
