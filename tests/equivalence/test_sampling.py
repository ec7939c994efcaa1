"""Decoding gives what transformers gives, and a row does not feel its neighbors."""

from dataclasses import replace

import pytest
import torch

from sftcli.config.schema.run import SamplingSettings
from sftcli.errors import DataError
from sftcli.events import NeverStop
from sftcli.modeling.decoding.decode import decode
from sftcli.modeling.decoding.decoder import choose_decoder
from tests.support.decoding import answers
from tests.support.memory import FAULTS
from tests.support.recording import StopAfter
from tests.support.training import tiny_llama

PROMPTS = [[5, 9, 33], [7], [100, 200, 300, 301, 302], [11, 12]]


def run(prompts, *, stop_ids=frozenset({2}), **settings):
    decoder = choose_decoder(tiny_llama().eval())
    return answers(decoder, prompts, stop_ids=stop_ids, **({"max_new_tokens": 12} | settings))


def decode_one(**settings):
    """Yield the row of the first prompt at each of its tokens."""
    yield from decode(
        choose_decoder(tiny_llama().eval()), PROMPTS[:1], settings=SamplingSettings(max_new_tokens=12),
        stop_ids=frozenset(), stop=NeverStop(), **settings,
    )  # fmt: skip


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


class TightRows:
    """Rows of which memory holds fewer and fewer, as the passes go on."""

    def __init__(self, rows, passes) -> None:
        self.rows, self.passes = rows, passes
        self.capacity = rows.capacity
        self.remove = rows.remove

    def advance(self, tokens, prompts):
        self.passes.append(len(tokens) + len(prompts))
        fits = 4 if len(self.passes) < 5 else 2 if len(self.passes) < 9 else 1
        if self.passes[-1] > fits:
            self.passes[-1] = 0
            raise FAULTS["runtime"]
        return self.rows.advance(tokens, prompts)


@pytest.mark.parametrize(
    "settings",
    [{}, {"temperature": 1.0, "seed": 3}, {"temperature": 1.0, "repetition_penalty": 1.3, "seed": 4}],
)
def test_rows_that_do_not_fit_go_on_with_half_as_many_and_end_as_they_would(settings):
    decoder, passes = choose_decoder(tiny_llama().eval()), []
    tight = replace(decoder, make_rows=lambda *asked: TightRows(decoder.make_rows(*asked), passes))
    given = {"max_new_tokens": 12, "stop_ids": frozenset({2})} | settings
    assert answers(tight, PROMPTS, **given) == run(PROMPTS, **settings)
    assert [max(passes[:4]), max(passes[4:8]), max(passes[8:])] == [4, 2, 1]


def test_one_row_that_does_not_fit_is_out_of_memory():
    decoder = choose_decoder(tiny_llama().eval())
    full = replace(decoder, make_rows=lambda *asked: Full(decoder.make_rows(*asked)))
    with pytest.raises(torch.AcceleratorError):
        answers(full, PROMPTS, max_new_tokens=4)


class Full(TightRows):
    """Rows for which there is no memory at all."""

    def __init__(self, rows) -> None:
        super().__init__(rows, [])

    def advance(self, tokens, prompts):
        raise FAULTS["runtime"]


def test_top_k_of_one_is_greedy():
    assert run(PROMPTS, temperature=1.0, top_k=1) == run(PROMPTS)


def test_stop_token_ends_an_answer_and_is_not_part_of_it():
    (free,) = run([PROMPTS[0]], stop_ids=frozenset())
    assert free.finish == "length"
    end = free.ids[4]
    (stopped,) = run([PROMPTS[0]], stop_ids=frozenset({end}))
    assert stopped.finish == "stop"
    assert stopped.ids == free.ids[: free.ids.index(end)]


def test_tokens_are_handed_on_as_they_come():
    (answer,) = run([PROMPTS[0]], stop_ids=frozenset())
    for count, row in enumerate(decode_one(), 1):
        assert (row.index, row.token, row.ids) == (0, answer.ids[count - 1], answer.ids[:count])
        assert row.finish == ("length" if count == 12 else "")


def test_decoding_ends_early_when_told_to():
    (answer,) = run([PROMPTS[0]], stop_ids=frozenset(), stop=StopAfter(2))
    assert (len(answer.ids), answer.finish) == (2, "stopped")


def test_prompts_that_were_not_begun_when_decoding_ends_have_empty_answers():
    begun, waiting = run(PROMPTS[:2], stop_ids=frozenset(), stop=StopAfter(2), max_rows=1)
    assert (len(begun.ids), begun.finish) == (2, "stopped")
    assert (waiting.ids, waiting.finish, waiting.token) == ([], "stopped", None)


def test_who_iterates_is_not_in_inference_mode():
    for _ in decode_one():
        assert not torch.is_inference_mode_enabled()


@pytest.mark.parametrize("max_rows", [1, 2, 3, 16])
def test_answers_do_not_depend_on_how_many_rows_run_together(max_rows: int):
    prompts = [*PROMPTS, [7, 8, 9], [400], [5, 9, 33, 34]]
    stop_ids = frozenset(range(100, 110))  # answers of many lengths, so that rows leave and others enter
    alone, together = (
        run(prompts, max_new_tokens=200, temperature=1.0, stop_ids=stop_ids, max_rows=rows)
        for rows in (1, max_rows)
    )
    assert alone == together
    assert len({len(answer.ids) for answer in alone}) > 3


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
    for row in decode_one():
        if len(row.ids) == 3:
            row.end()
    assert (len(row.ids), row.finish) == (3, "stop")


@pytest.mark.parametrize(
    "settings", [{}, {"temperature": 0.7, "top_k": 5, "seed": 1}, {"repetition_penalty": 1.3}]
)
def test_log_probability_of_an_answer_is_that_of_the_model_on_the_whole_text(settings):
    """Also where penalties, filters and temperature chose the tokens; the stop token counts."""
    rows = run(PROMPTS, **settings)
    model = tiny_llama().eval()
    for prompt, row in zip(PROMPTS, rows, strict=True):
        answer = [*row.ids, *([2] if row.finish == "stop" else [])]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1)[range(len(answer)), answer]
        assert row.drawn == len(answer)
        assert row.logprob == pytest.approx(float(expected.sum()), abs=1e-4)
        assert row.confidence == pytest.approx(float(expected.mean().exp()), abs=1e-5)


def test_log_probability_equals_transformers_scores():
    prompt = PROMPTS[0]
    model = tiny_llama().eval()
    theirs = model.generate(
        torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=12, do_sample=False,
        eos_token_id=2, pad_token_id=2, output_scores=True, return_dict_in_generate=True,
    )  # fmt: skip
    scores = model.compute_transition_scores(theirs.sequences, theirs.scores, normalize_logits=True)
    (ours,) = run([prompt])
    assert ours.logprob == pytest.approx(float(scores.sum()), abs=1e-4)


def test_a_prompt_without_tokens_is_refused():
    with pytest.raises(DataError, match="a prompt has no tokens"):
        run([[5, 6], []], max_new_tokens=1)
