"""What is trained beside the plain loss, and how experts are used, stand where people and programs look."""

import json
from pathlib import Path

import pytest

from tests.cli.conftest import short_training, write_sums
from tests.support.runs import events_of
from tests.support.tiny_experts import build_experts
from tests.support.tiny_tokenizer import build_tiny_tokenizer

AUX = ("--set", "training.router_aux_loss=0.02")


@pytest.fixture
def mixtral(tmp_path: Path) -> Path:
    build_experts("mixtral").save_pretrained(tmp_path / "mixtral")
    return build_tiny_tokenizer(tmp_path / "mixtral")


def test_experts_and_their_balance_are_in_events_logs_pages_and_views(sft, tmp_path, mixtral):
    rows = write_sums(tmp_path / "rows.jsonl")
    code, _, err = sft("train", "--data", rows, "--run", "first", *short_training(mixtral, tmp_path), *AUX)
    assert code == 0, err
    steps, heldout = (events_of(tmp_path / "runs" / "first", kind) for kind in ("StepDone", "HeldoutDone"))
    assert all(1.9 < step["router_aux_loss"] < 4.0 for step in steps)  # 2 of 4 experts: 2 where all are alike
    assert steps[0]["objective"] == pytest.approx(steps[0]["loss"] + 0.02 * steps[0]["router_aux_loss"])
    for measured in heldout:
        assert list(measured["experts"]) == ["0", "1"]
        for load in measured["experts"].values():
            assert 0.25 <= load["busiest"] <= 0.5
            assert load.keys() == {"busiest", "unused", "entropy"}
    assert "router aux" in err
    assert "experts: busiest" in err
    log = (tmp_path / "runs" / "first" / "training.log").read_text(encoding="utf-8")
    assert "router_aux_loss=" in log
    assert "busiest_expert=" in log
    page = (tmp_path / "runs" / "first" / "report.html").read_text(encoding="utf-8")
    assert "load-balancing loss" in page
    assert "experts of layer 1" in page
    code, out, _ = sft("show", "first", "--runs", tmp_path / "runs")
    assert "busiest" in out
    code, out, _ = sft("show", "first", "--runs", tmp_path / "runs", "--json")
    shown = json.loads(out)
    assert shown["experts"]["busiest"] == max(load["busiest"] for load in heldout[-1]["experts"].values())
    assert shown["router_aux_loss"] == steps[-1]["router_aux_loss"]


def test_balance_is_not_in_the_heldout_loss(sft, tmp_path, mixtral):
    rows, found = write_sums(tmp_path / "rows.jsonl"), {}
    for name, more in (("with", AUX), ("without", ())):
        assert sft("train", "--data", rows, "--run", name, *short_training(mixtral, tmp_path), *more)[0] == 0
        found[name] = [event["loss"] for event in events_of(tmp_path / "runs" / name, "HeldoutDone")]
    assert found["with"][0] == found["without"][0]
    assert found["with"][-1] != found["without"][-1]
    assert all(
        event["router_aux_loss"] is None for event in events_of(tmp_path / "runs" / "without", "StepDone")
    )


def test_losses_of_dynamic_fine_tuning_are_those_that_other_runs_show(sft, tmp_path, tiny_model):
    rows, found = write_sums(tmp_path / "rows.jsonl"), {}
    for loss in ("nll", "dft"):
        sets = ("--set", f"training.loss={loss}")
        assert (
            sft("train", "--data", rows, "--run", loss, *short_training(tiny_model, tmp_path), *sets)[0] == 0
        )
        found[loss] = [events_of(tmp_path / "runs" / loss, kind) for kind in ("StepDone", "HeldoutDone")]
    (plain, plain_heldout), (steps, heldout) = found["nll"], found["dft"]
    assert steps[0]["loss"] == pytest.approx(plain[0]["loss"], rel=1e-6)  # of the same weights
    assert heldout[0]["loss"] == plain_heldout[0]["loss"]
    assert steps[-1]["loss"] != pytest.approx(plain[-1]["loss"], rel=1e-4)
    assert all(0 < step["objective"] < step["loss"] for step in steps)
    assert all(step["objective"] is None for step in plain)
    assert all(event["experts"] == {} for event in heldout)
