"""Trainings that go on from an adapter: its shape, its base, its tokenizer and its numbers."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from sftcli.cli.app import app
from sftcli.errors import MismatchError, UsageError
from sftcli.modeling.adapter.folder import BASE_FILE, CONFIG_FILE, WEIGHTS_FILE
from tests.cli.conftest import short_training, write_sums
from tests.support.foreign_adapter import IDS, foreign_adapter, logits_by_peft
from tests.support.runs import events_of
from tests.support.tiny_model import build_tiny_model


def sft(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None:
        raise result.exception
    assert result.exit_code == 0, result.stderr
    return result.stdout


def without_model(flags: list[str]) -> list[str]:
    place = flags.index("--model")
    return [*flags[:place], *flags[place + 2 :]]


def losses(run: Path) -> list[float]:
    return [event["loss"] for event in events_of(run, "HeldoutDone")]


def notices(run: Path) -> list[str]:
    return [event["text"] for event in events_of(run, "Notice")]


@pytest.fixture(scope="module")
def trained(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of an adapter, made once."""
    place = tmp_path_factory.mktemp("first")
    rows, flags = write_sums(place / "rows.jsonl"), short_training(tiny_model, place)
    words = ("--adapter", "dora", "--rank", "4", "--set", 'adapter.target_modules=["q_proj","up_proj"]')
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SFT_CACHE_DIR", str(place / "cache"))
        sft("train", "--data", rows, "--run", "first", *words, "--template", "chatml", *flags)
    return place / "runs" / "first"


@pytest.fixture
def first(trained: Path, tmp_path: Path) -> Path:
    """A copy of it that is this test's own."""
    return Path(shutil.copytree(trained, tmp_path / "runs" / "first"))


@pytest.fixture
def more(rows: Path, flags: list[str]) -> list[str]:
    often = ["--save-every", "1", "--set", "checkpoint.keep_last=4"]
    return ["train", "--data", str(rows), "--run", "second", *often, *without_model(flags)]


@pytest.mark.parametrize("name", ["final", "path", "run"])
def test_training_goes_on_from_where_the_adapter_was(first, more, tiny_model, tmp_path, name):
    model = {"final": str(first / "final"), "path": str(first), "run": "first"}[name]
    sft(*more, "--model", model)
    second = tmp_path / "runs" / "second"
    assert losses(second)[0] == pytest.approx(losses(first)[-1], abs=1e-6)
    assert losses(second)[-1] < losses(second)[0]
    assert [text for text in notices(second) if "training on" in text] == [
        f"training on from the adapter {first / 'final'}: DoRA of rank 4, alpha 32, on q_proj, up_proj; its base is {tiny_model}"
    ]
    config, before = (json.loads((run / "final" / CONFIG_FILE).read_text()) for run in (second, first))
    assert config == before
    assert config["base_model_name_or_path"] == str(tiny_model)
    assert (second / "final" / BASE_FILE).read_text() == (first / "final" / BASE_FILE).read_text()
    template = "chat_template.jinja"
    assert (second / "final" / template).read_text() == (first / "final" / template).read_text()
    sft("export", "second", "--runs", tmp_path / "runs", "--to", "hf", "--out", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        expected = logits_by_peft(tiny_model, second / "final")
        torch.testing.assert_close(merged(IDS).logits, expected, atol=1e-5, rtol=0)
    sft("resume", "second", "--runs", tmp_path / "runs", "--verify")


def test_adapter_of_plain_peft_is_trained_on_and_keeps_its_layers(tiny_model, more, tmp_path):
    folder = foreign_adapter(
        tiny_model, tmp_path / "theirs", r=3, lora_alpha=6, target_modules=r".*layers\.1\..*(q|up)_proj", use_rslora=True
    )  # fmt: skip
    sft(*more, "--model", folder, "--learning-rate", "1e-3")
    final = tmp_path / "runs" / "second" / "final"
    before, after = load_file(folder / WEIGHTS_FILE), load_file(final / WEIGHTS_FILE)
    assert before.keys() == after.keys()
    assert all(not torch.equal(before[name], after[name]) for name in before)
    assert logits_by_peft(tiny_model, final).shape == (
        1,
        len(IDS[0]),
        logits_by_peft(tiny_model, folder).shape[-1],
    )


def test_start_may_be_named_beside_a_base_that_has_moved(first, more, tiny_model, tmp_path):
    shutil.copytree(tiny_model, tmp_path / "moved")
    start = f"adapter.start_from={first / 'final'}"
    sft(*more, "--adapter", "dora", "--set", start, "--model", tmp_path / "moved", "--max-steps", "1")
    assert losses(tmp_path / "runs" / "second")[0] == pytest.approx(losses(first)[-1], abs=1e-6)


def test_settings_of_a_run_that_went_on_serve_to_go_on_from_it(first, more, tmp_path):
    sft(*more, "--model", first / "final", "--max-steps", "1")
    second = tmp_path / "runs" / "second"
    sft("train", "--config", second / "config.toml", "--model", second, "--run", "third", "--max-steps", "1")
    third = tmp_path / "runs" / "third"
    assert losses(third)[0] == pytest.approx(losses(second)[-1], abs=1e-6)
    assert f'start_from = "{second / "final"}"' in (third / "config.toml").read_text()


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (["--adapter", "dora", "--rank", "8"], "adapter.rank is 8"),
        (["--lora"], "adapter.kind is lora"),
        (["--adapter", "dora", "--set", "adapter.alpha=8"], "adapter.alpha is 8"),
        (["--adapter", "dora", "--set", 'adapter.target_modules=["k_proj"]'], "adapter.target_modules is k_proj"),
        (["--set", "model.revision=main"], "model.revision is main"),
    ],
)  # fmt: skip
def test_other_shape_that_was_typed_is_refused_with_the_way_out(first, more, tmp_path, words, key):
    with pytest.raises(UsageError, match=key) as caught:
        sft(*more, "--model", first / "final", *words)
    assert f"sft export {first / 'final'} --to hf --out MERGED" in caught.value.hint
    assert not (tmp_path / "runs" / "second").exists()


@pytest.mark.parametrize(
    "form",
    [
        {"r": 4, "target_modules": ["q_proj"], "rank_pattern": {"layers.1.self_attn.q_proj": 2}},
        {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["norm"]},
        {"r": 4, "target_modules": ["q_proj"], "lora_alpha": 0.5},
    ],
    ids=["rank_pattern", "modules_to_save", "lora_alpha"],
)
def test_adapter_with_parts_that_are_not_trained_is_refused_by_name(
    tiny_model, more, tmp_path, form, request
):
    folder = foreign_adapter(tiny_model, tmp_path / "theirs", **form)
    with pytest.raises(UsageError, match=request.node.callspec.id) as caught:
        sft(*more, "--model", folder)
    assert "merge it first" in caught.value.hint


def test_other_weights_under_the_name_of_the_base_are_refused(first, more, tiny_model, tmp_path):
    other = build_tiny_model(tmp_path / "other", seed=1)
    path = first / "final" / BASE_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | {"name": str(other)}))
    with pytest.raises(MismatchError, match="trained on other weights"):
        sft(*more, "--model", first / "final")


def test_run_is_not_resumed_with_another_start(first, more, tmp_path):
    sft(*more, "--model", first / "final")
    runs = tmp_path / "runs"
    shutil.rmtree(runs / "second" / "final")
    shutil.copy(
        runs / "second" / "checkpoints" / "step-00000004" / WEIGHTS_FILE, first / "final" / WEIGHTS_FILE
    )
    with pytest.raises(MismatchError, match="the adapter it goes on from"):
        sft("resume", "second", "--runs", runs, "--checkpoint", "2")


@pytest.mark.parametrize("name", ["run", "path"])
def test_the_name_of_a_run_is_its_model(rows, flags, more, tmp_path, name):
    sft("train", "--data", rows, "--run", "first", *flags)
    first, second = tmp_path / "runs" / "first", tmp_path / "runs" / "second"
    sft(*more, "--model", {"run": "first", "path": str(first)}[name])
    assert losses(second)[0] == pytest.approx(losses(first)[-1], abs=1e-6)
    assert [text for text in notices(second) if "training on" in text] == [
        f"training on from the model {first / 'final'}"
    ]
    assert f'name = "{first / "final"}"' in (second / "config.toml").read_text()
