"""``sft generate``."""

import sys
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sftcli.cli.options import complete
from sftcli.cli.options.flags import FLAGS, MAIN_PANEL, Flags
from sftcli.cli.options.groups import command
from sftcli.cli.options.shared import ModelFlags, Output, RunsRoot
from sftcli.cli.options.to_settings import resolve_flags
from sftcli.cli.results import answers
from sftcli.cli.session.chat import chat as run_chat
from sftcli.cli.session.session import session
from sftcli.cli.terminal import tables
from sftcli.cli.terminal.text import as_utf8
from sftcli.errors import DataError, UsageError
from sftcli.figures import share_of

if TYPE_CHECKING:
    from sftcli.services.generate.gate import Gate
    from sftcli.services.generate.request import GenerateRequest
    from sftcli.services.models.reference import ModelReference
    from sftcli.services.teach.request import TeachRequest


MAX_PROMPT_CHARS = 16_000_000  # read from standard input; no model has room for as many
SAMPLING_FLAGS = (
    *("--max-new-tokens", "--temperature", "--top-p", "--top-k", "--min-p", "--repetition-penalty", "--stop"),
    replace(FLAGS["--seed"], key="sampling.seed"),
    "--precision",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class AskedFlags:
    """What is answered: a prompt, a file, or a person."""

    prompt: Annotated[str | None, typer.Argument(help="The prompt; - reads it from standard input.")] = None
    file: Annotated[
        Path | None,
        typer.Option(
            "--file",
            "-f",
            metavar="IN",
            help="Answer every row of this file, of any kind that train reads, or every line of a .txt file.",
        ),
    ] = None
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="OUT", help="Output file for --file; resumes after a kill."),
    ] = None
    min_confidence: Annotated[
        str | None,
        typer.Option(
            "--min-confidence",
            metavar="auto|P",
            help="Only answers at least this sure, 0 to 1, go to --out; auto takes the cut that sft eval found for 5% wrong "
            "answers, auto:0.02 that for 2%.",
        ),
    ] = None
    rest: Annotated[
        Path | None,
        typer.Option("--rest", metavar="FILE", help="File for the rows that --min-confidence keeps back."),
    ] = None
    chat: Annotated[bool, typer.Option("--chat", help="Chat with the model.")] = False
    base: Annotated[bool, typer.Option("--base", help="Also show the base model's answer.")] = False
    samples: Annotated[
        int, typer.Option("--samples", "-n", metavar="N", min=1, max=10_000, help="Answers per prompt.")
    ] = 1


class Keep(StrEnum):
    """Which answer to a prompt becomes a row."""

    ENDED = "ended"
    CHECK = "check"


@dataclass(frozen=True, slots=True, kw_only=True)
class TeachFlags:
    """Answers as rows to train on."""

    keep: Annotated[
        Keep | None,
        typer.Option(
            "--keep",
            help="Write rows to train on to --out: for each prompt the first answer that ended, or the first that passes --check.",
        ),
    ] = None
    checks: Annotated[
        list[str] | None,
        typer.Option(
            "--check",
            metavar="NAME",
            help="Check of --keep check, as in sft eval; by default one that fits the answers that rows have. Repeatable.",
        ),
    ] = None
    apart_from: Annotated[
        str | None,
        typer.Option(
            "--apart-from",
            metavar="RUN|FILE",
            help="Leave out prompts that nearly equal a held-out row of this run, or a row of this file.",
        ),
    ] = None
    without_system: Annotated[
        bool, typer.Option("--without-system", help="Write rows of --keep without their system message.")
    ] = False


@dataclass(frozen=True, slots=True, kw_only=True)
class AnsweringFlags:
    """Who answers, and what is put before a prompt."""

    checkpoint: Annotated[
        str | None,
        typer.Option(
            "--checkpoint",
            "-c",
            "--model",
            "-m",
            metavar="MODEL",
            autocompletion=complete.models,
            help="Run, checkpoint, folder, model name or the URL of a server; by default the newest finished run.",
            rich_help_panel=MAIN_PANEL,
        ),
    ] = None
    model: ModelFlags
    system: Annotated[
        str, typer.Option("--system", metavar="TEXT", help="System message to put before the prompt.")
    ] = ""
    ignored: Annotated[list[str] | None, FLAGS["--ignore"].option] = None
    renames: Annotated[list[str] | None, FLAGS["--map"].option] = None


@command
def generate(
    *,
    asked: AskedFlags,
    taught: TeachFlags,
    answering: AnsweringFlags,
    flags: Annotated[Flags, *SAMPLING_FLAGS],
    runs: RunsRoot = Path("runs"),
    output: Annotated[Output, "json", "quiet", "color"],
) -> None:
    """Answer a prompt, a file of prompts, or a person, with the newest run's final model or with any other.

    Examples:
      sft generate "Please ship 40 crates of walnuts to Ms Okafor in Lagos." --base

      sft generate --file prompts.jsonl --out answers.jsonl --checkpoint smollm2-135m --temperature 0.7

      sft generate --chat

      sft generate --file prompts.jsonl --out taught.jsonl --model http://localhost:8080/v1 --keep check --samples 4
    """
    _check_kind(asked, output)
    _check_taught(asked, taught)
    settings = resolve_flags(flags).settings
    text = _read_prompt(asked.prompt)

    from sftcli.services.generate.request import GenerateRequest, check_models

    request = GenerateRequest(
        prompt=text,
        sampling=settings.sampling,
        root=runs,
        precision=settings.training.precision,
        checkpoint=answering.checkpoint,
        system=as_utf8(answering.system),
        ignored=tuple(answering.ignored or ()),
        renames=tuple(answering.renames or ()),
        samples=asked.samples,
        with_base=asked.base,
        tokenizer=answering.model.tokenizer,
        base_model=answering.model.base_model,
        trusts_code=answering.model.trusts_code,
    )
    found = check_models(request)
    if asked.chat:
        run_chat(request, output)
    elif asked.file is not None and asked.out is not None:
        _answer_file(request, asked, taught, found, output)
    else:
        _answer_prompt(request, output)


def _check_kind(asked: AskedFlags, output: Output) -> None:
    """Refuse combinations that mean nothing.

    Raises:
        UsageError: There is not exactly one thing to answer, or a flag does not go with it.
    """
    if sum((asked.prompt is not None, asked.file is not None, asked.chat)) != 1:
        raise UsageError(
            "give exactly one of: a prompt, --file or --chat",
            hint='sft generate "your prompt", or sft generate --file prompts.jsonl --out answers.jsonl',
        )
    if (asked.file is None) != (asked.out is None):
        raise UsageError("--file and --out go together", hint="pass both")
    if (asked.min_confidence is None) != (asked.rest is None) or (asked.rest and asked.file is None):
        raise UsageError(
            "--min-confidence and --rest go together, with --file and --out",
            hint="--min-confidence auto --rest for-people.jsonl",
        )
    if asked.rest is not None and (asked.base or asked.samples > 1):
        raise UsageError("--min-confidence needs one answer a row", hint="leave out --base and --samples")
    if asked.chat and (asked.base or asked.samples > 1 or output.json):
        raise UsageError(
            "--chat uses one model and one answer per turn", hint="leave out --base, --samples and --json"
        )


def _check_taught(asked: AskedFlags, taught: TeachFlags) -> None:
    """Refuse flags of rows where no rows are written.

    Raises:
        UsageError: There is such a flag.
    """
    if taught.keep is not None and (asked.file is None or asked.base or asked.rest is not None):
        raise UsageError(
            "--keep needs --file, and excludes --base and --rest", hint="pass --file and --out alone"
        )
    if taught.keep is None and taught.without_system:
        raise UsageError("--without-system needs --keep", hint="pass --keep ended, or --keep check")
    if taught.keep is not Keep.CHECK and taught.checks:
        raise UsageError("--check needs --keep check", hint="pass both")
    if taught.apart_from is not None and asked.file is None:
        raise UsageError("--apart-from needs --file", hint="pass both")


def _gated(
    request: "GenerateRequest", asked: AskedFlags, found: "ModelReference"
) -> "tuple[GenerateRequest, Gate | None]":
    """Return which answers go out, if not all, and the request that makes them as that needs."""
    if asked.min_confidence is None or asked.rest is None or asked.out is None:
        return request, None
    from sftcli.services.generate.gate import as_evaluated, check_rest, find_gate, parse_confidence

    check_rest(asked.rest, asked.out)
    gate = find_gate(parse_confidence(asked.min_confidence), asked.rest, request, found)
    return as_evaluated(request, gate), gate


def _read_prompt(prompt: str | None) -> str:
    if prompt != "-":
        return as_utf8(prompt or "")
    if sys.stdin is None:
        raise UsageError("standard input is closed", hint="pass the prompt as an argument")
    try:
        text = as_utf8(sys.stdin.read(MAX_PROMPT_CHARS + 1))
    except UnicodeError:
        raise DataError("the prompt on standard input is not UTF-8", hint="send it as UTF-8") from None
    if len(text) > MAX_PROMPT_CHARS:
        raise DataError(
            f"the prompt on standard input has more than {MAX_PROMPT_CHARS} characters",
            hint="send a shorter one; many prompts go into a file: --file FILE",
        )
    return text


def _answer_prompt(request: "GenerateRequest", output: Output) -> None:
    from sftcli.services.generate.request import require_prompt

    require_prompt(request)
    with session(output) as current:
        with current.loading():
            from sftcli.services.generate.prompt import run_generation

        emit = current.emit if output.json else answers.with_text(current.emit)
        completions = run_generation(request, emit, current.stop)
    answers.show_completions(completions, request, output)
    if current.stop.requested():
        raise typer.Exit(current.stop.exit_code)


def _taught(request: "GenerateRequest", asked: AskedFlags, taught: TeachFlags) -> "TeachRequest | None":
    """Return what becomes of answers, if they become rows.

    Raises:
        UsageError, NotFoundError: There is no such check.
    """
    if taught.keep is None or asked.file is None:
        return None
    from sftcli.services.teach.request import Keep, TeachRequest

    teach = TeachRequest(
        keep=Keep(taught.keep.value),
        file=asked.file,
        checks=tuple(taught.checks or ()),
        with_system=not taught.without_system,
        ignored=request.ignored,
        renames=request.renames,
    )
    assert teach.check_names
    return teach


def _answer_file(
    request: "GenerateRequest",
    asked: AskedFlags,
    taught: TeachFlags,
    found: "ModelReference",
    output: Output,
) -> None:
    from sftcli.services.generate.prompt_file import check_out, read_prompts
    from sftcli.services.runs.lock import OutputLock

    assert asked.file is not None
    assert asked.out is not None
    out = asked.out
    check_out(out)
    OutputLock(out).require_free()
    request, gate = _gated(request, asked, found)
    teach = _taught(request, asked, taught)
    held = None
    if taught.apart_from is not None:
        from sftcli.services.teach.request import held_place

        held = held_place(taught.apart_from, request.root)
    prompts = read_prompts(
        asked.file, system=request.system, ignored=request.ignored, renames=request.renames
    )
    with session(output) as current:
        with current.loading():
            from sftcli.services.generate.file import run_file_generation

        if held is not None:
            from sftcli.services.teach.apart import prompts_apart

            prompts = prompts_apart(prompts, held, current)
        maker = None
        if teach is not None:
            from sftcli.services.teach.rows import TaughtRows

            maker = TaughtRows(teach, prompts, current.emit)
        outcome = run_file_generation(request, prompts, out, current.emit, current.stop, gate, maker)
    if gate is not None and outcome.is_whole and not output.quiet:
        sure = outcome.prompts - outcome.unsure
        promise = f"; {gate.promise}" if gate.promise else ""
        text = f"{share_of(sure, outcome.prompts)} answers are sure enough, the others are in {outcome.rest}{promise}"
        tables.show_text(text, tables.err(output.color), wrap=True)
    if output.json:
        tables.show_result_json(asdict(outcome))
    elif outcome.is_whole:
        tables.show_text(outcome.out, tables.out(output.color))
    else:
        tables.show_text("stopped; repeat the command to continue", tables.err(output.color))
    if not outcome.is_whole:
        raise typer.Exit(current.stop.exit_code)
