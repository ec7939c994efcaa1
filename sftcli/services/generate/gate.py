"""Which answers of a file go out, and which are left for people: a cut in the model's own confidence."""

from dataclasses import dataclass
from pathlib import Path

from sftcli import storage
from sftcli.config.schema.training import Precision
from sftcli.errors import MismatchError, UsageError
from sftcli.json_files import read_json_or_nothing
from sftcli.services.generate.request import GenerateRequest
from sftcli.services.models.reference import ModelReference
from sftcli.services.runs.folder import RunFolder, read_settings

AUTO = "auto"
AUTO_WRONG = 0.05  # share of wrong answers that ``auto`` allows


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """Answers that end by themselves with at least this confidence go out; all others go to the file ``rest``."""

    min_confidence: float
    rest: Path
    promise: str = ""  # what is known of the answers above it, where they are computed in ``precision``
    precision: str = ""

    def lets_out(self, confidence: float, finish: str) -> bool:
        """Return whether an answer goes out."""
        return finish == "stop" and confidence >= self.min_confidence


@dataclass(frozen=True, slots=True, kw_only=True)
class AskedConfidence:
    """What ``--min-confidence`` names: a confidence, or the share of wrong answers whose cut ``sft eval`` chose."""

    confidence: float | None
    wrong_at_most: float = AUTO_WRONG


def parse_confidence(text: str) -> AskedConfidence:
    """Read ``0.98``, ``auto`` or ``auto:0.02``.

    Raises:
        UsageError: It is none of these.
    """
    word, colon, share = text.partition(":")
    try:
        number = AUTO_WRONG if text == AUTO else float(share if colon else text)
    except ValueError:
        number = -1.0
    if not 0 <= number <= 1 or (colon and word != AUTO):
        raise UsageError(
            f"--min-confidence {text}: expected auto, auto:SHARE or a number from 0 to 1",
            hint="such as auto:0.02, for at most 2% wrong answers",
        )
    if word == AUTO:
        return AskedConfidence(confidence=None, wrong_at_most=number)
    return AskedConfidence(confidence=number)


def find_gate(asked: AskedConfidence, rest: Path, request: GenerateRequest, found: ModelReference) -> Gate:
    """Return the cut that is asked for; that of ``auto`` from the evaluation of the run that made the model.

    Raises:
        UsageError: The model was not evaluated, it was with other settings, or no cut keeps the share of wrong answers.
        MismatchError: The model is not the one that was evaluated.
    """
    if asked.confidence is not None:
        return Gate(min_confidence=asked.confidence, rest=rest)
    if found.run is None or found.folder is None:
        raise UsageError(
            f"{found.name} is not from a run, so no evaluation tells its confidence",
            hint="name a confidence: --min-confidence 0.98",
        )
    measured = read_json_or_nothing(found.run.evaluation).get("confidence")
    command = f"sft eval {found.run.argument}"
    if not isinstance(measured, dict):
        raise UsageError(f"{found.run.name} has no evaluation with confidences", hint=f"make one: {command}")
    if measured["model"] != found.run.inside(found.folder):
        raise MismatchError(
            f"the evaluation of {found.run.name} is of {measured['model']}, and {found.folder.name} is asked",
            hint=f"evaluate it: {command}",
        )
    _require_same(request, found.run, str(measured["precision"]))
    cuts = {cut["wrong_at_most"]: cut for cut in measured["cuts"] if cut["confidence"] is not None}
    if asked.wrong_at_most not in cuts:
        have = f"there are {', '.join(f'auto:{share:g}' for share in cuts)}" if cuts else f"see {command}"
        raise UsageError(
            f"no cut keeps wrong answers at {asked.wrong_at_most:.0%} or less over {measured['rows']} held-out rows",
            hint=have,
        )
    cut = cuts[asked.wrong_at_most]
    return Gate(
        min_confidence=cut["confidence"],
        rest=rest,
        promise=(
            f"at most {asked.wrong_at_most:.0%} of the answers that go out are wrong ({measured['measure']}), with 95% "
            f"certainty, for rows like the {measured['rows']} that were held out"
        ),
        precision=str(measured["precision"]),
    )


def journal_of(out: Path) -> Path:
    """Return where the answers for ``out`` are kept until all are there."""
    return out.with_name(f".{out.name}.partial")


def check_rest(rest: Path, out: Path) -> None:
    """Make sure that unsure answers can be written to ``rest``, before there are any.

    Raises:
        UsageError: It is ``out``.
        OutputError: It exists, or its place is none.
    """
    if rest.absolute() == out.absolute():
        raise UsageError("--rest and --out are one file", hint="name another --rest")
    if not journal_of(out).exists():  # else a killed command may have written it last
        storage.require_new(rest, hint="choose another --rest")


def _require_same(request: GenerateRequest, run: RunFolder, precision: str) -> None:
    """See that answers are made as the evaluation made them; else their confidence means something else."""
    kept = read_settings(run).sampling
    differs = {
        "--temperature": request.sampling.temperature > 0,
        "--repetition-penalty": request.sampling.repetition_penalty != kept.repetition_penalty,
        "--precision": request.precision not in {Precision.AUTO, precision},
        "--tokenizer": request.tokenizer is not None,
    }
    if names := [name for name, is_other in differs.items() if is_other]:
        raise UsageError(
            f"--min-confidence auto needs answers as sft eval made them, and {' and '.join(names)} changes them",
            hint=f"leave {' and '.join(names)} out, or name a confidence: --min-confidence 0.98",
        )
