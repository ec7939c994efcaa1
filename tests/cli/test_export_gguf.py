"""GGUF as people run it: quantized, by a program of llama.cpp, an adapter alone; announced when its logits are the model's."""

import json
import stat
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from sftcli.cli.app import app
from sftcli.errors import NotFoundError, OutputError, StoppedError, UsageError
from sftcli.events import NeverStop, Session, unheard
from sftcli.services.export.llama_quantize import quantize
from tests.support.foreign_adapter import foreign_adapter
from tests.support.tiny_model import build_tiny_model


def invoke(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def export(*arguments: object) -> dict:
    result = invoke("export", *arguments, "--json")
    assert result.exit_code == 0, (result.stderr, result.exception)
    return json.loads(result.stdout)


def tensors_of(path: Path) -> dict[str, np.ndarray]:
    return {
        tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type)
        for tensor in gguf.GGUFReader(path).tensors
    }


@pytest.fixture
def brittle(tmp_path: Path) -> Path:
    """A model that blocks of four bits break: a number of each block is so large that the others vanish beside it."""
    folder = build_tiny_model(tmp_path / "brittle")
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for layer in model.model.layers:
            for gain, of in (("input_layernorm", layer.self_attn), ("post_attention_layernorm", layer.mlp)):
                getattr(layer, gain).weight[::32] /= 1000
                for name in {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"} & dict(
                    of.named_children()
                ).keys():
                    getattr(of, name).weight[:, ::32] *= 1000
            layer.mlp.down_proj.weight *= 20
            layer.self_attn.o_proj.weight *= 20
    model.save_pretrained(folder)
    return folder


def test_a_quantization_that_breaks_the_model_is_refused_unless_the_user_says_otherwise(
    brittle: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out" / "small.gguf"
    flags = (brittle, "--to", "gguf", "--dtype", "q4_0", "--out", out)
    refused = invoke("export", *flags)
    assert isinstance(refused.exception, OutputError)
    assert "--accept-rounding" in refused.exception.hint
    assert list(out.parent.iterdir()) == []
    written = export(*flags, "--accept-rounding")
    assert written["logits"]["distance"] > written["logits"]["limit"]
    assert out.stat().st_size == written["bytes"]
    assert export(brittle, "--to", "gguf", "--out", tmp_path / "a.gguf")["logits"]["distance"] < 2e-3


def test_what_was_measured_is_told(tiny_model: Path, tmp_path: Path) -> None:
    result = invoke("export", tiny_model, "--to", "gguf", "--dtype", "Q5_1", "--out", tmp_path / "a.gguf")
    assert result.exit_code == 0, result.exception
    assert "read back: logits differ by" in result.stderr


def test_the_modelfile_names_the_quantized_file(tiny_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "small"
    assert export(tiny_model, "--to", "ollama", "--dtype", "q4_1", "--out", out)["dtype"] == "q4_1"
    named = (out / "Modelfile").read_text(encoding="utf-8").splitlines()[0].removeprefix("FROM ./")
    assert (
        gguf.GGUFReader(out / named).fields["general.file_type"].contents() == gguf.LlamaFileType.MOSTLY_Q4_1
    )


# A program of llama.cpp

_PROGRAM = """\
#!{python}
import shutil, sys
source, target, kind = sys.argv[1:]
{body}
"""


def program(folder: Path, body: str) -> Path:
    path = folder / "llama-quantize"
    path.write_text(_PROGRAM.format(python=sys.executable, body=body), encoding="utf-8")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def test_the_program_is_given_a_file_in_16_bits_and_what_it_makes_is_read_back(
    tiny_model: Path, tmp_path: Path
) -> None:
    tool = program(tmp_path, "shutil.copy(source, target); open(sys.argv[0] + '.told', 'w').write(kind)")
    out = tmp_path / "out" / "small.gguf"
    written = export(tiny_model, "--to", "gguf", "--dtype", "Q4_K_M", "--llama-quantize", tool, "--out", out)
    assert written["dtype"] == "q4_k_m"
    assert written["logits"]["distance"] < 2e-3  # this one has quantized nothing
    assert Path(f"{tool}.told").read_text() == "Q4_K_M"
    assert [path.name for path in out.parent.iterdir()] == ["small.gguf"]
    kinds = {tensor.tensor_type.name for tensor in gguf.GGUFReader(out).tensors}
    assert kinds == {"F32", "F16"}


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("print('bad imatrix', file=sys.stderr); sys.exit(3)", "failed with 3: bad imatrix"),
        ("pass", "has written nothing"),
        ("open(target, 'wb').write(b'GGUF' + bytes(9))", "cannot be read back"),
        ("data = open(source, 'rb').read(); open(target, 'wb').write(data[:-9000] + bytes(9000))", "something else"),
    ],
    ids=["fails", "nothing", "damaged", "other"],
)  # fmt: skip
def test_a_program_that_fails_leaves_nothing_and_is_told_of(
    body: str, words: str, tiny_model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out" / "small.gguf"
    tool = program(tmp_path, body)
    result = invoke(
        "export", tiny_model, "--to", "gguf", "--dtype", "q6_k", "--llama-quantize", tool, "--out", out
    )
    assert words in result.exception.message
    assert list(out.parent.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "kind", "words"),
    [
        (["--dtype", "q4_k_m"], UsageError, "none is named"),
        (["--dtype", "q4_0", "--llama-quantize", "true"], UsageError, "--dtype is q4_0"),
        (["--dtype", "q4_k_m", "--llama-quantize", "./missing"], NotFoundError, "no such program"),
    ],
)
def test_slips_about_the_program_are_told_before_anything_is_loaded(
    flags: list[str], kind: type, words: str, tiny_model: Path, tmp_path: Path
) -> None:
    result = invoke("export", tiny_model, "--to", "gguf", *flags, "--out", tmp_path / "a.gguf")
    assert isinstance(result.exception, kind)
    assert words in result.exception.message


def test_a_stop_ends_the_program(tmp_path: Path) -> None:
    class Now(NeverStop):
        def requested(self) -> bool:
            return True

    tool = program(tmp_path, "import time; time.sleep(60)")
    with pytest.raises(StoppedError):
        quantize(
            str(tool), tmp_path / "a", tmp_path / "b", kind="q6_k", session=Session(emit=unheard, stop=Now())
        )


# An adapter alone

LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"rank_pattern": {"k_proj": 2}}], ids=str)
def test_a_base_with_the_matrices_of_an_adapter_is_the_merged_model(
    settings: dict, tiny_model: Path, tmp_path: Path
) -> None:
    adapter = foreign_adapter(
        tiny_model, tmp_path / "adapter", r=4, lora_alpha=6, target_modules=LAYERS, **settings
    )
    f32 = ("--dtype", "f32")
    export(tiny_model, "--to", "gguf", *f32, "--out", tmp_path / "base.gguf")
    export(adapter, "--to", "gguf", *f32, "--out", tmp_path / "merged.gguf")
    found = export(adapter, "--to", "gguf-adapter", "--out", tmp_path / "adapter.gguf")
    assert (found["dtype"], found["format"]) == ("f32", "gguf-adapter")
    assert found["logits"]["distance"] < 1e-5
    fields = gguf.GGUFReader(tmp_path / "adapter.gguf").fields
    assert {key: fields[key].contents() for key in (
        "general.type", "general.architecture", "adapter.type", "adapter.lora.alpha"
    )} == {
        "general.type": "adapter", "general.architecture": "llama", "adapter.type": "lora", "adapter.lora.alpha": 6.0
    }  # fmt: skip
    base, merged, pairs = (tensors_of(tmp_path / f"{name}.gguf") for name in ("base", "merged", "adapter"))
    changed = {name.removesuffix(".lora_a") for name in pairs if name.endswith(".lora_a")}
    assert len(changed) == 2 * len(LAYERS)
    for name, weight in base.items():
        if name in changed:  # as llama.cpp adds it
            a, b = pairs[f"{name}.lora_a"], pairs[f"{name}.lora_b"]
            weight = weight + 6.0 / len(a) * (b @ a)
        np.testing.assert_allclose(weight, merged[name], atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"use_dora": True}, "magnitudes of DoRA"),
        ({"trainable_token_indices": [5, 7]}, "rows of new tokens"),
        ({"modules_to_save": ["norm"]}, "has model.layers.0.input_layernorm.weight"),
    ],
)
def test_what_an_adapter_of_llama_cpp_cannot_have_is_refused_by_name(
    settings: dict, words: str, tiny_model: Path, tmp_path: Path
) -> None:
    adapter = foreign_adapter(tiny_model, tmp_path / "adapter", r=4, target_modules=["q_proj"], **settings)
    result = invoke("export", adapter, "--to", "gguf-adapter", "--out", tmp_path / "out" / "a.gguf")
    assert isinstance(result.exception, UsageError), result.exception
    assert words in result.exception.message
    assert list((tmp_path / "out").iterdir()) == []


def test_a_whole_model_is_no_adapter(tiny_model: Path, tmp_path: Path) -> None:
    result = invoke("export", tiny_model, "--to", "gguf-adapter", "--out", tmp_path / "a.gguf")
    assert "no adapter" in result.exception.message
