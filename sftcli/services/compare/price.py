"""What a comparison takes: steps measured on the real model and rows, times the runs."""

import gc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sftcli.data.prepared.store import PreparedDataset
from sftcli.errors import DataError
from sftcli.events import Notice, Session
from sftcli.runtime import monotonic
from sftcli.services.compare.record import RowScores
from sftcli.services.compare.start import DEFAULT_STEPS, Child, Comparison
from sftcli.services.train.plan import plan_training
from sftcli.services.train.start.inputs import find_inputs


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreed:
    """What all runs share once the rows are known.

    Attributes:
        steps: Of each run.
        values: Settings that nobody chose, by key.
        fingerprints: Of the rows, the tokenizer and the model, by name.
        dataset: The prepared rows, of the first model where several are compared.
    """

    steps: int
    values: Mapping[str, object]
    fingerprints: Mapping[str, str]
    dataset: PreparedDataset


@dataclass(frozen=True, slots=True, kw_only=True)
class Price:
    """What all runs take together: ``seconds``, and by value those of one run."""

    runs: int
    steps: int  # of each run
    seconds: float
    seconds_of_a_run: Mapping[str, float]


def agree(comparison: Comparison, session: Session) -> Agreed:
    """Prepare the rows and decide once, for all runs, what nobody chose; their number of steps too.

    Raises:
        DataError: No rows are held out.
    """
    settings = comparison.reference
    inputs = find_inputs(settings, session)
    dataset = inputs.prepared.dataset
    if not len(dataset.heldout):
        raise DataError(
            "there are no held-out rows to compare on",
            hint="hold out more with --set data.heldout_fraction=0.2, or name rows with --heldout",
        )
    asked, steps = settings.training, inputs.settings.training.max_steps
    if not asked.max_steps and asked.epochs is None and steps > DEFAULT_STEPS:
        steps = DEFAULT_STEPS
        session.emit(Notice(text=f"each run trains for {steps} steps; --max-steps N changes it"))
    return Agreed(
        steps=steps,
        values=comparison.agreed(inputs.decided, steps),
        fingerprints=inputs.identity,
        dataset=dataset,
    )


def price(
    comparison: Comparison, children: Sequence[Child], scored: Mapping[str, RowScores], session: Session
) -> Price:
    """Return what the ``children`` take that are not scored; by those that are, or else by a probe of each value that matters."""
    left = [child for child in children if child.name not in scored]
    texts = [value.text for value in comparison.axis.values]
    known = {child.place: scored[child.name].seconds for child in children if child.name in scored}
    for child in left:
        if comparison.axis.costs_alike and known:
            known[child.place] = next(iter(known.values()))
        elif child.place not in known:
            known[child.place] = _probed(child, session)
    return Price(
        runs=len(left),
        steps=children[0].resolved.settings.training.max_steps,
        seconds=sum(known[child.place] for child in left),
        seconds_of_a_run={texts[place]: seconds for place, seconds in sorted(known.items())},
    )


def _probed(child: Child, session: Session) -> float:
    """Return the seconds of a run: what the probe says, what a start takes, and the scoring of the held-out rows."""
    begin = monotonic()
    plan = plan_training(child.resolved.settings, session)
    gc.collect()  # the model of the probe
    return plan.seconds + plan.evaluation_seconds + monotonic() - begin
