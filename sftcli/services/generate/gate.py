"""Which answers of a file go out, and which are left for people: a cut in the model's own confidence."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from sftcli import storage
from sftcli.config.schema.run import SamplingSettings
from sftcli.config.schema.training import Precision
from sftcli.errors import MismatchError, UsageError
from sftcli.modeling.formats.identity import answering_hash
from sftcli.services.generate.request import GenerateRequest
from sftcli.services.models.reference import ModelReference
from sftcli.services.report.evaluation import Evaluation, read_scores
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
    most_tokens: int = 0  # the evaluation cut answers there

    def lets_out(self, confidence: float | None, finish: str) -> bool:
        """Return whether an answer goes out; one whose confidence nobody tells does not."""
        return finish == "stop" and confidence is not None and confidence >= self.min_confidence


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


@dataclass(frozen=True, slots=True, kw_only=True)
class _Measured:
    """What the evaluation of a run says of confidences."""

    model: str
    model_hash: str
    measure: str
    precision: str
    rows: int
    most_tokens: int  # where answers were cut
    cuts: Mapping[float, float]  # by the share of wrong answers

    @classmethod
    def of(cls, evaluation: Evaluation | None) -> "_Measured | None":
        """Return it; None where there is no evaluation, or it is of a version that did not keep this."""
        kept = None if evaluation is None else evaluation.confidence
        if evaluation is None or kept is None:
            return None
        return cls(
            model=kept.model,
            model_hash=kept.model_hash,
            measure=kept.measure,
            precision=kept.precision,
            rows=kept.rows,
            most_tokens=evaluation.tuned.most_answer_tokens,
            cuts={cut.wrong_at_most: cut.confidence for cut in kept.cuts if cut.confidence is not None},
        )


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
    command = f"sft eval {found.run.argument}"
    measured = _Measured.of(read_scores(found.run))
    if measured is None:
        raise UsageError(f"{found.run.name} has no evaluation with confidences", hint=f"make one: {command}")
    _require_evaluated(measured, found.run, found.folder, command)
    _require_same(request, found.run, measured)
    if asked.wrong_at_most not in measured.cuts:
        have = (
            f"there are {', '.join(f'auto:{share:g}' for share in measured.cuts)}"
            if measured.cuts
            else f"see {command}"
        )
        raise UsageError(
            f"no cut keeps wrong answers at {asked.wrong_at_most:.0%} or less over {measured.rows} held-out rows",
            hint=have,
        )
    return Gate(
        min_confidence=measured.cuts[asked.wrong_at_most],
        rest=rest,
        promise=(
            f"at most {asked.wrong_at_most:.0%} of the answers that go out are wrong ({measured.measure}), with 95% "
            f"certainty, for rows like the {measured.rows} that were held out; answers were cut after "
            f"{measured.most_tokens:,} tokens, as in the evaluation"
        ),
        precision=measured.precision,
        most_tokens=measured.most_tokens,
    )


def as_evaluated(request: GenerateRequest, gate: Gate | None) -> GenerateRequest:
    """Return ``request`` with answers as the evaluation made them, where ``gate`` promises something by that evaluation."""
    if gate is None or not gate.promise:
        return request
    sampling = request.sampling.model_copy(update={"max_new_tokens": gate.most_tokens})
    return replace(request, precision=gate.precision, sampling=sampling)


def _require_evaluated(measured: _Measured, run: RunFolder, folder: Path, command: str) -> None:
    """See that the model in ``folder`` is the one that was evaluated, as it was then."""
    if measured.model != run.inside(folder):
        raise MismatchError(
            f"the evaluation of {run.name} is of {measured.model}, and {folder.name} is asked",
            hint=f"evaluate it: {command}",
        )
    if measured.model_hash != answering_hash(folder):
        raise MismatchError(
            f"{folder} has changed since it was evaluated, or {run.evaluation.name} is of another run",
            hint=f"evaluate it again: {command}",
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
    if rest.resolve() in {out.resolve(), journal_of(out).resolve()}:
        raise UsageError("--rest and --out are one file", hint="name another --rest")
    if not journal_of(out).exists():  # else a killed command may have written it last
        storage.require_new(rest, hint="choose another --rest")


def _require_same(request: GenerateRequest, run: RunFolder, measured: _Measured) -> None:
    """See that answers are made as the evaluation made them; else their confidence means something else."""
    kept, asked = read_settings(run).sampling, request.sampling
    differs = {
        "--temperature": asked.temperature > 0,
        "--repetition-penalty": asked.repetition_penalty != kept.repetition_penalty,
        "--stop": bool(asked.stop),  # an evaluation ends answers at stop tokens alone
        # The default was hardly asked for; the end of an answer is then that of the evaluation.
        "--max-new-tokens": asked.max_new_tokens
        not in {measured.most_tokens, SamplingSettings().max_new_tokens},
        "--precision": request.precision not in {Precision.AUTO, measured.precision},
        "--tokenizer": request.tokenizer is not None,
    }
    if names := [name for name, is_other in differs.items() if is_other]:
        raise UsageError(
            f"--min-confidence auto needs answers as sft eval made them, and {' and '.join(names)} changes them",
            hint=f"leave {' and '.join(names)} out, or name a confidence: --min-confidence 0.98",
        )
