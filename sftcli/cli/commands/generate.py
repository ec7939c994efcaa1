"""``sft generate``."""

import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sftcli.cli.options import data as data_options
from sftcli.cli.options import sampling as sampling_options
from sftcli.cli.options import shared as options
from sftcli.cli.options.to_settings import resolve_flags
from sftcli.cli.results import answers
from sftcli.cli.session.chat import chat as run_chat
from sftcli.cli.session.session import LOADING, session
from sftcli.cli.terminal import tables
from sftcli.cli.terminal.text import as_utf8
from sftcli.errors import DataError, UsageError

if TYPE_CHECKING:
    from sftcli.services.generate.prompt import GenerateRequest


def generate(
    prompt: Annotated[str | None, typer.Argument(help="What to ask; - reads it from standard input.")] = None,
    file: Annotated[
        Path | None,
        typer.Option("--file", "-f", metavar="IN", help="Answer every line of this .jsonl or .txt file."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", metavar="OUT", help="Where the answers to --file go; resumes after a kill."
        ),
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Talk with the model, turn by turn.")] = False,
    base: Annotated[
        bool, typer.Option("--base", help="Show the answer of the model before training too.")
    ] = False,
    samples: Annotated[
        int, typer.Option("--samples", "-n", metavar="N", min=1, help="Answers per prompt.")
    ] = 1,
    checkpoint: options.Checkpoint = None,
    tokenizer: options.Tokenizer = None,
    base_model: options.BaseModel = None,
    trust_remote_code: options.TrustRunCode = False,
    system: Annotated[
        str, typer.Option("--system", metavar="TEXT", help="System message to put before the prompt.")
    ] = "",
    ignored: data_options.Ignore = None,
    max_new_tokens: sampling_options.MaxNewTokens = None,
    temperature: sampling_options.Temperature = None,
    top_p: sampling_options.TopP = None,
    top_k: sampling_options.TopK = None,
    min_p: sampling_options.MinP = None,
    repetition_penalty: sampling_options.RepetitionPenalty = None,
    stop_text: sampling_options.StopText = None,
    seed: options.Seed = None,
    precision: sampling_options.Precision = None,
    runs: options.RunsRoot = Path("runs"),
    json: options.Json = False,
    quiet: options.Quiet = False,
    color: options.ColorChoice = options.Color.AUTO,
) -> None:
    """Answer a prompt, a file of prompts, or a person, with the newest run's final model or with any other.

    Examples:
      sft generate "Please ship 40 crates of walnuts to Ms Okafor in Lagos." --base

      sft generate --file prompts.jsonl --out answers.jsonl --checkpoint smollm2-135m --temperature 0.7

      sft generate --chat
    """
    output = options.Output(json=json, quiet=quiet, color=color)
    _check_kind(prompt, file, out, chat=chat, base=base, samples=samples, json=json)
    settings = resolve_flags(
        preset=None,
        config=None,
        sets=None,
        flags={
            "sampling.max_new_tokens": ("--max-new-tokens", max_new_tokens),
            "sampling.temperature": ("--temperature", temperature),
            "sampling.top_p": ("--top-p", top_p),
            "sampling.top_k": ("--top-k", top_k),
            "sampling.min_p": ("--min-p", min_p),
            "sampling.repetition_penalty": ("--repetition-penalty", repetition_penalty),
            "sampling.stop": ("--stop", stop_text or None),
            "sampling.seed": ("--seed", seed),
            "training.precision": ("--precision", None if precision is None else precision.value),
        },
    ).settings
    text = _read_prompt(prompt)

    def build() -> "GenerateRequest":
        from sftcli.services.generate.prompt import GenerateRequest

        return GenerateRequest(
            prompt=text,
            sampling=settings.sampling,
            root=runs,
            precision=settings.training.precision,
            checkpoint=checkpoint,
            system=as_utf8(system),
            ignored=tuple(ignored or ()),
            samples=samples,
            with_base=base,
            tokenizer=tokenizer,
            base_model=base_model,
            trusts_code=trust_remote_code,
        )

    if chat:
        run_chat(build, output)
    elif file is not None and out is not None:
        _answer_file(build, file, out, output)
    else:
        _answer_prompt(build, output)


def _check_kind(
    prompt: str | None,
    file: Path | None,
    out: Path | None,
    *,
    chat: bool,
    base: bool,
    samples: int,
    json: bool,
) -> None:
    """Refuse combinations that mean nothing.

    Raises:
        UsageError: There is not exactly one thing to answer, or a flag does not go with it.
    """
    if sum((prompt is not None, file is not None, chat)) != 1:
        raise UsageError(
            "there must be one thing to answer: a prompt, --file or --chat",
            hint='sft generate "your prompt", or sft generate --file prompts.jsonl --out answers.jsonl',
        )
    if (file is None) != (out is None):
        raise UsageError("--file and --out go together", hint="pass both")
    if chat and (base or samples > 1 or json):
        raise UsageError(
            "--chat talks with one model, once a turn", hint="leave out --base, --samples and --json"
        )


def _read_prompt(prompt: str | None) -> str:
    if prompt != "-":
        return as_utf8(prompt or "")
    if sys.stdin is None:
        raise UsageError("standard input is closed", hint="pass the prompt as an argument")
    try:
        return as_utf8(sys.stdin.read())
    except UnicodeError:
        raise DataError("the prompt on standard input is not UTF-8", hint="send it as UTF-8") from None


def _answer_prompt(build: Callable[[], "GenerateRequest"], output: options.Output) -> None:
    with session(output) as current:
        current.emit(LOADING)
        from sftcli.services.generate.prompt import run_generation

        request = build()
        emit = current.emit if output.json else answers.with_text(current.emit)
        completions = run_generation(request, emit, current.stop)
    answers.show_completions(completions, request, output)
    if current.stop.requested():
        raise typer.Exit(current.stop.exit_code)


def _answer_file(
    build: Callable[[], "GenerateRequest"], source: Path, out: Path, output: options.Output
) -> None:
    with session(output) as current:
        current.emit(LOADING)
        from sftcli.services.generate.file import run_file_generation

        outcome = run_file_generation(build(), source, out, current.emit, current.stop)
    if output.json:
        tables.show_result_json(asdict(outcome))
    elif outcome.is_whole:
        tables.show_text(outcome.out, tables.out(output.color))
    else:
        tables.show_text("stopped; the same command goes on where it was", tables.err(output.color))
    if not outcome.is_whole:
        raise typer.Exit(current.stop.exit_code)
