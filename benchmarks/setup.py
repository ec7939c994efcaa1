"""A training run as ``sft train`` builds it, for the benchmarks to take steps with."""

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from sftcli.config.schema.settings import Settings
from sftcli.events import Event, NeverStop, Notice, Session, Warned
from sftcli.runtime import choose_device
from sftcli.services.runs.folder import create_run
from sftcli.services.train.decisions import Decisions, settle_precision
from sftcli.services.train.run import TrainingRun
from sftcli.services.train.start.inputs import TrainingInputs, find_inputs

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from sftcli.training.trainer import Trainer


def materials_of(
    *,
    model: str,
    data: str,
    batch_size: int = 8,
    max_tokens: int = 512,
    training: Mapping[str, object] | None = None,
    root: str = "runs",
) -> tuple[TrainingInputs, list[str]]:
    """Return model, rows and settings of a run of one micro-batch a step, and what was said on the way."""
    said: list[str] = []

    def emit(event: Event, /) -> None:
        if isinstance(event, Warned | Notice):
            said.append(event.text)

    steps = {"max_steps": 1000, "batch_size": batch_size, "micro_batch_size": batch_size, "warmup_steps": 0}
    settings = Settings.model_validate(
        {
            "run": {"root": root},
            "model": {"name": model},
            "data": {"sources": (data,), "max_tokens": max_tokens, "heldout_max_rows": 32},
            "training": steps | dict(training or {}),
        }
    )
    return find_inputs(settings, Session(emit, NeverStop())), said


@contextmanager
def trainer_of(inputs: TrainingInputs, said: list[str]) -> "Iterator[tuple[Trainer, PreTrainedModel]]":
    """Yield a trainer and its model; ``said`` takes what the run says about its decisions."""

    def emit(event: Event, /) -> None:
        if isinstance(event, Warned | Notice):
            said.append(event.text)

    with tempfile.TemporaryDirectory() as root:
        settings = inputs.settings
        folder = create_run(settings.run.model_copy(update={"root": root}), label="benchmark", files={})
        run = TrainingRun(folder=folder, settings=settings, session=Session(emit, NeverStop()))
        run.take(inputs)
        run.build(settle_precision(Decisions(), settings.training.precision, choose_device()))
        yield run.trainer, run.parts.model
