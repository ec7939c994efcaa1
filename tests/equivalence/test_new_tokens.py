"""Laws of new tokens: training with them is what transformers and peft do by hand, and every folder of a run reads alike."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from sftcli.errors import MismatchError, UsageError
from sftcli.events import Ending, NeverStop, Session
from sftcli.modeling.adapter.adapter import merge_adapter
from sftcli.modeling.adapter.folder import read_shape
from sftcli.services.export.export import run_export
from sftcli.services.export.request import ExportFormat, ExportRequest
from sftcli.services.models.choose import choose_model, load_choice
from sftcli.services.train.resume import ResumeRequest, resume_training
from sftcli.training.checkpoint.format import read_snapshot
from tests.support.by_hand import STEPS, build_place, by_hand, losses_of, plain_run, plain_settings
from tests.support.recording import RecordingSink
from tests.support.runs import StopAtStep, copied_here, tensors_of, train

ROWS = 514
TOKENS = ("<tool>", "<q>")
LORA = ("adapter.kind=lora", "adapter.rank=4", "adapter.alpha=8")
CPU = torch.device("cpu")
# peft asks transformers for names that are going away.
pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed:FutureWarning")
IDS = torch.tensor([[1, 70, 514, 90, 515, 100, 514, 2]])


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def origin(request, tmp_path_factory) -> Path:
    return build_place(tmp_path_factory.mktemp("origin"), tie=request.param)


@pytest.fixture
def place(origin, tmp_path, monkeypatch) -> Path:
    return copied_here(origin, tmp_path, monkeypatch)


@pytest.fixture(scope="module")
def full(origin, tmp_path_factory) -> Path:
    """A run of all weights, made once."""
    return made_once(origin, tmp_path_factory.mktemp("full"))


@pytest.fixture(scope="module")
def adapted(origin, tmp_path_factory) -> Path:
    """A run of an adapter, made once."""
    return made_once(origin, tmp_path_factory.mktemp("adapted"), *LORA)


def made_once(origin: Path, folder: Path, *changes: str) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SFT_CACHE_DIR", str(folder / "cache"))
        return run(origin, *changes, f"run.root={folder / 'runs'}")


def settings(place: Path, *changes: str):
    return plain_settings(place, f'model.new_tokens=["{TOKENS[0]}", "{TOKENS[1]}"]', *changes)


def run(place: Path, *changes: str) -> Path:
    return plain_run(place, f'model.new_tokens=["{TOKENS[0]}", "{TOKENS[1]}"]', *changes)


def resized(place: Path):
    """The model and its tokenizer with the new tokens, as the documentation of transformers says."""
    tokenizer = AutoTokenizer.from_pretrained(place / "model")
    model = AutoModelForCausalLM.from_pretrained(place / "model", dtype=torch.float32)
    assert tokenizer.add_tokens([*TOKENS]) == 2
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model.resize_token_embeddings(len(tokenizer))
    return model, tokenizer


@torch.no_grad()
def logits(model, ids=IDS) -> torch.Tensor:
    return model.eval()(ids).logits


def test_full_training_is_the_loop_of_transformers(place, full):
    found = losses_of(full)
    expected = by_hand(*resized(place))
    assert found == pytest.approx(expected, abs=1e-4)
    assert expected[-1] < expected[0] - 0.4


def test_adapter_trains_as_that_of_peft(place):
    found = losses_of(run(place, *LORA, 'adapter.target_modules=["q_proj", "down_proj"]'))
    model, tokenizer = resized(place)
    tied = model.config.tie_word_embeddings
    layers = {"embed_tokens": [ROWS, ROWS + 1]} | ({} if tied else {"lm_head": [ROWS, ROWS + 1]})
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], trainable_token_indices=layers
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # as the run does before it makes random matrices
        model = get_peft_model(model, config)
    expected = by_hand(model, tokenizer)
    assert found == pytest.approx(expected, abs=1e-4)
    assert expected[-1] < expected[0] - 0.03


@pytest.mark.parametrize("packing", ["on", "off"])
def test_fused_head_and_packing_move_no_loss(place, adapted, packing):
    other = run(place, *LORA, f"training.packing={packing}", "training.micro_batch_size=1")
    assert losses_of(adapted) == pytest.approx(losses_of(other), abs=1e-4)
    decided = [json.loads((folder / "run.json").read_text())["decisions"] for folder in (adapted, other)]
    assert {one["head"] for one in decided} == {"lean"}


def test_adapter_changes_the_rows_of_new_tokens_and_no_other(place, adapted):
    tied = json.loads((place / "model" / "config.json").read_text())["tie_word_embeddings"]
    before = load_file(place / "model" / "model.safetensors")
    choice = choose_model(str(adapted), root=place / "runs", emit=RecordingSink())
    after = load_choice(choice, dtype=torch.float32, device=CPU).state_dict()
    start = load_file(choice.weights_folder / "model.safetensors")
    for name in ["model.embed_tokens.weight"] if tied else ["model.embed_tokens.weight", "lm_head.weight"]:
        assert torch.equal(after[name][:ROWS], before[name])
        assert (after[name][ROWS:] != start[name][ROWS:]).all()
    stored = load_file(adapted / "final" / "adapter_model.safetensors")
    assert [name for name in stored if "token" in name] == [
        f"base_model.model.{layer}.token_adapter.trainable_tokens_delta"
        for layer in ([] if tied else ["lm_head"]) + ["model.embed_tokens"]
    ]


def test_every_folder_of_an_adapter_has_the_logits_that_peft_computes(place, adapted):
    folder = adapted
    theirs = logits(AutoPeftModelForCausalLM.from_pretrained(folder / "final"))
    assert theirs.shape[-1] == ROWS + 2
    places = {
        "run": folder,
        "final": folder / "final",
        "checkpoint": folder / "checkpoints" / f"step-{STEPS:08d}",
    }
    places["copy"] = Path(shutil.copytree(folder / "final", place / "copy"))
    for kind, path in places.items():
        choice = choose_model(str(path), root=place / "runs", emit=RecordingSink())
        ours = logits(load_choice(choice, dtype=torch.float32, device=CPU))
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0, msg=kind)
    request = ExportRequest(
        checkpoint=str(folder), format=ExportFormat.HF, out=place / "merged", root=place / "runs"
    )
    run_export(request, Session(RecordingSink(), NeverStop()))
    merged = AutoModelForCausalLM.from_pretrained(place / "merged")
    torch.testing.assert_close(logits(merged), theirs, atol=1e-5, rtol=0)
    assert AutoTokenizer.from_pretrained(place / "merged")("<tool>").input_ids == [ROWS]


def test_every_folder_of_a_full_run_has_the_logits_that_transformers_computes(place, full):
    folder = full
    final = AutoModelForCausalLM.from_pretrained(folder / "final")
    assert final.config.vocab_size == ROWS + 2
    assert AutoTokenizer.from_pretrained(folder / "final")("<tool>").input_ids == [ROWS]
    last = read_snapshot(folder / "checkpoints" / f"step-{STEPS:08d}").weights
    for name, tensor in final.named_parameters():
        assert torch.equal(tensor, last[name])
    for path in (folder, folder / "checkpoints" / f"step-{STEPS:08d}"):
        choice = choose_model(str(path), root=place / "runs", emit=RecordingSink())
        assert torch.equal(logits(load_choice(choice, dtype=torch.float32, device=CPU)), logits(final))


@pytest.mark.parametrize("form", [(), (*LORA, "adapter.dropout=0.2")], ids=["full", "lora"])
def test_stopped_and_resumed_run_ends_with_the_same_bytes(place, form):
    whole = run(place, *form, "run.name=whole")
    flag = StopAtStep(2)
    train(settings(place, *form, "run.name=cut"), flag)
    shutil.rmtree(place / "cache")  # the folder with the rows is made again, and is the same
    outcome = resume_training(
        ResumeRequest(run="cut", root=place / "runs"),
        Session(flag, StopAtStep(STEPS + 1)),
    )
    assert outcome.ending is Ending.FINISHED
    assert tensors_of(place / "runs" / "cut", STEPS) == tensors_of(whole, STEPS)


def test_run_does_not_go_on_with_other_tokens(place):
    train(settings(place, "run.name=one"), StopAtStep(2))
    with pytest.raises(MismatchError, match=r"model\.new_tokens was"):
        train(
            settings(place, "run.name=one", 'model.new_tokens=["<tool>"]'), StopAtStep(STEPS + 1), auto=True
        )


def test_adapter_made_elsewhere_with_rows_of_tokens_is_read(place):
    base = place / "model"
    model = AutoModelForCausalLM.from_pretrained(base)
    config = LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[7, 9])
    model = get_peft_model(model, config)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.normal_()
    model.save_pretrained(place / "foreign")
    merged = merge_adapter(place / "foreign", base=base)
    ids = torch.tensor([[1, 7, 9, 70, 2]])
    torch.testing.assert_close(logits(merged, ids), logits(model, ids), atol=1e-5, rtol=0)


@pytest.mark.parametrize("none", [[], {}, {"embed_tokens": []}])
def test_adapter_with_an_empty_list_of_tokens_is_one_without(place, none):
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(place / "model"), LoraConfig(r=2, target_modules=["q_proj"])
    )
    model.save_pretrained(place / "foreign")
    file = place / "foreign" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"trainable_token_indices": none}))
    merged = merge_adapter(place / "foreign", base=place / "model")
    ids = torch.tensor([[1, 7, 9, 70, 2]])
    torch.testing.assert_close(logits(merged, ids), logits(model, ids), atol=1e-5, rtol=0)
    assert read_shape(place / "foreign").rank == 2


def test_adapter_with_rows_that_its_base_has_not_is_refused_by_name(place):
    model, _ = resized(place)
    config = LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[ROWS])
    get_peft_model(model, config).save_pretrained(place / "foreign", save_embedding_layers=False)
    with pytest.raises(
        MismatchError, match=r"has a row for token 514, and model\.embed_tokens of the model has 514 rows"
    ):
        merge_adapter(place / "foreign", base=place / "model")


def test_head_that_has_an_adapter_has_no_rows_of_its_own(place):
    changes = ('adapter.target_modules=["q_proj", "lm_head"]', *LORA)
    with pytest.raises(UsageError, match=r"lm_head shares its weights|names the output head, whose rows"):
        run(place, *changes)
