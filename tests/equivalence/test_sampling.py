"""Decoding gives what transformers gives, and a row does not feel its neighbours."""

import pytest
import torch

from sftcli.config.schema.run import SamplingSettings
from sftcli.events import NeverStop
from sftcli.modeling.decoding.decode import decode
from tests.support.recording import StopAfter
from tests.support.training import tiny_llama

PROMPTS = [[5, 9, 33], [7], [100, 200, 300, 301, 302], [11, 12]]


def run(prompts, *, stop_ids=frozenset({2}), stop=None, on_token=None, **settings):
    chosen = SamplingSettings(**({"max_new_tokens": 12} | settings))
    return decode(
        tiny_llama().eval(),
        prompts,
        settings=chosen,
        stop_ids=stop_ids,
        stop=stop or NeverStop(),
        on_token=on_token,
    )


@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_answer_equals_transformers_own(prompt: list[int]):
    theirs = tiny_llama().eval().generate(
        torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=12, do_sample=False,
        eos_token_id=2, pad_token_id=2,
    )  # fmt: skip
    (ours,) = run([prompt])
    assert list(ours.ids) == [token for token in theirs[0, len(prompt) :].tolist() if token != 2]


@pytest.mark.parametrize(
    "settings", [{}, {"temperature": 1.0, "seed": 3}, {"temperature": 0.8, "top_p": 0.7, "top_k": 40}]
)
def test_an_answer_does_not_depend_on_the_other_rows_of_its_batch(settings):
    together = run(PROMPTS, **settings)
    (alone,) = run(PROMPTS[:1], **settings)
    assert together[0] == alone


def test_one_seed_gives_one_answer_and_another_seed_another():
    first, again, other = (run(PROMPTS, temperature=1.0, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_top_k_of_one_is_greedy():
    assert run(PROMPTS, temperature=1.0, top_k=1) == run(PROMPTS)


def test_stop_token_ends_an_answer_and_is_not_part_of_it():
    (free,) = run([PROMPTS[0]], stop_ids=frozenset())
    assert not free.stopped
    end = free.ids[4]
    (stopped,) = run([PROMPTS[0]], stop_ids=frozenset({end}))
    assert stopped.stopped
    assert stopped.ids == free.ids[: free.ids.index(end)]


def test_tokens_are_handed_on_as_they_come():
    heard = []
    (answer,) = run([PROMPTS[0]], on_token=lambda row, token: heard.append((row, token)))
    assert heard == [(0, token) for token in answer.ids]


def test_decoding_ends_early_when_told_to():
    (answer,) = run([PROMPTS[0]], stop_ids=frozenset(), stop=StopAfter(2))
    assert 0 < len(answer.ids) < 12


@pytest.mark.parametrize("max_rows", [1, 2, 3, 16])
def test_answers_do_not_depend_on_how_many_rows_run_together(max_rows: int):
    prompts = [*PROMPTS, [7, 8, 9], [400], [5, 9, 33, 34]]
    stop_ids = frozenset(range(100, 110))  # answers of many lengths, so that rows leave and others enter
    model = tiny_llama().eval()
    answers = [
        decode(model, prompts, settings=SamplingSettings(max_new_tokens=200, temperature=1.0), stop_ids=stop_ids,
               stop=NeverStop(), max_rows=rows)
        for rows in (1, max_rows)
    ]  # fmt: skip
    assert answers[0] == answers[1]
    assert len({len(answer.ids) for answer in answers[0]}) > 3


def test_min_p_of_one_is_greedy():
    assert run(PROMPTS, temperature=1.0, min_p=1.0) == run(PROMPTS)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_repetition_penalty_equals_transformers_own(prompt: list[int]):
    theirs = tiny_llama().eval().generate(
        torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=12, do_sample=False,
        eos_token_id=2, pad_token_id=2, repetition_penalty=1.5,
    )  # fmt: skip
    (ours,) = run([prompt], repetition_penalty=1.5)
    assert list(ours.ids) == [token for token in theirs[0, len(prompt) :].tolist() if token != 2]


def test_a_caller_can_end_an_answer():
    (answer,) = decode(
        tiny_llama().eval(), [PROMPTS[0]], settings=SamplingSettings(max_new_tokens=12), stop_ids=frozenset(),
        stop=NeverStop(), is_over=lambda _row, ids: len(ids) == 3,
    )  # fmt: skip
    assert (len(answer.ids), answer.stopped) == (3, True)
