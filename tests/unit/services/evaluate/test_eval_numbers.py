"""Numbers of an evaluation against short references."""

import numpy as np
import pytest
import torch

from sftcli.data.batches.batch import batches_in_order_of_length, collate
from sftcli.data.example import Example
from sftcli.data.reading.record import Origin
from sftcli.events import NeverStop
from sftcli.figures import FEW_ROWS
from sftcli.modeling.tokenizer.chat_tokenizer import load_chat_tokenizer
from sftcli.services.evaluate.metrics import (
    Interval,
    TrainingSpans,
    chrf,
    distinct_fraction,
    has_loop,
    json_validity,
    paired_difference,
    rouge_l,
)
from sftcli.services.evaluate.scoring import question_of
from sftcli.training.loss import ratio_standard_error
from sftcli.training.row_scores import score_rows
from tests.support.tiny_tokenizer import build_tiny_tokenizer
from tests.support.training import PAD_ID, random_examples, tiny_llama


def reference(model, examples):
    """Loss and accuracy of every row, one token at a time."""
    rows = []
    for example in examples:
        ids = torch.tensor(example.input_ids.tolist())
        logits = model(input_ids=ids[None]).logits[0].double().log_softmax(-1)
        trained = [place for place in range(1, len(ids)) if example.loss_mask[place]]
        nll = -sum(float(logits[place - 1, ids[place]]) for place in trained)
        correct = sum(int(logits[place - 1].argmax()) == int(ids[place]) for place in trained)
        rows.append((nll, len(trained), correct))
    return rows


@pytest.mark.parametrize("rows", [1, 7, 32, None])
def test_scores_do_not_depend_on_batches_and_equal_a_short_reference(rows):
    model, examples = tiny_llama().eval(), random_examples(40)
    if rows is None:
        batches = batches_in_order_of_length(examples, rows=range(40), max_batch_tokens=50, pad_id=PAD_ID)
    else:
        parts = [range(begin, min(begin + rows, 40)) for begin in range(0, 40, rows)]
        batches = (collate([examples[i] for i in part], example_ids=part, pad_id=PAD_ID) for part in parts)
    found = score_rows(model, batches, stop=NeverStop())
    with torch.inference_mode():
        wanted = reference(model, examples)
    for index, (nll, tokens, correct) in enumerate(wanted):
        assert found[index].nll == pytest.approx(nll, abs=1e-4)
        assert (found[index].tokens, found[index].correct) == (tokens, correct)
    assert sum(row.nll for row in found.values()) / sum(
        row.tokens for row in found.values()
    ) == pytest.approx(sum(row[0] for row in wanted) / sum(row[1] for row in wanted), abs=1e-6)


def test_standard_error_of_equal_counts_is_that_of_a_mean():
    values = [1.0, 2.0, 4.0, 8.0] * 25
    assert ratio_standard_error(values, [1] * 100) == pytest.approx(np.std(values, ddof=1) / 10)


def test_paired_interval_of_a_constant_difference_has_no_width():
    first = np.arange(FEW_ROWS)
    found = paired_difference(first, first + 1.0, [1] * FEW_ROWS)
    assert (found.value, found.low, found.high) == pytest.approx((1.0, 1.0, 1.0))


@pytest.mark.parametrize("rows", [1, 3, FEW_ROWS - 1])
def test_few_rows_give_a_value_and_no_interval(rows):
    found = paired_difference(range(rows), [row + 1.0 for row in range(rows)], [1] * rows)
    assert found == Interval(value=1.0, low=None, high=None, rows=rows)
    assert ratio_standard_error(range(rows), [1] * rows) is None


def test_paired_interval_holds_the_difference():
    generator = np.random.default_rng(0)
    first = generator.normal(size=200)
    found = paired_difference(first, first + generator.normal(0.5, 1, size=200), [1] * 200)
    assert found.low < found.value < found.high
    assert found.low < 0.5 < found.high


def test_a_loop_is_four_equal_pieces_at_the_end():
    assert has_loop([9, 1, 2, 1, 2, 1, 2, 1, 2])
    assert not has_loop([1, 2, 1, 2, 1, 2, 1, 2, 9])
    assert not has_loop([1, 2, 1, 2, 1, 2])


def test_longest_copied_span_stands_in_one_training_row():
    spans = TrainingSpans([[1, 2, 3, 4], [5, 6, 7]])
    assert spans.longest_copied([9, 2, 3, 4, 5, 6, 9]) == 3
    assert spans.longest_copied([8]) == 0


def test_distinct_and_json_shares():
    assert distinct_fraction([[1, 2, 1, 2]], 2) == pytest.approx(2 / 3)
    assert distinct_fraction([[1], [2]], 2) is None
    assert json_validity(['{"a": 1}', "no", "[]"], ['{"a": 2}', "[1]", "text"]) == (1, 2)
    assert json_validity(["x"], ["y"]) == (0, 0)
    assert json_validity(["[" * 100_000, "[NaN]", "[1]"], ["[1]"] * 3) == (1, 3)


def test_reference_metrics_are_full_for_the_right_answer_only():
    pytest.importorskip("rouge_score")
    pytest.importorskip("sacrebleu")
    assert (rouge_l(["a b c"], ["a b c"]), chrf(["a b c"], ["a b c"])) == (100, 100)
    assert rouge_l(["a x c"], ["a b c"]) == pytest.approx(200 / 3)
    assert chrf(["zzz"], ["a b c"]) < 10


def test_an_expected_answer_keeps_the_control_tokens_that_an_answer_has_to_hold(tmp_path):
    tokenizer = load_chat_tokenizer(build_tiny_tokenizer(tmp_path, extra_special=("[TOOL_CALLS]",)))
    prompt, answer, stop = (
        tokenizer.encode_many([text], reading="template")[0]
        for text in ("hi", "[TOOL_CALLS][1]", "<|im_end|>\n")
    )
    example = Example(
        input_ids=np.array(prompt + answer + stop, dtype=np.int32),
        loss_mask=np.array([False] * len(prompt) + [True] * len(answer + stop)),
        origin=Origin(path="rows.jsonl", line=1),
    )
    question = question_of(example, tokenizer)
    assert question.expected == tokenizer.decode(answer, skip_special=False) == "[TOOL_CALLS][1]"
