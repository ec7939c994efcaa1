"""``sft export``."""

import shlex
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sftcli.cli.options import complete
from sftcli.cli.options.groups import command
from sftcli.cli.options.shared import ModelFlags, Output, RunsRoot
from sftcli.cli.results.verified import show_verified
from sftcli.cli.session.session import session
from sftcli.cli.terminal import tables
from sftcli.errors import ThresholdError, UsageError
from sftcli.figures import size

if TYPE_CHECKING:
    from sftcli.services.export.export import ExportOutcome
    from sftcli.services.verify.request import VerifyRequest
    from sftcli.services.verify.verify import VerifyReport


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
        ExportFormat | None,
        typer.Option(
            "--to",
            help="A Hugging Face folder, a .pt file of the Modern LLM pipeline, GGUF, a folder with GGUF for Ollama, or an adapter "
            "alone as GGUF.",
        ),
    ] = None
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
    server: Annotated[
        str | None,
        typer.Option(
            "--verify-server",
            metavar="KIND=URL",
            help="Ask a running server, llama.cpp=URL, vllm=URL, openai=URL or ollama=NAME, held-out conversations of the run "
            "and compare prompts and answers with ours; a difference ends with 3. Without --to nothing is written.",
        ),
    ] = None
    server_rows: Annotated[
        int,
        typer.Option(
            "--verify-rows", metavar="N", min=1, help="Maximum number of conversations for --verify-server."
        ),
    ] = 20


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

      sft export my-run --verify-server llama.cpp=http://localhost:8080
    """
    verification = _verification(asked, runs)
    outcome = None if asked.to is None else _write(asked, asked.to, runs, output)
    document: dict[str, object] = {} if outcome is None else asdict(outcome)
    if verification is not None:
        report = _verify(verification, output)
        document |= {"verified": report.to_json()}
    if output.json:
        tables.show_result_json(document)


def _verification(asked: ExportFlags, runs: Path) -> "VerifyRequest | None":
    """Return what is compared, if anything is.

    Raises:
        UsageError: Nothing is asked for, or there is no such server.
        NotFoundError: There is no such model.
    """
    if asked.server is None:
        if asked.to is None:
            raise UsageError(
                f"missing option '--to': one of {', '.join(ExportFormat)}",
                hint="name a format; or compare with a running server: --verify-server KIND=URL",
            )
        return None
    if asked.to is None and (asked.out is not None or asked.dtype is not None):
        raise UsageError("--out and --dtype need --to", hint="name a format, such as --to gguf")
    from sftcli.services.server.address import parse_server
    from sftcli.services.verify.request import VerifyRequest, check_names

    request = VerifyRequest(
        checkpoint=asked.checkpoint,
        server=parse_server(asked.server),
        root=runs,
        rows=asked.server_rows,
        base_model=asked.model.base_model,
    )
    check_names(request)
    return request


def _write(asked: ExportFlags, to: ExportFormat, runs: Path, output: Output) -> "ExportOutcome":
    """Write the model and say where."""
    from sftcli.services.export.request import ExportFormat, ExportRequest, check_names, default_out

    form = ExportFormat(to.value)
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
        return outcome
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
    return outcome


def _verify(request: "VerifyRequest", output: Output) -> "VerifyReport":
    """Compare, and say what differs.

    Raises:
        ThresholdError: Something does.
    """
    with session(output) as current:
        with current.loading():
            from sftcli.services.verify.verify import run_verification

        report = run_verification(request, current)
    if not output.json:
        show_verified(report, output)
    if not report.is_same:
        raise ThresholdError("; ".join(map(str, report.findings)))
    return report
