"""What a run leaves behind is what it trained, to the bit, and all that its source held."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, PreTrainedModel

from sftcli.errors import DataError, DivergedError, NotFoundError, StorageError
from sftcli.events import NeverStop, Notice, Session
from sftcli.modeling.formats.folder_write import save_model_folder
from sftcli.modeling.load import load_model
from sftcli.services.export.export import run_export
from sftcli.services.export.request import ExportFormat, ExportRequest
from sftcli.training.checkpoint import format as checkpoint
from sftcli.training.weights.masters import MasterWeights
from tests.support.recording import RecordingSink
from tests.support.runs import StopAtStep, settings_of, train, write_rows
from tests.support.tiny_families import WITH_BUFFERS, build_with_buffers, build_with_tower
from tests.support.tiny_model import build_tiny_model

NEVER = 99
SHORT = ("training.epochs=1", "data.heldout_fraction=0", "training.eval_every_steps=0")
EMBEDDINGS = ("model.embed_tokens.weight", "lm_head.weight")


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    write_rows(folder / "rows.jsonl", 12)
    return folder


def run_of(rows, source, *changes, sink=None):
    """Train for three steps; return the folder of the run."""
    place = source.parent / "runs"
    train(
        settings_of(rows, source, f"run.root={place}", "run.name=one", *SHORT, *changes),
        sink or StopAtStep(NEVER),
    )
    return place / "one"


def exported(folder, out, *, dtype=None):
    request = ExportRequest(
        checkpoint=str(folder), format=ExportFormat.HF, out=out, root=folder.parent, dtype=dtype
    )
    run_export(request, Session(RecordingSink(), NeverStop()))
    return out


def tensors(folder):
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [
        ("bf16", torch.float32),
        ("bf16", torch.float16),
        ("bf16", torch.bfloat16),
        ("fp32", torch.float16),
    ],
    ids=str,
)
@pytest.mark.parametrize("trains_embeddings", [True, False], ids=["all", "frozen-embeddings"])
def test_final_weights_are_the_masters_cast_once_and_frozen_ones_those_of_the_source(
    rows, tmp_path, dtype, trains_embeddings, precision
):
    source = build_tiny_model(tmp_path / "model", dtype=dtype, tie=trains_embeddings)
    frozen = f"training.train_embeddings={str(trains_embeddings).lower()}"
    run = run_of(rows, source, f"training.precision={precision}", frozen)
    before, final = tensors(source), tensors(run / "final")
    masters = load_file(run / "checkpoints" / "step-00000003" / "model.safetensors")
    assert final.keys() == before.keys() == masters.keys()
    for name, tensor in final.items():
        if not trains_embeddings and name in EMBEDDINGS:
            assert torch.equal(tensor, before[name])
            continue
        assert tensor.dtype == dtype
        assert masters[name].dtype == torch.float32
        assert torch.equal(tensor, masters[name].to(dtype))
        assert not torch.equal(tensor, before[name])
        assert not torch.equal(masters[name], masters[name].bfloat16().float())


@pytest.fixture(scope="module")
def towered(rows, tmp_path_factory):
    """A run of a model with a tower, its source, and what was said."""
    place, sink = tmp_path_factory.mktemp("tower"), StopAtStep(NEVER)
    source = build_with_tower(place / "model", dtype=torch.bfloat16)
    (source / "preprocessor_config.json").write_text("{}")
    return (
        run_of(rows, source, sink=sink),
        source,
        [event.text for event in sink.events if isinstance(event, Notice)],
    )


def test_a_tower_and_other_heads_are_told_of_once_and_written_as_they_were(towered, tmp_path):
    run, source, told = towered
    (line,) = [text for text in told if "visual" in text]
    before, final = tensors(source), tensors(run / "final")
    beside = [
        tensor.numel() for name, tensor in before.items() if "visual" in name or name.startswith("mtp.")
    ]
    share = sum(beside) / sum(tensor.numel() for tensor in before.values())
    assert (
        f"23 tensors (21 model.visual.*, 2 mtp.*), {share:.1%} of all weights: they are not trained" in line
    )
    assert final.keys() == before.keys()
    trained = [name for name in before if not torch.equal(final[name], before[name])]
    assert trained
    assert not [name for name in trained if "visual" in name or name.startswith("mtp.")]
    assert {tensor.dtype for tensor in final.values()} == {torch.bfloat16}


@pytest.mark.parametrize("way", ["final", "export", "export-of-checkpoint"])
def test_a_folder_with_a_tower_opens_as_the_model_it_was(towered, tmp_path, way):
    run, source, _ = towered
    folder = run / "final"
    if way != "final":
        folder = exported(
            folder if way == "export" else run / "checkpoints" / "step-00000003", tmp_path / "out"
        )
    before, config = tensors(source), json.loads((folder / "config.json").read_text())
    written = tensors(folder)
    assert written.keys() == before.keys()
    assert all(
        torch.equal(written[name], before[name]) for name in before if "visual" in name or "mtp" in name
    )
    assert config["model_type"] == "qwen3_5"
    assert config["architectures"] == ["Qwen3_5ForConditionalGeneration"]
    assert (folder / "preprocessor_config.json").is_file()
    model, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    head = dict(model.named_parameters())["model.language_model.norm.weight"]
    final = tensors(run / "final")["model.language_model.norm.weight"]
    assert torch.equal(head.float().bfloat16(), final)


def test_a_checkpoint_whose_tower_is_gone_is_not_exported_without_it(towered, tmp_path):
    run, source, _ = towered
    shutil.copytree(run.parent.parent, tmp_path / "copy", ignore=shutil.ignore_patterns("cache"))
    moved = tmp_path / "copy" / "runs" / "one"
    config = (moved / "config.toml").read_text().replace(str(source), str(tmp_path / "gone"))
    (moved / "config.toml").write_text(config)
    with pytest.raises(NotFoundError, match="gone"):
        exported(moved / "checkpoints" / "step-00000003", tmp_path / "out")


@pytest.mark.parametrize("family", WITH_BUFFERS)
def test_buffers_are_in_checkpoints_which_open_and_are_exported_as_final_is(rows, tmp_path, family):
    source = build_with_buffers(tmp_path / "model", family, dtype=torch.bfloat16)
    run = run_of(rows, source, "training.precision=fp32")
    before, final = tensors(source), tensors(run / "final")
    assert final.keys() == before.keys()
    assert {name: tensor.dtype for name, tensor in final.items()} == {
        name: t.dtype for name, t in before.items()
    }
    buffers = [name for name in before if name.endswith(("e_score_correction_bias", "layer_scalar"))]
    assert buffers
    assert all(torch.equal(final[name], before[name]) for name in buffers)
    checkpoint = run / "checkpoints" / "step-00000003"
    opened = load_model(checkpoint, dtype=torch.float32, device=torch.device("cpu"))
    final_model = load_model(run / "final", dtype=torch.float32, device=torch.device("cpu"))
    for name, tensor in final_model.state_dict().items():
        kept = opened.state_dict()[name]
        assert torch.equal(kept if tensor.equal(kept) else kept.bfloat16().float(), tensor)
    again = tensors(exported(checkpoint, tmp_path / "out"))
    assert again.keys() == final.keys()
    assert all(torch.equal(again[name].to(final[name].dtype), final[name]) for name in final)


# What the writing library might do, and what is found of it

FAULTS = {
    "lost": lambda held: held.pop("model.norm.weight"),
    "other-numbers": lambda held: held.update({"model.norm.weight": held["model.norm.weight"] * 2}),
    "other-type": lambda held: held.update({"model.norm.weight": held["model.norm.weight"].half()}),
    "other-shape": lambda held: held.update({"model.norm.weight": held["model.norm.weight"][:-1].clone()}),
    "one-more": lambda held: held.update({"model.surprise": torch.ones(3)}),
}


def spoilt_by(fault):
    """A library's way to save that changes what it has written."""
    save = PreTrainedModel.save_pretrained

    def spoil(self, folder, **options):
        save(self, folder, **options)
        held = load_file(folder / "model.safetensors")
        fault(held)
        save_file(held, folder / "model.safetensors", metadata={"format": "pt"})

    return spoil


@pytest.mark.parametrize("fault", FAULTS)
def test_a_folder_that_is_not_what_was_to_be_written_is_an_error_and_not_there(tmp_path, monkeypatch, fault):
    source = build_tiny_model(tmp_path / "model")
    model = load_model(source, dtype=torch.float32, device=torch.device("cpu"))
    monkeypatch.setattr(PreTrainedModel, "save_pretrained", spoilt_by(FAULTS[fault]))
    with pytest.raises(StorageError, match="surprise" if fault == "one-more" else r"model\.norm\.weight"):
        save_model_folder(model, source=source, folder=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_final_folder_that_is_not_what_was_trained_is_an_error_and_not_there(rows, tmp_path, monkeypatch):
    source = build_tiny_model(tmp_path / "model")
    monkeypatch.setattr(PreTrainedModel, "save_pretrained", spoilt_by(FAULTS["lost"]))
    with pytest.raises(StorageError, match=r"model\.norm\.weight is missing"):
        run_of(rows, source)
    assert not (tmp_path / "runs" / "one" / "final").exists()


def test_frozen_weights_that_are_not_those_of_the_source_are_an_error(rows, tmp_path, monkeypatch):
    source = build_tiny_model(tmp_path / "model", tie=False)
    rounded = MasterWeights.tensors

    def spoil(self):
        return {name: tensor.bfloat16().float() for name, tensor in rounded(self).items()}

    monkeypatch.setattr(MasterWeights, "tensors", spoil)
    with pytest.raises(StorageError, match="is not that of the source"):
        run_of(rows, source, "training.train_embeddings=false")


def test_experts_that_were_changed_on_their_way_are_found(tmp_path, monkeypatch):
    source = build_with_buffers(tmp_path / "model", "glm4_moe")
    model = load_model(source, dtype=torch.float32, device=torch.device("cpu"))

    def scaled(held):
        held["model.layers.1.mlp.experts.2.up_proj.weight"] *= 1.01

    save_model_folder(model, source=source, folder=tmp_path / "good")
    monkeypatch.setattr(PreTrainedModel, "save_pretrained", spoilt_by(scaled))
    with pytest.raises(StorageError, match="experts"):
        save_model_folder(model, source=source, folder=tmp_path / "bad")


def test_a_checkpoint_that_is_not_what_was_trained_is_an_error_and_not_there(rows, tmp_path, monkeypatch):
    write = checkpoint.tensor_file_parts

    def spoil(held):
        return write(
            {name: value.clone().zero_() if "norm" in name else value for name, value in held.items()}
        )

    monkeypatch.setattr(checkpoint, "tensor_file_parts", spoil)
    with pytest.raises(StorageError, match="holds other numbers"):
        run_of(rows, build_tiny_model(tmp_path / "model"))
    assert not [*(tmp_path / "runs" / "one" / "checkpoints").iterdir()]


# Numbers that are not finite


def test_a_run_of_skipped_steps_alone_is_no_success(rows, tmp_path):
    source = build_tiny_model(tmp_path / "model")
    held = load_file(source / "model.safetensors")
    held["model.norm.weight"].fill_(3e38)  # finite, and no logit is
    save_file(held, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DivergedError, match="every step was skipped: none of 2"):
        run_of(rows, source, "training.max_steps=2")
    assert not (tmp_path / "runs" / "one" / "final").exists()


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(tmp_path, number):
    source = build_tiny_model(tmp_path / "model")
    held = load_file(source / "model.safetensors")
    held["model.layers.1.mlp.up_proj.weight"][3, 5] = number
    save_file(held, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        DataError, match=r"non-finite values in bfloat16: model\.layers\.1\.mlp\.up_proj\.weight"
    ):
        load_model(source, dtype=torch.bfloat16, device=torch.device("cpu"))


@pytest.mark.parametrize("is_loaded", [True, False])
def test_weights_too_large_for_their_type_are_refused_and_not_written(tmp_path, is_loaded):
    source = build_tiny_model(tmp_path / "model")
    held = load_file(source / "model.safetensors")
    held["model.norm.weight"][3] = 1e6
    save_file(held, source / "model.safetensors", metadata={"format": "pt"})
    model = load_model(source, dtype=torch.float32, device=torch.device("cpu"))

    def write():
        if is_loaded:  # as after a training
            save_model_folder(model, source=source, folder=tmp_path / "out", dtype=torch.float16)
        else:
            exported(source, tmp_path / "out", dtype="f16")

    with pytest.raises(DataError, match="non-finite values in float16") as caught:
        write()
    assert "model.norm.weight" in caught.value.message
    assert "bf16" in caught.value.hint
    assert not (tmp_path / "out").exists()
