"""Answers beside those of transformers: the stage ``decode``, and what the stage ``correct`` asks of them."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel

from benchmarks.gpu.findings import Check
from benchmarks.gpu.subjects import CPU, PAD_ID, config_of, model_of, random_prompts
from sftcli.config.schema.run import SamplingSettings
from sftcli.events import NeverStop
from sftcli.modeling.decoding.decode import decode
from sftcli.modeling.decoding.decoder import Decoder, checked_decoder, choose_decoder

Prompts = Sequence[Sequence[int]]


def check_answers(check: Check) -> None:
    """Compare answers in float32 token for token."""
    model = model_of("tiny", device=CPU).to(check.device).eval()
    prompts = random_prompts(8, vocabulary=1024, longest=40)
    expected = [_theirs(model, [prompt], 24)[0] for prompt in prompts]
    plain = _ours(checked_decoder(model), prompts, 24, most=4)
    decoder = choose_decoder(model)
    fused = _ours(decoder, prompts, 24, most=4)
    check.judge(
        "greedy answers in float32 are those of transformers",
        plain == expected and fused == expected,
        plain_equal=sum(map(list.__eq__, plain, expected)),
        fused_equal=sum(map(list.__eq__, fused, expected)),
        of=len(expected),
    )
    one, other = (_ours(decoder, prompts, 16, most=most, temperature=0.8) for most in (8, 3))
    check.judge(
        "sampled answers do not depend on the rows beside them",
        one == other,
        equal=sum(map(list.__eq__, one, other)),
        of=len(prompts),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Answering:
    """A way of answering: ``make`` of a model what ``answer`` is called with, for so ``most`` rows."""

    make: Callable[[PreTrainedModel], Any]
    answer: Callable[..., list[list[int]]]
    most: int = 256
    named: Mapping[str, Any] = field(default_factory=dict)


def time_decoding(check: Check) -> None:
    """Say tokens a second of each way of answering, for one row and for many."""
    count = 8 if check.is_small else 128
    for kind in ("tiny",) if check.is_small else ("smol", "qwen15"):
        vocabulary = config_of(kind).vocab_size
        for way, answering in ANSWERING.items():
            with check.guarded(f"{kind}, {way}"):
                model = model_of(kind, device=check.device, dtype=torch.bfloat16).eval()
                made = answering.make(model)
                for rows in (1, 4) if check.is_small else (1, 32, 256):
                    if rows <= answering.most:
                        prompts = random_prompts(rows, vocabulary=vocabulary, longest=60)
                        _time(check, f"{kind} {rows} rows, {way}", answering, made, prompts, count)


def _time(check: Check, name: str, answering: Answering, made: Any, prompts: Prompts, count: int) -> None:
    answering.answer(made, prompts, 4, **answering.named)
    check.wait()
    begin = time.perf_counter()
    answers = answering.answer(made, prompts, count, **answering.named)
    check.wait()
    seconds = time.perf_counter() - begin
    is_whole = all(len(answer) == count for answer in answers)
    check.judge(
        name, is_whole, tokens_per_s=len(prompts) * count / seconds, ms_per_step=seconds / count * 1e3
    )


def _ours(
    decoder: Decoder, prompts: Prompts, count: int, *, most: int | None = None, temperature: float = 0.0
) -> list[list[int]]:
    settings = SamplingSettings(max_new_tokens=count, temperature=temperature)
    rows = decode(
        decoder,
        prompts,
        settings=settings,
        stop_ids=frozenset(),
        stop=NeverStop(),
        max_rows=most or len(prompts),
    )
    answers = {row.index: row.ids for row in rows if row.finish}
    return [answers[index] for index in range(len(prompts))]


@torch.inference_mode()
def _theirs(model: PreTrainedModel, prompts: Prompts, count: int) -> list[list[int]]:
    width = max(map(len, prompts))
    ids = [[PAD_ID] * (width - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    made = model.generate(
        input_ids=torch.tensor(ids, device=model.device),
        attention_mask=torch.tensor(mask, device=model.device),
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
        pad_token_id=PAD_ID,
    )
    return made[:, width:].tolist()


ANSWERING: Mapping[str, Answering] = {
    "sft": Answering(make=choose_decoder, answer=_ours),
    "sft, sampled": Answering(make=choose_decoder, answer=_ours, named={"temperature": 0.8}),
    "transformers": Answering(make=lambda model: model, answer=_theirs, most=32),
}
"""What the stage ``decode`` times; another way of answering is a row here."""
