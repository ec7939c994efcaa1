"""What makes a training faster, tried on real rows against the model's own forward pass before weights are rounded."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sftcli.events import EventSink, Notice, Warned
from sftcli.modeling.kernels.fuse import Fusion, restore_layers
from sftcli.services.runs.record import Decisions
from sftcli.services.train.start.inputs import TrainingInputs
from sftcli.training.probes.agreement import WORK, Ways, agreed_ways
from sftcli.training.probes.choices import HeadLoss, RowSharing
from sftcli.training.probes.packing import sharing_to_try
from sftcli.training.probes.rows import cut_rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True, kw_only=True)
class Tried:
    """What came of it."""

    layers: tuple[str, ...]  # kinds that run in the faster form
    head: str | None  # where the head has to run; None where that is open
    ruled_out: RowSharing | None  # how rows cannot be kept apart


def try_ways(
    model: "PreTrainedModel",
    fusion: Fusion | None,
    inputs: TrainingInputs,
    *,
    recorded: Decisions,
    emit: EventSink,
    with_gradients: bool,
) -> Tried:
    """Keep the speedups of ``model`` that preserve its loss and gradients, and report the others.

    Args:
        model: As it was loaded.
        fusion: The faster form of its layers; None where there is none.
        inputs: Rows that will be trained on, and settings that say whether they may be packed.
        recorded: What the run that goes on has decided; what it does without is not tried.
        emit: Hears what is left out.
        with_gradients: Compare gradients too, which takes the memory of the weights that train.
    """
    wanted = Ways(
        layers=fusion is not None and bool(fusion.fused),
        rows=sharing_to_try(model, inputs.settings.training, recorded.packing),
        head=recorded.head != HeadLoss.WHOLE,
    )
    rows = cut_rows(model, inputs.prepared.dataset.train, work=WORK, count=2)
    agreed = agreed_ways(
        model, fusion, rows, wanted=wanted, pad_id=inputs.pad_id, with_gradients=with_gradients
    )
    kind = type(model).__name__
    if wanted.layers and not agreed.layers:
        restore_layers(model)
        emit(
            Notice(
                text=f"layers of {kind} use the transformers implementation: the faster one gives a different loss"
            )
        )
    if wanted.rows is not agreed.rows:
        emit(Notice(text=f"{kind} gives different losses or gradients for packed rows ({wanted.rows})"))
    if wanted.head and not agreed.head:
        text = f"{kind} has an unknown head: logits of whole batches are kept, which costs memory"
        emit(Warned(text=text))
    return Tried(
        layers=fusion.fused if fusion is not None and agreed.layers else (),
        head=recorded.head if agreed.head else HeadLoss.WHOLE,
        ruled_out=wanted.rows if wanted.rows is not agreed.rows else None,
    )
