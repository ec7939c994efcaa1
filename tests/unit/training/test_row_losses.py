"""Held-out losses by row: heard in the pass that makes their sum, equal to those of the model's own logits."""

from functools import partial

import numpy as np
import pytest

from sftcli.config.schema.training import TrainingSettings
from sftcli.data.batches.batch import batches_in_order_of_length
from sftcli.events import HeldoutDone, NeverStop
from sftcli.training.loss import heldout_nll, plain_nll_sum, response_nll_sum
from sftcli.training.row_scores import score_rows
from tests.support.recording import RecordingSink
from tests.support.training import PAD_ID, build_trainer, random_examples, tiny_llama


class NoStore:
    def save(self, snapshot, /):
        return ""


@pytest.mark.parametrize("loss", [response_nll_sum, plain_nll_sum])
def test_rows_add_up_to_the_sum_and_are_those_of_the_plain_logits(loss):
    model, examples = tiny_llama(), random_examples(30)
    model.eval()

    def batches():
        return batches_in_order_of_length(examples, rows=range(30), max_batch_tokens=100, pad_id=PAD_ID)

    scored = heldout_nll(partial(loss, model), batches(), stop=NeverStop(), num_rows=30)
    plain = score_rows(model, batches(), stop=NeverStop())
    assert sum(scored.row_nll) == pytest.approx(scored.nll, rel=1e-5)
    np.testing.assert_allclose(scored.row_nll, [plain[row].nll for row in range(30)], rtol=1e-4)
    assert list(scored.row_tokens) == [plain[row].tokens for row in range(30)]


def test_a_training_measures_the_error_of_its_fall_as_the_rows_scatter():
    model, held, sink = tiny_llama(), random_examples(30, seed=1), RecordingSink()

    def by_row():
        model.eval()
        batches = batches_in_order_of_length(held, rows=range(30), max_batch_tokens=100, pad_id=PAD_ID)
        scores = score_rows(model, batches, stop=NeverStop())
        return np.array([scores[row].nll for row in range(30)])

    before = by_row()
    settings = TrainingSettings(
        max_steps=6, warmup_steps=0, learning_rate=1e-2, batch_size=4, micro_batch_size=4
    )
    build_trainer(
        settings=settings, store=NoStore(), emit=sink, model=model, examples=random_examples(20), heldout=held
    ).fit(NeverStop())
    falls, tokens = before - by_row(), np.array([example.loss_mask.sum() for example in held])
    # The delete-one jackknife, which knows nothing of linearization.
    left_out = [(falls.sum() - falls[i]) / (tokens.sum() - tokens[i]) for i in range(30)]
    jackknife = np.sqrt(29 / 30 * ((left_out - np.mean(left_out)) ** 2).sum())
    first, last = sink.of(HeldoutDone)
    assert first.fall_error is None
    assert last.fall_error == pytest.approx(jackknife, rel=0.1)


def test_few_rows_have_no_error():
    sink = RecordingSink()
    settings = TrainingSettings(
        max_steps=2, warmup_steps=0, learning_rate=1e-2, batch_size=4, micro_batch_size=4
    )
    build_trainer(settings=settings, store=NoStore(), emit=sink, heldout=random_examples(5)).fit(NeverStop())
    assert [event.fall_error for event in sink.of(HeldoutDone)] == [None, None]
