"""The attention that a user names is the one that computes, with the loss of any other, or the command says why not."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AttentionInterface, PreTrainedModel, modeling_utils

from sftcli.config.layers import Override
from sftcli.config.schema.run import Attention
from sftcli.errors import UsageError
from sftcli.events import Notice, Session
from sftcli.modeling.attention import attention_of
from sftcli.modeling.decoding.decoder import choose_decoder
from sftcli.modeling.kernels import document_attention
from sftcli.modeling.load import load_model
from sftcli.services.models.choose import choose_model, load_choice
from sftcli.services.train.resume import ResumeRequest, resume_training
from sftcli.services.train.start import requirements
from tests.support.recording import RecordingSink
from tests.support.runs import StopAtStep, numbers_of, settings_of, train, write_rows
from tests.support.tiny_model import build_tiny_model

NEVER = 99
SHORT = ("training.max_steps=4", "training.precision=fp32", "training.micro_batch_size=4")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("attention")
    write_rows(folder / "rows.jsonl", 12)
    build_tiny_model(folder / "model")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SFT_CACHE_DIR", str(folder / "cache"))
        yield folder


def run_of(place: Path, name: str, *changes: str, flag: StopAtStep | None = None) -> tuple[Path, list[str]]:
    flag = flag or StopAtStep(NEVER)
    train(settings_of(place, place / "model", f"run.name={name}", *SHORT, *changes), flag)
    return place / "runs" / name, [event.text for event in flag.events if isinstance(event, Notice)]


@pytest.fixture(scope="module")
def plain(place):
    """A run of which every row is alone, with the attention that it has by itself."""
    return run_of(place, "plain", "training.packing=off")[0]


def losses_of(run: Path) -> list[float]:
    return [float(str(event["loss"])) for event in numbers_of(run)]


def decided(run: Path) -> dict[str, object]:
    return json.loads((run / "run.json").read_text())["decisions"]


@pytest.mark.parametrize("packing", ["auto", "on", "off"])
@pytest.mark.parametrize("name", ["auto", "sdpa", "eager"])
def test_each_attention_gives_the_losses_of_rows_alone_packed_or_not(place, plain, name, packing):
    run, told = run_of(place, f"{name}-{packing}", f"model.attention={name}", f"training.packing={packing}")
    torch.testing.assert_close(losses_of(run), losses_of(plain), atol=1e-5, rtol=0)
    found = decided(run)
    assert found["attention"] == ("sdpa" if name == "auto" else name)
    # Documents have kernels of ours by auto alone: what is named computes, by a mask where rows have to be packed.
    kinds = (
        {"off": "none", "on": "mask", "auto": "none"}
        if name != "auto"
        else {"off": "none", "on": "bounds", "auto": "bounds"}
    )
    assert found["packing"] == kinds[packing]
    assert ("LlamaDecoderLayer" in found["layers"]) == (name == "auto")
    if name != "auto" and packing == "auto":
        assert any(
            f"rows are not packed: LlamaForCausalLM has no attention {name} that keeps documents" in text
            for text in told
        )
    assert not [text for text in told if "has no sdpa" in text]


@pytest.mark.parametrize(
    ("name", "has_cuda", "more", "fault"),
    [
        ("flash_attention_2", False, (), "needs a CUDA device, and none is available"),
        ("flex_attention", False, (), "needs a CUDA device, and none is available"),
        ("flash_attention_2", True, ("training.precision=bf16",), "needs flash-attn, which is not installed"),
        ("flash_attention_3", True, ("training.precision=bf16",), "needs flash-attn-3, which is not installed"),
        ("flash_attention_2", True, ("training.precision=fp32",), "training.precision is fp32"),
    ],
)  # fmt: skip
def test_an_attention_that_cannot_be_used_here_is_refused_before_rows_are_read(
    place, tmp_path, monkeypatch, name, has_cuda, more, fault
):
    monkeypatch.setattr(requirements, "_has_cuda", lambda: has_cuda)
    settings = settings_of(
        place,
        tmp_path / "no-model",
        f"run.root={tmp_path}",
        f"model.attention={name}",
        f"data.sources={tmp_path}/none",
        *more,
    )
    with pytest.raises(UsageError) as caught:
        train(settings, StopAtStep(NEVER))
    assert fault in caught.value.message
    assert name in caught.value.message
    assert caught.value.hint


def test_a_run_may_go_on_with_another_attention_where_the_user_says_so(place, plain):
    run, _ = run_of(place, "moved", "training.packing=off", flag=StopAtStep(2))
    flag, other = StopAtStep(NEVER), Override(key="model.attention", value="eager", origin="--set")
    request = ResumeRequest(
        root=place / "runs", run="moved", overrides=(other,), allowed=("model.attention",)
    )
    resume_training(request, Session(flag, flag))
    assert decided(run)["attention"] == "eager"
    torch.testing.assert_close(losses_of(run), losses_of(plain), atol=1e-5, rtol=0)


def test_answers_take_the_attention_of_the_run_where_it_works_on_any_machine(place):
    run, _ = run_of(place, "asked", "model.attention=eager")
    choice = choose_model(str(run), root=place / "runs", emit=RecordingSink())
    model = load_choice(choice, dtype=torch.float32, device=torch.device("cpu"))
    assert attention_of(model) == "eager"
    other = load_model(place / "model", dtype=torch.float32, device=torch.device("cpu"))
    assert "FusedRows" in str(choose_decoder(other).make_rows)
    assert "FusedRows" not in str(choose_decoder(model).make_rows)
    config = (run / "config.toml").read_text()
    (run / "config.toml").write_text(config.replace('"eager"', '"flash_attention_2"'))
    assert choose_model(str(run), root=place / "runs", emit=RecordingSink()).attention is Attention.AUTO


@pytest.fixture
def flash(monkeypatch):
    """A stand-in for the kernel of a package, which takes 16 bits and bounds of documents; returns the types that it saw."""
    seen = set()

    def attend(module, query, *rest, **told):
        assert query.dtype == torch.bfloat16
        seen.add((query.dtype, "cu_seq_lens_q" in told))
        return document_attention._attend(module, query, *rest, **told)

    monkeypatch.setattr(requirements, "_has_cuda", lambda: True)
    monkeypatch.setattr(requirements, "_is_installed", lambda package: package == "flash-attn")
    monkeypatch.setattr(PreTrainedModel, "_flash_attn_can_dispatch", lambda *_, **__: True)
    monkeypatch.setattr(modeling_utils, "lazy_import_flash_attention", lambda *_, **__: None)
    monkeypatch.setitem(AttentionInterface._global_mapping, "flash_attention_2", attend)
    return seen


@pytest.mark.parametrize("adapter", [(), ("adapter.kind=lora", "adapter.rank=4")], ids=["full", "lora"])
def test_flash_attention_gets_16_bits_and_bounds_and_gives_the_loss_of_the_others(place, flash, adapter):
    common = ("training.precision=bf16", *adapter)
    name = "lora" if adapter else "full"
    run, told = run_of(place, f"flash-{name}", "model.attention=flash_attention_2", *common)
    other, _ = run_of(place, f"other-{name}", "training.packing=off", *common)
    assert (torch.bfloat16, True) in flash
    assert decided(run)["attention"] == "flash_attention_2"
    assert decided(run)["packing"] == "bounds"
    assert any("rows are packed" in text for text in told)
    torch.testing.assert_close(losses_of(run), losses_of(other), atol=0.02, rtol=0)
