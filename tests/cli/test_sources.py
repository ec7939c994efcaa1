"""Several sources at once: samples, shares, repetitions, and a held-out split that repetition does not break."""

import json
from collections import Counter
from pathlib import Path

from sftcli.data.prepared.store import PreparedDataset, open_prepared
from tests.cli.test_data_faults import write_rows


def opened(out: str) -> PreparedDataset:
    return open_prepared(Path(json.loads(out)["folder"]))


def origins(examples) -> Counter[str]:
    return Counter(str(examples[index].origin) for index in range(len(examples)))


def test_repeated_rows_stay_on_their_side_of_the_split(sft, tiny_model):
    write_rows("a.jsonl", range(60))
    write_rows("b.jsonl", range(30, 90), answer="no")  # shares half of its prompts
    flags = ("--set", "data.heldout_fraction=0.2", "--model", tiny_model, "--json")
    code, out, _ = sft("prepare", "a.jsonl:x3", "b.jsonl:50%x2", *flags)
    data = opened(out)
    train, held = origins(data.train), origins(data.heldout)
    assert code == 0
    assert {train[name] for name in train if name.startswith("a.")} == {3}
    assert {train[name] for name in train if name.startswith("b.")} == {2}
    assert set(held.values()) == {1}
    assert len(train) + len(held) == 90
    prompts = [{row.input_ids.tobytes()[:120] for row in map(side.__getitem__, range(len(side)))}
               for side in (data.train, data.heldout)]  # fmt: skip
    assert not prompts[0] & prompts[1]
    assert "a.jsonl: an epoch has each row 3 times" in json.loads(out)["audit"]["train"]["notes"]


def test_repetition_changes_which_rows_are_held_out_no_more_than_the_order_does(sft, tiny_model):
    write_rows("a.jsonl", range(60))
    plain = opened(sft("prepare", "a.jsonl", "--model", tiny_model, "--json")[1])
    repeated = opened(sft("prepare", "a.jsonl:x5", "--model", tiny_model, "--json")[1])
    assert origins(plain.heldout) == origins(repeated.heldout)
    assert len(repeated.train) == 5 * len(plain.train)


def test_first_examples_are_different_rows_although_rows_are_repeated(sft, tiny_model):
    write_rows("a.jsonl", range(40))
    data = opened(sft("prepare", "a.jsonl:x3", "--model", tiny_model, "--json")[1])
    assert len({str(data.train[index].origin) for index in range(30)}) == 30


def test_held_out_rows_cannot_be_repeated(sft, rows, tiny_model):
    code, _, err = sft(
        "prepare", rows, "--heldout", f"{write_rows('b.jsonl', range(3))}:x2", "--model", tiny_model
    )
    assert code == 2
    assert "leave out x2" in err
