"""``sft export``."""

import shlex
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from sftcli.cli.options import complete
from sftcli.cli.options.groups import command
from sftcli.cli.options.shared import ModelFlags, Output, RunsRoot
from sftcli.cli.session.session import session
from sftcli.cli.terminal import tables
from sftcli.figures import size


class ExportFormat(StrEnum):
    """What a model is written as."""

    HF = "hf"
    PT = "pt"
    GGUF = "gguf"
    OLLAMA = "ollama"
    GGUF_ADAPTER = "gguf-adapter"


class Dtype(StrEnum):
    """Of the matrices in what is written."""

    F32 = "f32"
    BF16 = "bf16"
    F16 = "f16"
    Q8_0 = "q8_0"
    Q5_1 = "q5_1"
    Q5_0 = "q5_0"
    Q4_1 = "q4_1"
    Q4_0 = "q4_0"
    Q6_K = "q6_k"
    Q5_K_M = "q5_k_m"
    Q5_K_S = "q5_k_s"
    Q4_K_M = "q4_k_m"
    Q4_K_S = "q4_k_s"
    Q3_K_M = "q3_k_m"
    Q2_K = "q2_k"


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportFlags:
    """What is written, where and as what."""

    to: Annotated[
        ExportFormat,
        typer.Option(
            "--to",
            help="A Hugging Face folder, a .pt file of the Modern LLM pipeline, GGUF, a folder with GGUF for Ollama, or an adapter "
            "alone as GGUF.",
        ),
    ]
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            metavar="PATH",
            help="Folder or file to write, which must not exist; by default the model's name with the format's.",
        ),
    ] = None
    checkpoint: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL]",
            help="Run, checkpoint, folder or model name; by default the newest finished run.",
            autocompletion=complete.models,
        ),
    ] = None
    dtype: Annotated[
        Dtype | None,
        typer.Option(
            "--dtype",
            case_sensitive=False,
            help="Dtype of the weights; hf keeps the model's (f32 with a merged adapter), gguf uses f16. Those with q are for "
            "gguf, and those with k need --llama-quantize.",
        ),
    ] = None
    llama_quantize: Annotated[
        str | None,
        typer.Option(
            "--llama-quantize",
            metavar="PATH",
            help="The program llama-quantize of a llama.cpp of yours, which makes q4_k_m and the like.",
        ),
    ] = None
    accept_rounding: Annotated[
        bool,
        typer.Option(
            "--accept-rounding",
            help="Write also a GGUF that computes something else than its rounding explains.",
        ),
    ] = False
    model: Annotated[ModelFlags, "tokenizer", "base_model"]


@command
def export(
    *,
    asked: ExportFlags,
    runs: RunsRoot = Path("runs"),
    output: Annotated[Output, "json", "quiet", "log_format", "color"],
) -> None:
    """Write a model for other programs: transformers, TRL and vLLM, llama.cpp, or the Modern LLM pipeline.

    Examples:
      sft export --to hf

      sft export my-run --to gguf --dtype q8_0 --out my-model.gguf

      sft export my-run --to ollama --out my-model

      sft export my-run --to gguf --dtype q4_k_m --llama-quantize ~/llama.cpp/build/bin/llama-quantize
    """
    from sftcli.services.export.request import ExportFormat, ExportRequest, check_names, default_out

    form = ExportFormat(asked.to.value)
    parts = {"tokenizer": asked.model.tokenizer, "base_model": asked.model.base_model}
    request = ExportRequest(
        checkpoint=asked.checkpoint,
        format=form,
        out=asked.out or default_out(asked.checkpoint, form, root=runs, **parts),
        root=runs,
        dtype=None if asked.dtype is None else asked.dtype.value,
        llama_quantize=asked.llama_quantize,
        accepts_rounding=asked.accept_rounding,
        **parts,
    )
    check_names(request)
    with session(output) as current:
        with current.loading():
            from sftcli.services.export.export import run_export

        outcome = run_export(request, current)
    if output.json:
        tables.show_result_json(asdict(outcome))
        return
    if not output.quiet:
        tables.show_text(
            f"{outcome.model} as {outcome.format}, {outcome.dtype}, {size(outcome.bytes)}",
            tables.err(output.color),
        )
        if outcome.format == "ollama":
            file = shlex.quote(str(Path(outcome.path) / "Modelfile"))
            name = shlex.quote(Path(outcome.path).name)
            tables.show_text(f"next: ollama create {name} -f {file}", tables.err(output.color))
    tables.show_text(outcome.path, tables.out(output.color))
