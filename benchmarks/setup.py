"""A training run as ``sft train`` builds it, for the benchmarks to take steps with."""

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from sftcli.config.sources import Settings
from sftcli.events import Event, NeverStop, Notice, Warned
from sftcli.runtime import seed_everything
from sftcli.services.building import build_trainer
from sftcli.services.run_folder import create_run
from sftcli.services.train import find_materials

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from sftcli.training.trainer import Trainer


def settings_of(
    *, model: str, data: str, run_root: str, batch_size: int, max_tokens: int, training: Mapping[str, object]
) -> Settings:
    """Return the settings of a run of one micro-batch a step, unless ``training`` says otherwise."""
    steps = {"max_steps": 1000, "batch_size": batch_size, "micro_batch_size": batch_size, "warmup_steps": 0}
    return Settings.model_validate(
        {
            "run": {"root": run_root},
            "model": {"name": model},
            "data": {"sources": (data,), "max_tokens": max_tokens, "heldout_max_rows": 64},
            "training": steps | dict(training),
        }
    )


@contextmanager
def trainer_of(
    *,
    model: str,
    data: str,
    batch_size: int = 8,
    max_tokens: int = 512,
    training: Mapping[str, object] | None = None,
) -> "Iterator[tuple[Trainer, PreTrainedModel, list[str]]]":
    """Yield a trainer, its model, and what the run said about decisions that were taken."""
    said: list[str] = []

    def emit(event: Event, /) -> None:
        if isinstance(event, Warned | Notice):
            said.append(event.text)

    with tempfile.TemporaryDirectory() as root:
        settings = settings_of(
            model=model,
            data=data,
            run_root=root,
            batch_size=batch_size,
            max_tokens=max_tokens,
            training=training or {},
        )
        torch.set_num_threads(torch.get_num_threads())
        materials = find_materials(settings, emit, NeverStop())
        seed_everything(settings.training.seed)
        run = create_run(settings.run, label="benchmark")
        Path(root).mkdir(exist_ok=True)
        trainer, built = build_trainer(run, materials, emit, check_owner=lambda: None)
        yield trainer, built, said
