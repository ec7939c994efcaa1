"""Laws of chosen weights: what trains, trains as in a loop of transformers with the rest frozen; the rest stays bit for bit."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from sftcli.errors import MismatchError, UsageError
from sftcli.events import Session
from sftcli.services.train.plan import plan_training
from sftcli.services.train.resume import ResumeRequest, resume_training
from sftcli.training.checkpoint.format import read_snapshot
from tests.support.by_hand import STEPS, build_place, by_hand, losses_of, plain_run, plain_settings
from tests.support.recording import RecordingSink
from tests.support.runs import StopAtStep, tensors_of, train

CHOICES = {
    "upper": (['training.train=["layers.1-", "model.norm"]'], lambda name: "layers.1." in name or name == "model.norm.weight"),
    "body": (['training.freeze=["embed_tokens", "lm_head"]'], lambda name: "embed" not in name and "head" not in name),
    "both": (
        ['training.train=["mlp", "embed_tokens"]', 'training.freeze=["layers.0"]', "training.packing=on"],
        lambda name: "layers.1.mlp" in name or "embed" in name,
    ),
    "checkpointing": (['training.train=["*.self_attn.*"]', "training.gradient_checkpointing=true"], lambda name: "self_attn" in name),
}  # fmt: skip


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SFT_CACHE_DIR", str(tmp_path / "cache"))
    return build_place(tmp_path, tie=False)


@pytest.mark.parametrize("choice", CHOICES)
def test_chosen_weights_train_as_in_a_plain_loop_and_no_others(place, choice):
    changes, is_chosen = CHOICES[choice]
    folder = plain_run(place, *changes)
    model = AutoModelForCausalLM.from_pretrained(place / "model", dtype=torch.float32)
    for name, weight in model.named_parameters():
        weight.requires_grad_(is_chosen(name))
    expected = by_hand(model, AutoTokenizer.from_pretrained(place / "model"))
    assert losses_of(folder) == pytest.approx(expected, abs=1e-4)
    assert expected[-1] < expected[0]
    source, final = (load_file(path / "model.safetensors") for path in (place / "model", folder / "final"))
    changed = {name for name in final if not torch.equal(final[name], source[name])}
    assert changed == {name for name in final if is_chosen(name)} != set()
    optimizer = read_snapshot(folder / "checkpoints" / f"step-{STEPS:08d}").optimizer
    assert {name.partition("/")[2] for name in optimizer} == changed


def test_rounded_weights_that_do_not_train_are_written_as_they_were(place):
    folder = plain_run(place, 'training.train=["layers.0"]', "training.precision=bf16")
    source, final = (load_file(path / "model.safetensors") for path in (place / "model", folder / "final"))
    assert {name.split(".")[2] for name in final if not torch.equal(final[name], source[name])} == {"0"}


def test_stopped_and_resumed_run_ends_with_the_same_bytes_and_with_no_other_choice(place):
    choice = 'training.freeze=["layers.0", "lm_head"]'
    whole = plain_run(place, choice, "run.name=whole")
    flag = StopAtStep(2)
    train(plain_settings(place, choice, "run.name=cut"), flag)
    with pytest.raises(MismatchError, match=r"training\.freeze was"):
        train(plain_settings(place, "run.name=cut"), StopAtStep(STEPS + 1), auto=True)
    request = ResumeRequest(run="cut", root=place / "runs")
    resume_training(request, Session(flag, StopAtStep(STEPS + 1)))
    assert tensors_of(place / "runs" / "cut", STEPS) == tensors_of(whole, STEPS)


def test_choice_is_told_and_counted_in_a_plan(place):
    plans = []
    for changes in ((), ('training.train=["layers.1"]',)):
        sink = RecordingSink()
        plans.append(
            plan_training(plain_settings(place, *changes).settings, Session(sink, StopAtStep(STEPS)))
        )
    whole, part = plans
    assert part.trainable < whole.trainable == whole.parameters == part.parameters
    assert part.optimizer_bytes / whole.optimizer_bytes == pytest.approx(
        part.trainable / whole.trainable, rel=0.02
    )
    assert part.gradients_bytes == 4 * part.trainable
    share = 100 * part.trainable / part.parameters
    assert f"trains 9 of 21 tensors, {share:.3g} % of the weights" in [
        getattr(event, "text", "") for event in sink.events
    ]


def test_choice_beside_an_adapter_is_refused(place):
    with pytest.raises(
        UsageError, match=r"training\.freeze chooses weights of the whole model, and an adapter is trained"
    ):
        plain_run(place, "adapter.kind=lora", 'training.freeze=["mlp"]')
