"""The plan of a training's batches from its settings: in which order rows come, how they are packed, how much text is mixed in."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from sftcli.config.schema.data import RowOrder
from sftcli.data.batches.batch import BatchPlan, TextShare
from sftcli.data.prepared.store import ExampleTable
from sftcli.errors import DataError
from sftcli.events import EventSink
from sftcli.services.train.start.inputs import TrainingInputs
from sftcli.training.probes.choices import RowSharing
from sftcli.training.probes.packing import choose_packing

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def plan_maker(
    model: "PreTrainedModel",
    inputs: TrainingInputs,
    *,
    emit: EventSink,
    recorded: str | None = None,
    kernel: str | None = None,
    ruled_out: RowSharing | None = None,
) -> tuple[Callable[[int], BatchPlan], RowSharing]:
    """Return what makes the plan for a micro-batch size, after trying ``model`` with packed rows, and how these are kept apart.

    ``recorded`` is how they were, and ``kernel`` what computed their attention, in a run that goes on; ``ruled_out`` is how
    they cannot be.

    Raises:
        DataError: There is no text for the share that it is to have.
        UsageError: Packing is asked for, and the model cannot do it.
    """
    settings, dataset, pad_id = inputs.settings, inputs.prepared.dataset, inputs.pad_id
    training, examples = settings.training, dataset.train
    text = _text_share(dataset.text, settings.data.text_fraction)
    longest = max(*examples.num_tokens, *(text.examples.num_tokens if text else ()), 0)
    chosen = choose_packing(
        model,
        examples,
        longest=longest,
        settings=training,
        pad_id=pad_id,
        emit=emit,
        recorded=recorded,
        kernel=kernel,
        ruled_out=ruled_out,
    )
    packing = chosen.packing
    keys = _order_keys(examples, settings.data.order)

    def make(micro_batch_size: int) -> BatchPlan:
        return BatchPlan(
            examples,
            batch_size=training.rows_per_step,
            micro_batch_size=micro_batch_size,
            pad_id=pad_id,
            seed=training.seed,
            keys=keys,
            packing=packing and packing.reduced(micro_batch_size, training.micro_batch_size),
            text=text,
        )

    return make, chosen.kind


def _order_keys(examples: ExampleTable, order: RowOrder) -> Sequence[float] | None:
    if order is RowOrder.SHUFFLED:
        return None
    return examples.num_tokens if order is RowOrder.LENGTH else examples.scores


def _text_share(texts: ExampleTable, fraction: float) -> TextShare | None:
    if not fraction:
        return None
    if not len(texts):
        raise DataError(
            "no pretraining text is left to mix in", hint="sft prepare says why each text was rejected"
        )
    return TextShare(examples=texts, fraction=fraction)
