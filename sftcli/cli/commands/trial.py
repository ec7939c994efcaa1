"""``sft try``."""

import shlex
from dataclasses import dataclass
from typing import Annotated

import typer

from sftcli.cli.options import complete
from sftcli.cli.options.flags import ROW_FLAGS, Flags, PrecisionChoice
from sftcli.cli.options.groups import command
from sftcli.cli.options.shared import Output
from sftcli.cli.options.to_settings import Layers, or_default_preset, resolve_for_training
from sftcli.cli.results import trial as trial_view
from sftcli.cli.session.session import LOADING, session
from sftcli.cli.terminal import tables


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptFlags:
    """How many questions are asked, and what stands in front of them."""

    shots: Annotated[
        int,
        typer.Option(
            "--shots",
            metavar="N",
            min=0,
            help="Training rows before each question; fewer where they do not fit. 0 asks with the prompt alone.",
        ),
    ] = 8
    max_rows: Annotated[
        int,
        typer.Option("--max-rows", metavar="N", min=1, help="Maximum number of held-out rows to ask."),
    ] = 60
    max_prompt_tokens: Annotated[
        int,
        typer.Option(
            "--max-prompt-tokens",
            metavar="N",
            min=1,
            help="Maximum length of a prompt with examples, within what the model can read.",
        ),
    ] = 4096
    batch_size: Annotated[
        int | None,
        typer.Option("--batch-size", metavar="N", min=1, help="Questions asked at once."),
    ] = None
    precision: Annotated[
        PrecisionChoice,
        typer.Option("--precision", help="Precision of matrix products; fp32 is that of sft eval."),
    ] = PrecisionChoice.FP32


@command
def trial(
    *,
    sources: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="DATA...",
            help="Files, folders or hub names, each SOURCE[:ROWS]; without any, the rows of the preset `quick`.",
            autocompletion=complete.rows,
        ),
    ] = None,
    asked: PromptFlags,
    layers: Layers,
    flags: Annotated[
        Flags, "--heldout", "--model", "--tokenizer", "--trust-remote-code", "--seed", *ROW_FLAGS
    ],
    output: Annotated[Output, "json", "quiet", "color"],
) -> None:
    """Is fine-tuning needed? Ask the untrained model held-out rows, without examples and with training rows as examples.

    Examples:
      sft try

      sft try rows.jsonl --model smollm2-135m

      sft try rows.jsonl --shots 4 --max-rows 200

      sft try rows.jsonl --model openai=http://localhost:8080/v1
    """
    flags = flags.with_value("--data", sources)
    resolved = resolve_for_training(flags, or_default_preset(layers, flags))
    from sftcli.services.evaluate.trial.serving import without_server
    from sftcli.services.train.start.early import check_inputs

    settings, server = without_server(resolved.settings)
    check_inputs(settings)
    with session(output) as current:
        current.note(resolved.notices)
        current.emit(LOADING)
        from sftcli.services.evaluate.trial.trial import TrialRequest, run_trial

        request = TrialRequest(
            settings=settings,
            server=server,
            shots=asked.shots,
            max_rows=asked.max_rows,
            max_prompt_tokens=asked.max_prompt_tokens,
            precision=asked.precision.value,
            batch_size=asked.batch_size,
        )
        report = run_trial(request, current)
    own = flags if server is None else flags.with_value("--model", None).with_value("--tokenizer", None)
    train = shlex.join(["sft", "train", *own.words(), *layers.words()])
    if output.json:
        tables.show_result_json({**report.to_json(), "train_command": train})
    else:
        trial_view.show_trial(report, train, output)
