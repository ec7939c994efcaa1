"""Answers behind other prompts: the answers stay, no prompt is the row's own, and nothing becomes longer."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from sftcli.data.example import Example
from sftcli.data.reading.record import Origin
from sftcli.services.evaluate.ledger.exchange import ExchangedRows, choose_donors

ids = st.lists(st.integers(0, 3), max_size=4)
rows = st.lists(st.tuples(ids, st.lists(st.integers(4, 9), min_size=1, max_size=4)), min_size=1, max_size=12)


class Table(list[Example]):
    @property
    def num_tokens(self) -> list[int]:
        return [len(example.input_ids) for example in self]


def table_of(pairs, kind="conversation") -> Table:
    return Table(
        Example(
            input_ids=np.array([*prompt, *answer], dtype=np.int32),
            loss_mask=np.array([False] * len(prompt) + [True] * len(answer)),
            origin=Origin(path="rows.jsonl", line=line),
            kind=kind,
        )
        for line, (prompt, answer) in enumerate(pairs, 1)
    )


@given(rows)
def test_answers_stay_and_no_row_becomes_longer(pairs):
    table = table_of(pairs)
    exchanged = ExchangedRows(table)
    assert len(exchanged) == len(table)
    for row, example in enumerate(table):
        found = exchanged[row]
        assert found.input_ids[found.loss_mask].tolist() == example.input_ids[example.loss_mask].tolist()
        assert len(found.input_ids) == exchanged.num_tokens[row] <= table.num_tokens[row]
        assert found.origin == example.origin


@given(st.lists(st.binary(max_size=3), min_size=1, max_size=12))
def test_every_row_gets_another_prompt_where_there_is_one_and_a_shorter_one_where_there_is_one(prompts):
    for row, donor in enumerate(choose_donors(prompts)):
        others = [prompt for prompt in prompts if prompt != prompts[row]]
        assert (prompts[donor] != prompts[row]) == bool(others)
        if any(len(prompt) < len(prompts[row]) for prompt in others):
            assert len(prompts[donor]) <= len(prompts[row])


def test_running_text_stays_as_it_is():
    table = table_of([([], [1, 2, 3]), ([], [4, 5])], kind="text")
    exchanged = ExchangedRows(table)
    assert [exchanged[row].input_ids.tolist() for row in range(2)] == [[1, 2, 3], [4, 5]]
