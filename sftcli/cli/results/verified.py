"""What a running server does otherwise than the model it was given."""

from typing import TYPE_CHECKING

from sftcli.cli.options import shared as options
from sftcli.cli.terminal import tables
from sftcli.figures import counted

if TYPE_CHECKING:
    from sftcli.services.verify.verify import VerifyReport

_PROMPTS = {
    "ids": "prompts are compared token by token",
    "text": "prompts are compared as text: the server tells no tokens",
    "counts": "the server tells no tokens of a prompt, so their number is compared",
    "none": "the server tells nothing of prompts, so answers alone are compared",
}


def show_verified(report: "VerifyReport", output: options.Output) -> None:
    """Print what was compared, and under each difference the first conversation that shows it."""
    out, err = tables.out(output.color), tables.err(output.color)
    if not output.quiet:
        tables.show_text(_PROMPTS[report.prompts], err, wrap=True)
        if report.mean_logprob_difference is not None:
            text = (
                f"log-probabilities of {counted(report.compared_tokens, 'token')} are "
                f"{report.mean_logprob_difference:.3f} nats off on average"
            )
            tables.show_text(text, err, wrap=True)
        if report.ties:
            text = (
                f"{counted(report.ties, 'answer')} went another way where rounding decides between two tokens"
            )
            tables.show_text(text, err, wrap=True)
    for finding in report.findings:
        tables.show_text(str(finding), out, wrap=True)
        if finding.detail:
            tables.show_text(f"  {finding.origin}: {finding.detail}", out, wrap=True)
    if report.is_same:
        told = "answers" if report.prompts == "none" else "prompts and answers"
        tables.show_text(
            f"{report.server} gives the {told} of {report.model}: {report.asked} of {report.asked}",
            out,
            wrap=True,
        )
