"""``sft export``."""

from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from sftcli.cli.options import complete
from sftcli.cli.options import shared as options
from sftcli.cli.session.session import LOADING, session
from sftcli.cli.terminal import tables
from sftcli.cli.terminal.text import size


class ExportFormat(StrEnum):
    """What a model is written as."""

    HF = "hf"
    PT = "pt"
    GGUF = "gguf"


class Dtype(StrEnum):
    """Of the matrices in what is written."""

    F32 = "f32"
    BF16 = "bf16"
    F16 = "f16"
    Q8_0 = "q8_0"


def export(
    to: Annotated[
        ExportFormat,
        typer.Option("--to", help="A Hugging Face folder, a .pt file of the Modern LLM pipeline, or GGUF."),
    ],
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="PATH", help="Folder or file to write; it must not exist.")
    ],
    checkpoint: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL]",
            help="Run, checkpoint, folder or model name; the newest finished run.",
            autocompletion=complete.models,
        ),
    ] = None,
    dtype: Annotated[
        Dtype | None,
        typer.Option(
            "--dtype",
            help="Of the weights; hf keeps the model's (f32 with an adapter merged), gguf takes f16. q8_0 is for gguf.",
        ),
    ] = None,
    tokenizer: options.Tokenizer = None,
    base_model: options.BaseModel = None,
    runs: options.RunsRoot = Path("runs"),
    json: options.Json = False,
    quiet: options.Quiet = False,
    log_format: options.LogFormatChoice = None,
    color: options.ColorChoice = options.Color.AUTO,
) -> None:
    """Write a model for other programs: transformers, TRL and vLLM, llama.cpp, or the Modern LLM pipeline.

    Examples:
      sft export --to hf --out my-model

      sft export my-run --to gguf --dtype q8_0 --out my-model.gguf
    """
    output = options.Output(json=json, quiet=quiet, color=color, log_format=log_format)
    with session(output) as current:
        current.emit(LOADING)
        from sftcli.services.export import ExportFormat, ExportRequest, run_export

        request = ExportRequest(
            checkpoint=checkpoint,
            format=ExportFormat(to.value),
            out=out,
            root=runs,
            dtype=None if dtype is None else dtype.value,
            tokenizer=tokenizer,
            base_model=base_model,
        )
        outcome = run_export(request, current)
    if output.json:
        tables.show_result_json(asdict(outcome))
        return
    if not quiet:
        tables.show_text(
            f"{outcome.model} as {outcome.format}, {outcome.dtype}, {size(outcome.bytes)}", tables.err(color)
        )
    tables.show_text(outcome.path, tables.out(color))
