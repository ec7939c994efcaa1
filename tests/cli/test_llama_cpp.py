"""llama.cpp itself, where ``llama-cpp-python`` is installed: it computes from our files what their models do."""

import json
import sys
from itertools import islice
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from sftcli.cli.app import app
from sftcli.data.general.general import general_texts
from sftcli.modeling.tokenizer.files import read_tokenizer_files
from tests.support.foreign_adapter import foreign_adapter

llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")

TOKENS = 12
PROMPTS = [text.question for text in general_texts() if text.question][:20]
LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
_PROGRAM = """\
#!{python}
import sys
sys.path[:] = {path}
import llama_cpp
from gguf import LlamaFileType
source, target, kind = sys.argv[1:]
asked = llama_cpp.llama_model_quantize_default_params()
asked.ftype = LlamaFileType["MOSTLY_" + kind]
sys.exit(llama_cpp.llama_model_quantize(source.encode(), target.encode(), asked))
"""


def export(*arguments: object) -> dict:
    result = CliRunner().invoke(app, ["export", *map(str, arguments), "--json"])
    assert result.exit_code == 0, (result.stderr, result.exception)
    return json.loads(result.stdout)


def opened(path: Path, **more: object):
    return llama_cpp.Llama(
        str(path), n_ctx=256, n_batch=256, logits_all=True, verbose=False, type_k=llama_cpp.GGML_TYPE_F32,
        type_v=llama_cpp.GGML_TYPE_F32, **more,
    )  # fmt: skip


def prompts(model: Path) -> list[list[int]]:
    tokenizer = read_tokenizer_files(model).tokenizer
    return [tokenizer.encode(text).ids for text in PROMPTS]


def answers(llama, asked: list[list[int]]) -> list[list[int]]:
    """Return the likeliest tokens behind each prompt."""
    found = []
    for ids in asked:
        llama.reset()
        found.append(list(islice(llama.generate(ids, temp=0.0, repeat_penalty=1.0), TOKENS)))
    return found


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}], ids=["lora", "rslora"])
def test_base_and_adapter_give_the_answers_of_the_merged_model(
    settings: dict, tiny_model: Path, tmp_path: Path
) -> None:
    adapter = foreign_adapter(
        tiny_model, tmp_path / "adapter", r=4, lora_alpha=16, target_modules=LAYERS, **settings
    )
    f32 = ("--dtype", "f32")
    export(tiny_model, "--to", "gguf", *f32, "--out", tmp_path / "base.gguf")
    export(adapter, "--to", "gguf", *f32, "--out", tmp_path / "merged.gguf")
    export(adapter, "--to", "gguf-adapter", "--out", tmp_path / "adapter.gguf")
    asked = prompts(tiny_model)
    merged = answers(opened(tmp_path / "merged.gguf"), asked)
    both = answers(opened(tmp_path / "base.gguf", lora_path=str(tmp_path / "adapter.gguf")), asked)
    alone = answers(opened(tmp_path / "base.gguf"), asked)
    assert len(merged) == 20
    assert both == merged
    assert sum(one != other for one, other in zip(alone, merged, strict=True)) > 10  # it changes something


@pytest.mark.parametrize(("kind", "most"), [("f32", 1e-4), ("q8_0", 0.1), ("q5_1", 0.4), ("q4_0", 0.8)])
def test_a_quantized_file_is_computed_as_it_was_measured(
    kind: str, most: float, tiny_model: Path, tmp_path: Path
) -> None:
    found = export(tiny_model, "--to", "gguf", "--dtype", kind, "--out", tmp_path / "a.gguf")["logits"]
    assert found["distance"] <= most
    model, llama = AutoModelForCausalLM.from_pretrained(tiny_model), opened(tmp_path / "a.gguf")
    apart = []
    for ids in prompts(tiny_model):
        llama.reset()
        llama.eval(ids)
        theirs = torch.tensor(llama.scores[: len(ids)])
        with torch.no_grad():
            ours = model(torch.tensor([ids])).logits[0]
        apart.append((theirs - ours).norm(dim=-1) / (ours - ours.mean(-1, keepdim=True)).norm(dim=-1))
    # llama.cpp rounds what goes into a quantized product as well, to eight bits.
    assert float(torch.cat(apart).median()) <= most


@pytest.mark.parametrize("kind", ["q4_k_m", "q6_k"])
def test_k_quants_by_llama_cpp_are_read_back(kind: str, tiny_model: Path, tmp_path: Path) -> None:
    program = tmp_path / "llama-quantize"
    program.write_text(_PROGRAM.format(python=sys.executable, path=sys.path), encoding="utf-8")
    program.chmod(0o755)
    found = export(
        tiny_model, "--to", "gguf", "--dtype", kind, "--llama-quantize", program, "--out", tmp_path / "a.gguf"
    )
    assert 1e-3 < found["logits"]["distance"] <= found["logits"]["limit"]
