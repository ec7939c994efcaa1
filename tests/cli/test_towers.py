"""Models of text and images are trained on text: what text does not reach stays as it is, and all of it comes back."""

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from peft import AutoPeftModel
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from sftcli.config.schema.run import SamplingSettings
from sftcli.errors import MismatchError, StorageError, UsageError
from sftcli.events import ModelLoaded, NeverStop, Notice, Session
from sftcli.modeling.architecture import auto_class
from sftcli.modeling.formats.sizes import embedding_bytes
from sftcli.modeling.load import load_model
from sftcli.services.export.export import run_export
from sftcli.services.export.request import ExportFormat, ExportRequest
from sftcli.services.generate.prompt import run_generation
from sftcli.services.generate.request import GenerateRequest
from sftcli.services.train.resume import ResumeRequest, resume_training
from sftcli.training.utilization import Workload
from sftcli.training.weights.masters import MasterWeights
from tests.support.recording import RecordingSink
from tests.support.runs import StopAtStep, numbers_of, settings_of, train, write_rows
from tests.support.tiny_families import MULTIMODAL, build_multimodal

NEVER, STEPS, LAST = 99, 2, "step-00000002"
IDS = torch.arange(20, 44)[None]
SHORT = (
    f"training.max_steps={STEPS}", "training.eval_every_steps=0", "checkpoint.every_steps=1", "training.precision=fp32",
)  # fmt: skip
LORA = ("adapter.kind=lora", "adapter.rank=4")
# Families whose class for a whole model computes nothing on text here; their language model in it does.
BY_TEXT = {"llama4": "language_model"}
# Their towers are in memory while they train; others are copied from the files, and no library writes them.
WHOLE = [family for family in MULTIMODAL if family not in BY_TEXT]
PASSED_BY = {"mllama": "language_model.model.layers.1."}  # attends to an image


@pytest.fixture(scope="module", params=MULTIMODAL)
def place(request, tmp_path_factory):
    """A folder with rows, the model of a family, and a cache of its own."""
    folder = tmp_path_factory.mktemp(request.param)
    write_rows(folder / "rows.jsonl", 12)
    build_multimodal(folder / "model", request.param)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SFT_CACHE_DIR", str(folder / "cache"))
        yield folder


@pytest.fixture(scope="module")
def trained(place):
    """A run, and what was said."""
    sink = StopAtStep(NEVER)
    train(settings_of(place, place / "model", "run.name=whole", *SHORT), sink)
    return place / "runs" / "whole", sink.events


@pytest.fixture(scope="module")
def adapted(place):
    targets = (
        ('adapter.target_modules=["q_proj", "v_proj"]',) if family_of(place) == "llama4" else ()
    )  # its router is a linear layer that gives two tensors
    train(settings_of(place, place / "model", "run.name=lora", *SHORT, *LORA, *targets), StopAtStep(NEVER))
    return place / "runs" / "lora"


def family_of(place: Path) -> str:
    return str(json.loads((place / "model" / "config.json").read_text())["model_type"])


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def is_beside(family: str, name: str) -> bool:
    return (
        "vision" in name
        or "visual" in name
        or "projector" in name
        or name.startswith(PASSED_BY.get(family, "-"))
    )


def exported(source: Path, out: Path) -> Path:
    request = ExportRequest(checkpoint=str(source), format=ExportFormat.HF, out=out, root=source.parent)
    run_export(request, Session(RecordingSink(), NeverStop()))
    return out


def answer(source: Path, root: Path) -> str:
    sampling = SamplingSettings(max_new_tokens=6)
    request = GenerateRequest(
        prompt="What is 3 plus 3?", sampling=sampling, root=root, precision="fp32", checkpoint=str(source)
    )
    (completion,) = run_generation(request, RecordingSink(), NeverStop())
    return completion.text


@torch.no_grad()
def logits_of_own_class(folder: Path) -> torch.Tensor:
    """Return the logits of text in the class that transformers has for text and images."""
    config = json.loads((folder / "config.json").read_text())
    kind = getattr(transformers, config["architectures"][0])
    model, info = kind.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert kind.__name__.endswith("ForConditionalGeneration")
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    part = model.get_submodule(BY_TEXT.get(config["model_type"], ""))
    return part.eval()(input_ids=IDS).logits


@torch.no_grad()
def logits_of(folder: Path) -> torch.Tensor:
    return load_model(folder, dtype=torch.float32, device=torch.device("cpu"))(input_ids=IDS).logits


def require_beside_as_it_was(place: Path, folder: Path) -> list[str]:
    """Return what of ``folder`` is other than in the model that was trained; none of it lies beside its text."""
    before, after, family = tensors(place / "model"), tensors(folder), family_of(place)
    assert after.keys() == before.keys()
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    assert [name for name in before if is_beside(family, name)]
    assert not [name for name in moved if is_beside(family, name)]
    return moved


def test_text_is_trained_and_what_it_does_not_reach_is_told_and_stays(place, trained):
    run, events = trained
    moved = require_beside_as_it_was(place, run / "final")
    before, family = tensors(place / "model"), family_of(place)
    assert {*moved} == {name for name in before if not is_beside(family, name)}
    beside = [name for name in before if is_beside(family, name)]
    share = sum(before[name].numel() for name in beside) / sum(tensor.numel() for tensor in before.values())
    (line,) = [event.text for event in events if isinstance(event, Notice) and "besides" in event.text]
    assert line.startswith(f"besides the language model there are {len(beside)} tensors (")
    assert f"), {share:.1%} of all weights: they are not trained and are saved unchanged" in line
    (loaded,) = [event for event in events if isinstance(event, ModelLoaded)]
    assert loaded.trainable == sum(before[name].numel() for name in moved)
    decided = json.loads((run / "run.json").read_text())["decisions"]
    assert (decided["packing"], decided["head"]) == ("bounds", "lean")


def test_sizes_are_those_of_text(place):
    before, family = tensors(place / "model"), family_of(place)
    matrices = {
        name: tensor.numel()
        for name, tensor in before.items()
        if tensor.ndim > 1 and not is_beside(family, name)
    }
    tables = {name for name in matrices if name.endswith(("embed_tokens.weight", "lm_head.weight"))}
    if family != "mllama":  # whose table has eight rows more than there are tokens
        assert embedding_bytes(place / "model") == 4 * sum(matrices[name] for name in tables)
    work = Workload.of(load_model(place / "model", dtype=torch.float32, device=torch.device("cpu")))
    body = {
        name: size / (2 if ".experts." in name else 1)
        for name, size in matrices.items()
        if name not in tables
    }
    assert work.per_token == 6 * sum(body.values())  # of two experts a token goes through one


@pytest.mark.parametrize("way", ["final", "export", "export-of-checkpoint"])
def test_what_is_written_opens_as_the_model_it_was_with_the_logits_that_were_trained(
    place, trained, way, tmp_path
):
    run, _ = trained
    checkpoint = run / "checkpoints" / LAST
    folder = run / "final"
    if way != "final":
        folder = exported(folder if way == "export" else checkpoint, tmp_path / "out")
    require_beside_as_it_was(place, folder)
    assert (folder / "preprocessor_config.json").is_file()
    if way != "final":
        assert "AutoModelForImageTextToText.from_pretrained(" in (folder / "README.md").read_text()
    assert json.loads((folder / "config.json").read_text())["model_type"] == family_of(place)
    assert torch.equal(logits_of_own_class(folder), logits_of(checkpoint))
    assert torch.equal(logits_of(folder), logits_of(checkpoint))
    assert not torch.equal(logits_of(folder), logits_of(place / "model"))


def test_a_run_that_goes_on_leaves_what_an_uninterrupted_one_leaves(place, trained):
    run, _ = trained
    train(settings_of(place, place / "model", "run.name=cut", *SHORT), StopAtStep(1))
    flag = StopAtStep(NEVER)
    resume_training(ResumeRequest(root=place / "runs", run="cut"), Session(flag, flag))
    cut = place / "runs" / "cut"
    assert numbers_of(cut) == numbers_of(run)
    before, after = tensors(run / "final"), tensors(cut / "final")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("family", ["qwen3_vl", "llama4"])  # one of each way
def test_a_tower_in_bfloat16_comes_back_from_products_in_bfloat16(family, tmp_path):
    build_multimodal(tmp_path / "model", family, dtype=torch.bfloat16)
    write_rows(tmp_path / "rows.jsonl", 12)
    settings = settings_of(tmp_path, tmp_path / "model", "run.name=one", *SHORT, "training.precision=bf16")
    train(settings, StopAtStep(NEVER))
    final = tmp_path / "runs" / "one" / "final"
    assert require_beside_as_it_was(tmp_path, final)
    assert {tensor.dtype for tensor in tensors(final).values()} == {torch.bfloat16}


def test_every_folder_answers_alike(place, trained, tmp_path):
    run, _ = trained
    folders = [run, run / "final", run / "checkpoints" / LAST, exported(run / "final", tmp_path / "out")]
    assert len({answer(folder, place / "runs") for folder in folders}) == 1


def test_an_adapter_sits_on_layers_of_text_alone_and_is_merged_into_the_whole(place, adapted, tmp_path):
    family = family_of(place)
    names = load_file(adapted / "final" / "adapter_model.safetensors").keys()
    layers = {name.removeprefix("base_model.model.").partition(".lora_")[0] for name in names}
    assert any(layer.endswith("self_attn.q_proj") for layer in layers)
    assert not [layer for layer in layers if is_beside(family, layer) or ".cross_attn." in layer]
    merged = exported(adapted / "final", tmp_path / "merged")
    require_beside_as_it_was(place, merged)
    assert torch.allclose(logits_of_own_class(merged), logits_of(merged), atol=1e-6)
    assert answer(merged, place / "runs") == answer(adapted, place / "runs")
    if family not in BY_TEXT:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft asks transformers for names that are going away
            theirs = AutoPeftModel.from_pretrained(adapted / "final").eval()(input_ids=IDS).logits
        torch.testing.assert_close(theirs, logits_of(merged), atol=1e-5, rtol=0)


# What is not as it should be is found


@pytest.mark.parametrize("place", WHOLE, indirect=True)
def test_a_tensor_of_the_tower_that_is_not_written_is_an_error(place, tmp_path, monkeypatch):
    save, family = PreTrainedModel.save_pretrained, family_of(place)

    def spoil(self, folder, **options):
        save(self, folder, **options)
        held = load_file(Path(folder) / "model.safetensors")
        held.pop(next(name for name in held if is_beside(family, name)))
        save_file(held, Path(folder) / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", spoil)
    with pytest.raises(StorageError, match="is missing"):
        train(
            settings_of(place, place / "model", f"run.root={tmp_path}", "run.name=one", *SHORT),
            StopAtStep(NEVER),
        )
    assert not (tmp_path / "one" / "final").exists()


@pytest.mark.parametrize("place", WHOLE, indirect=True)
def test_a_tower_that_is_not_that_of_the_source_any_more_is_an_error(place, tmp_path, monkeypatch):
    held = MasterWeights.tensors

    def spoil(self):
        found = held(self)
        name = next(name for name in found if is_beside("", name.removeprefix("model.")))
        return found | {name: found[name] + 1e-3}

    monkeypatch.setattr(MasterWeights, "tensors", spoil)
    with pytest.raises(StorageError, match="is not that of the source"):
        train(
            settings_of(place, place / "model", f"run.root={tmp_path}", "run.name=one", *SHORT),
            StopAtStep(NEVER),
        )


def test_text_that_lacks_a_tensor_is_refused_however_many_lie_beside_it(place, tmp_path):
    copy = Path(shutil.copytree(place / "model", tmp_path / "model"))
    held = tensors(copy)
    held.pop(
        next(name for name in held if name.endswith("layers.0.input_layernorm.weight") and "vis" not in name)
    )
    save_file(held, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(MismatchError, match=r"layers\.0\.input_layernorm\.weight"):
        load_model(copy, dtype=torch.float32, device=torch.device("cpu"))


def test_a_stray_tensor_of_text_is_refused(place, tmp_path):
    copy = Path(shutil.copytree(place / "model", tmp_path / "model"))
    held = tensors(copy)
    norm = next(
        name for name in held if name.endswith("layers.0.input_layernorm.weight") and "vis" not in name
    )
    held[norm.replace("layers.0", "layers.7")] = held[norm].clone()
    save_file(held, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(MismatchError, match=r"layers\.7\.input_layernorm\.weight"):
        load_model(copy, dtype=torch.float32, device=torch.device("cpu"))


def refusal_of(place):
    """Return why the model in ``place`` is not trained."""
    write_rows(place / "rows.jsonl", 12)
    with pytest.raises(UsageError) as caught:
        train(settings_of(place, place / "model", "run.name=one", *SHORT), StopAtStep(NEVER))
    assert not (place / "runs" / "one" / "final").exists()
    return caught.value.message


def test_a_model_that_sees_what_it_is_to_predict_is_refused(tmp_path):
    path = build_multimodal(tmp_path / "model", "gemma3") / "config.json"
    config = json.loads(path.read_text())
    config["text_config"]["use_bidirectional_attention"] = True
    path.write_text(json.dumps(config))
    message = refusal_of(tmp_path)
    assert (
        "Gemma3ForConditionalGeneration cannot be trained on text: its attention sees the tokens" in message
    )


def test_a_model_that_does_not_read_text_alone_is_refused(tmp_path, monkeypatch):
    build_multimodal(tmp_path / "model", "qwen3_vl")

    def wants_images(self, pixel_values=None, **rest):
        raise ValueError("pixel_values are needed")

    monkeypatch.setattr(transformers.Qwen3VLForConditionalGeneration, "forward", wants_images)
    message = refusal_of(tmp_path)
    assert message == (
        "Qwen3VLForConditionalGeneration cannot be trained on text: it does not read text without an image: "
        "pixel_values are needed"
    )


def test_a_model_that_reads_its_prompt_with_an_encoder_is_refused_by_name():
    with pytest.raises(
        UsageError, match=r"Florence2ForConditionalGeneration cannot be trained on text: .* encoder"
    ):
        auto_class(transformers.Florence2Config())
