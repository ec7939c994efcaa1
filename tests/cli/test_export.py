"""``sft export``: what is written opens elsewhere and computes the same, and is whole or absent."""

import getpass
import json
import re
import resource
import shutil
import socket
from pathlib import Path

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM
from typer.testing import CliRunner

from sftcli.cli.app import app
from sftcli.errors import StorageError
from sftcli.modeling.formats.pt_file import read_pt
from sftcli.modeling.tokenizer.chat_tokenizer import load_chat_tokenizer
from tests.support.forked import run_forked
from tests.support.runs import StopAtStep, settings_of, train, write_rows
from tests.support.tiny_model import build_tiny_model
from tests.support.tiny_modern import build_tiny_pt
from tests.support.tiny_tokenizer import build_tiny_tokenizer

MESSAGES = [{"role": "user", "content": "Name 3 ferries."}]


def invoke(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def export(*arguments: object) -> dict[str, object]:
    result = invoke("export", *arguments, "--json")
    assert result.exit_code == 0, (result.stderr, result.exception)
    return json.loads(result.stdout)


def edit(path: Path, **fields: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.tensor([[5, 9, 33, 7, 300, 2, 8]])).logits


@pytest.fixture
def tiny_qwen(tmp_path: Path) -> Path:
    config = Qwen2Config(
        vocab_size=520, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=False, bos_token_id=1,
        eos_token_id=2, pad_token_id=2, initializer_range=0.05,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = Qwen2ForCausalLM(config)
        for layer in model.model.layers:
            torch.nn.init.normal_(layer.self_attn.q_proj.bias)
    model.save_pretrained(tmp_path / "qwen")
    return build_tiny_tokenizer(tmp_path / "qwen")


@pytest.fixture(scope="module")
def trained(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs with a scored run ``first`` on the tiny model."""
    folder = tmp_path_factory.mktemp("trained")
    write_rows(folder / "rows.jsonl")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SFT_CACHE_DIR", str(folder / "cache"))
        assert train(settings_of(folder, tiny_model, "run.name=first"), StopAtStep(99)).final is not None
        assert invoke("eval", "first", "--runs", folder / "runs", "--max-rows", 2).exit_code == 0
    return folder / "runs"


@pytest.mark.parametrize(
    ("family", "kind", "tolerance"),
    [("llama", "f16", 1e-2), ("qwen2", "f16", 1e-2), ("llama", "q8_0", 0.1), ("qwen2", "bf16", 0.05)],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_gguf_read_by_transformers_computes_the_same(
    family, kind, tolerance, tiny_model, tiny_qwen, tmp_path
):
    source = tiny_model if family == "llama" else tiny_qwen
    out = tmp_path / "model.gguf"
    assert export(source, "--to", "gguf", "--dtype", kind, "--out", out)["bytes"] == out.stat().st_size
    ours = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=out.name, dtype=torch.float32)
    torch.testing.assert_close(logits(theirs), logits(ours), atol=tolerance, rtol=0)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_gguf_holds_tokenizer_template_and_stop_tokens(tiny_model, tmp_path):
    export(tiny_model, "--to", "gguf", "--out", tmp_path / "model.gguf")
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    ours = AutoTokenizer.from_pretrained(tiny_model)
    assert (
        theirs.apply_chat_template(MESSAGES)["input_ids"] == ours.apply_chat_template(MESSAGES)["input_ids"]
    )
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields
    assert fields["tokenizer.ggml.eos_token_id"].contents() == 2
    assert fields["tokenizer.ggml.pre"].contents() == "gpt-2"
    assert fields["tokenizer.chat_template"].contents() == (tiny_model / "chat_template.jinja").read_text()


def test_every_stop_token_is_in_the_gguf_metadata(tmp_path):
    source = build_tiny_model(tmp_path / "tiny")
    generation = json.loads((source / "generation_config.json").read_text())
    (source / "generation_config.json").write_text(json.dumps(generation | {"eos_token_id": [2, 0]}))
    assert load_chat_tokenizer(source).stop_ids == {0, 2}
    export(source, "--to", "gguf", "--out", tmp_path / "model.gguf")
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields
    assert fields["tokenizer.ggml.eos_token_id"].contents() == 2
    assert fields["tokenizer.ggml.eot_token_id"].contents() == 0


def test_gguf_says_what_it_is(tiny_model, tmp_path):
    source = tmp_path / "walnut"
    shutil.copytree(tiny_model, source)
    (source / "README.md").write_text("---\ntags:\n- a\nlicense: apache-2.0\n---\n# walnut\n")
    edit(source / "tokenizer_config.json", unk_token="<|endoftext|>")
    export(source, "--to", "gguf", "--out", tmp_path / "a.f16.gguf")
    fields = gguf.GGUFReader(tmp_path / "a.f16.gguf").fields
    told = {key: fields[f"general.{key}"].contents() for key in ("type", "name", "size_label", "license")}
    assert told == {"type": "model", "name": "walnut", "size_label": "35K", "license": "apache-2.0"}
    assert fields["tokenizer.ggml.unknown_token_id"].contents() == 0
    export(source, "--to", "hf", "--out", tmp_path / "given")
    assert "license: apache-2.0\n" in (tmp_path / "given" / "README.md").read_text()


@pytest.mark.parametrize("says_tied", [True, False])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_head_of_its_own_is_kept_whatever_the_configuration_says(says_tied, tmp_path):
    source = build_tiny_model(tmp_path / "own", tie=False)
    edit(source / "config.json", tie_word_embeddings=says_tied)
    ours = logits(AutoModelForCausalLM.from_pretrained(source))
    export(source, "--to", "gguf", "--dtype", "f32", "--out", tmp_path / "model.gguf")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    torch.testing.assert_close(logits(theirs), ours, atol=1e-4, rtol=0)
    export(source, "--to", "hf", "--out", tmp_path / "given")
    assert json.loads((tmp_path / "given" / "config.json").read_text())["tie_word_embeddings"] is False
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "given")), ours)


@pytest.mark.parametrize("says", ["bfloat16", "float32"])
def test_no_tensor_is_rounded_whatever_the_others_are_stored_as(says, tmp_path):
    source = build_tiny_model(tmp_path / "mixed")
    tensors = load_file(source / "model.safetensors")
    tensors = {
        name: tensor.bfloat16() if tensor.ndim > 1 else tensor + 0.1 * torch.rand_like(tensor)
        for name, tensor in tensors.items()
    }
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    edit(source / "config.json", dtype=says)
    export(source, "--to", "hf", "--out", tmp_path / "given")
    written = load_file(tmp_path / "given" / "model.safetensors")
    assert all(torch.equal(written[name], tensor) for name, tensor in tensors.items())
    assert {name: tensor.dtype for name, tensor in written.items()} == {
        name: tensor.dtype for name, tensor in tensors.items()
    }
    export(source, "--to", "gguf", "--dtype", "f32", "--out", tmp_path / "model.gguf")
    norms = {tensor.name: tensor.data for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert torch.equal(torch.from_numpy(norms["output_norm.weight"].copy()), tensors["model.norm.weight"])


def test_a_head_that_equals_the_embeddings_is_left_out_of_gguf(tmp_path):
    source = build_tiny_model(tmp_path / "tied")
    export(source, "--to", "gguf", "--out", tmp_path / "model.gguf")
    names = {tensor.name for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert "token_embd.weight" in names
    assert "output.weight" not in names


def test_rows_of_a_model_beyond_its_tokens_are_unused_tokens(tiny_qwen, tmp_path):
    export(tiny_qwen, "--to", "gguf", "--out", tmp_path / "model.gguf")
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields
    assert fields["tokenizer.ggml.tokens"].contents()[-1] == "[PAD519]"
    assert fields["tokenizer.ggml.token_type"].contents()[-1] == gguf.TokenType.UNUSED


def test_an_answer_by_way_of_gguf_is_the_answer_of_the_model(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setenv("SFT_CACHE_DIR", str(tmp_path / "cache"))
    export(tiny_model, "--to", "gguf", "--dtype", "bf16", "--out", tmp_path / "model.gguf")
    answers = [
        json.loads(invoke("generate", "hello", "-c", model, "--max-new-tokens", 6, "--json").stdout)["text"]
        for model in (tiny_model, tmp_path / "model.gguf")
    ]
    assert answers[0] == answers[1]


@pytest.mark.parametrize(("kind", "dtype"), [("f32", torch.float32), ("f16", torch.float16)])
def test_a_gguf_export_is_scored_as_the_weights_it_was_made_of(kind, dtype, trained, tmp_path, monkeypatch):
    monkeypatch.setenv("SFT_CACHE_DIR", str(tmp_path / "cache"))
    source = tmp_path / "source"
    shutil.copytree(trained / "first" / "final", source)
    weights = load_file(source / "model.safetensors")
    held = {name: tensor if tensor.ndim == 1 else tensor.to(dtype) for name, tensor in weights.items()}
    save_file(held, source / "model.safetensors", metadata={"format": "pt"})
    export(source, "--to", "gguf", "--dtype", kind, "--out", tmp_path / "model.gguf")
    rows = write_rows(tmp_path / "heldout.jsonl")
    ours, theirs = (
        json.loads(
            invoke("eval", model, "--data", rows, "--no-base", "--max-rows", 1, "--json", "--quiet").stdout
        )["tuned"]
        for model in (source, tmp_path / "model.gguf")
    )
    assert ours["loss"] == theirs["loss"]


def test_folder_of_a_run_is_complete_and_says_what_it_is(trained, tmp_path):
    out = tmp_path / "given"
    assert export("first", "--runs", trained, "--to", "hf", "--out", out)["path"] == str(out)
    assert sorted(path.name for path in out.iterdir()) == [
        "README.md", "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors",
        "sft_run.json", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    final = AutoModelForCausalLM.from_pretrained(trained / "first" / "final")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(out)), logits(final))
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "# given" in card
    assert "- rows.jsonl" in card
    assert "held-out loss (nats/token) | " in card
    assert "learning_rate = 0.01" in card


def test_exported_files_name_no_machine_and_no_path(trained, tmp_path):
    out = tmp_path / "given"
    export("first", "--runs", trained, "--to", "hf", "--out", out)
    names = [str(tmp_path), str(Path.home()) + "/", socket.gethostname(), f"/{getpass.getuser()}/"]
    # A shorter one stands in any megabyte of weights by chance.
    secrets = [name for name in names if len(name) > 3]
    for path in out.iterdir():
        content = path.read_bytes()
        for secret in secrets:
            assert secret.encode() not in content, (path.name, secret)


def test_dtype_of_the_folder_can_be_chosen(tiny_model, tmp_path):
    outcome = export(tiny_model, "--to", "hf", "--dtype", "bf16", "--out", tmp_path / "half")
    assert outcome["dtype"] == "bf16"
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "half").dtype == torch.bfloat16


def test_pt_of_a_run_is_the_file_that_the_run_wrote(rows, tmp_path):
    tokenizer = build_tiny_tokenizer(tmp_path / "tokenizer", template=None)
    pt = build_tiny_pt(tmp_path / "start.pt")
    done = invoke(
        "train", "--data", rows, "--model", pt, "--tokenizer", tokenizer, "--run", "first", "--max-steps", 4,
        "--set", f"run.root={tmp_path / 'runs'}", "--set", "training.batch_size=8",
    )  # fmt: skip
    assert done.exit_code == 0, (done.stderr, done.exception)
    out = tmp_path / "again.pt"
    export("first", "--runs", tmp_path / "runs", "--to", "pt", "--out", out)
    found, wanted = (
        torch.load(path, weights_only=True)
        for path in (out, tmp_path / "runs" / "first" / "first-sft_final.pt")
    )
    assert found.keys() == wanted.keys()
    assert (found["step"], found["run_name"]) == (4, "first-sft")
    assert all(
        torch.equal(found["model_state"][name], tensor) for name, tensor in wanted["model_state"].items()
    )
    moments = [content["optimizer_state"]["state"][0]["exp_avg"] for content in (found, wanted)]
    assert torch.equal(*moments)


def test_pt_without_a_run_holds_weights_alone(tmp_path):
    tokenizer = build_tiny_tokenizer(tmp_path / "tokenizer", template=None)
    pt, out = build_tiny_pt(tmp_path / "start.pt"), tmp_path / "copy.pt"
    export(pt, "--tokenizer", tokenizer, "--to", "pt", "--out", out)
    original, copy = read_pt(pt), read_pt(out)
    assert (copy.step, copy.run_name, copy.config) == (0, "copy", original.config)
    assert all(torch.equal(copy.model_state[name], t) for name, t in original.model_state.items())


@pytest.mark.parametrize(
    ("flags", "code"),
    [
        (["--to", "pt", "--out", "new.pt"], 2),
        (["--to", "hf", "--out", "new", "--dtype", "q8_0"], 2),
        (["--to", "hf", "--out", "."], 73),
        (["--to", "onnx", "--out", "new"], 2),
    ],
    ids=["no-pt-family", "dtype", "exists", "format"],
)
def test_what_cannot_be_written_is_refused(flags, code, tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = invoke("export", tiny_model, *flags)
    assert (getattr(result.exception, "exit_code", None) or result.exit_code) == code
    assert list(tmp_path.glob("new*")) == []


def test_gguf_of_another_family_is_refused_and_leaves_nothing(tmp_path):
    tokenizer = build_tiny_tokenizer(tmp_path / "tokenizer", template=None)
    pt = build_tiny_pt(tmp_path / "start.pt")
    result = invoke(
        "export", pt, "--tokenizer", tokenizer, "--to", "gguf", "--out", tmp_path / "out" / "x.gguf"
    )
    assert result.exception.exit_code == 2
    assert "llama, mistral, qwen2, " in result.exception.message
    assert not (tmp_path / "out").exists()


def test_tokenizer_that_cuts_words_in_an_unknown_way_is_refused(tmp_path):
    source = build_tiny_model(tmp_path / "tiny")
    content = json.loads((source / "tokenizer.json").read_text())
    content["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [{"type": "WhitespaceSplit"}, content["pre_tokenizer"]],
    }
    (source / "tokenizer.json").write_text(json.dumps(content))
    result = invoke("export", source, "--to", "gguf", "--out", tmp_path / "out" / "x.gguf")
    assert result.exception.exit_code == 2
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("form", ["hf", "gguf"])
def test_disk_that_fills_up_leaves_nothing(form, tiny_model, tmp_path):
    out = tmp_path / "out" / "model"

    def work() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        result = invoke("export", tiny_model, "--to", form, "--out", out)
        raise SystemExit(getattr(result.exception, "exit_code", 1))

    assert run_forked(work) == 74
    assert list(out.parent.iterdir()) == []


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("form", "written"),
    [("hf", "first-hf"), ("gguf", "first.gguf"), ("ollama", "first-ollama")],
)
def test_a_model_without_a_place_is_written_here_under_the_name_of_its_run(
    form, written, trained, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    result = invoke("export", trained / "first", "--to", form)
    assert result.exit_code == 0, result.exception
    assert result.stdout == f"{written}\n"
    assert (tmp_path / written).exists()
    assert (form == "ollama") == ("ollama create first-ollama -f first-ollama/Modelfile" in result.stderr)
    assert "on cpu" not in result.stderr  # nothing is computed
    assert "read as fp32" in result.stderr
    again = invoke("export", trained / "first", "--to", form)
    assert again.exit_code != 0
    assert written in str(again.exception)


def test_a_folder_for_ollama_has_template_stops_and_sampling(tiny_model, tmp_path):
    source = Path(shutil.copytree(tiny_model, tmp_path / "walnut"))
    edit(source / "generation_config.json", do_sample=True, temperature=0.25)
    out = tmp_path / "for-ollama"
    export(source, "--to", "ollama", "--out", out)
    assert sorted(path.name for path in out.iterdir()) == ["Modelfile", "README.md", "for-ollama.gguf"]
    assert "tokenizer.chat_template" in gguf.GGUFReader(out / "for-ollama.gguf").fields
    written = (out / "Modelfile").read_text(encoding="utf-8")
    assert written.startswith('FROM ./for-ollama.gguf\nTEMPLATE """{{- range .Messages }}<|im_start|>')
    assert "PARAMETER temperature 0.25\n" in written
    stops = {
        load_chat_tokenizer(source).decode([token], skip_special=False)
        for token in load_chat_tokenizer(source).stop_ids
    }
    assert stops == set(re.findall(r'PARAMETER stop "(.*)"', written))
    assert "ollama create for-ollama -f Modelfile" in (out / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("dtype", [None, "bf16"])
def test_a_folder_is_opened_again_and_computes_what_was_written(dtype, trained, tmp_path):
    flags = [] if dtype is None else ["--dtype", dtype]
    found = export("first", "--runs", trained, "--to", "hf", *flags, "--out", tmp_path / "new")["logits"]
    assert found["distance"] < 1e-5
    assert found["same"] == found["places"] > 0


def test_a_folder_with_the_right_numbers_and_another_configuration_gets_no_name(
    tiny_model, tmp_path, monkeypatch
):
    def other(content: dict[str, object]) -> dict[str, object]:
        return {**content, "rope_parameters": {"rope_type": "default", "rope_theta": 50.0}}

    monkeypatch.setattr("sftcli.modeling.formats.folder_write.with_older_keys", other)
    result = invoke("export", tiny_model, "--to", "hf", "--out", tmp_path / "out" / "new")
    assert isinstance(result.exception, StorageError)
    assert "new failed verification after writing: logits differ by" in result.exception.message
    assert list((tmp_path / "out").iterdir()) == []


def test_a_pt_file_is_opened_again(tmp_path):
    tokenizer = build_tiny_tokenizer(tmp_path / "tokenizer", template=None)
    flags = ("--tokenizer", tokenizer, "--to", "pt", "--out", tmp_path / "copy.pt")
    assert export(build_tiny_pt(tmp_path / "start.pt"), *flags)["logits"]["distance"] < 1e-5


def test_where_memory_is_short_for_a_second_model_tensors_alone_are_compared(
    tiny_model, tmp_path, monkeypatch
):
    monkeypatch.setattr("sftcli.services.export.read_back.free_memory_bytes", lambda: 1000)
    assert export(tiny_model, "--to", "hf", "--out", tmp_path / "new")["logits"] is None
    result = invoke("export", tiny_model, "--to", "hf", "--out", tmp_path / "again")
    assert "read back by its tensors alone" in result.stderr
