"""The ``.pt`` files of a Modern LLM run, written next to its own checkpoints for the original program."""

import glob
from pathlib import Path
from typing import TYPE_CHECKING

from sftcli import storage
from sftcli.config.schema.settings import Settings
from sftcli.config.schema.training import OPTIMIZERS
from sftcli.modeling.formats.pt_file import write_pt
from sftcli.modeling.modern_lm.model import ModernLMForCausalLM
from sftcli.services.runs.folder import RunFolder, read_settings
from sftcli.training.checkpoint.names import list_checkpoints, step_of
from sftcli.training.optim.schedule import learning_rate_at
from sftcli.training.state import TrainingSnapshot

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class PtFiles:
    """The files of a run that the original program loads: ``RUN-sft_stepN.pt`` of each checkpoint, and ``RUN-sft_final.pt``."""

    def __init__(self, model: ModernLMForCausalLM, run: RunFolder, settings: Settings) -> None:
        self.model = model
        self.run = run
        self.settings = settings

    def write_step(self, snapshot: TrainingSnapshot) -> None:
        """Write the file of a checkpoint, and delete those of checkpoints that are gone.

        So ``checkpoint.keep_last`` and its companions decide for both.
        """
        name = pt_name(self.run)
        self._write(self.run.path / f"{name}_step{snapshot.state.step}.pt", snapshot)
        kept = {f"{name}_step{step_of(one)}.pt" for one in list_checkpoints(self.run.checkpoints)}
        for path in self.run.path.glob(f"{glob.escape(name)}_step*.pt"):
            if path.name not in kept and path.stem.rpartition("_step")[2].isdigit():
                storage.try_remove_tree(path)

    def write_final(self, snapshot: TrainingSnapshot) -> str:
        """Write the file of the final model; return its path."""
        path = self.run.path / f"{pt_name(self.run)}_final.pt"
        self._write(path, snapshot)
        return str(path)

    def _write(self, path: Path, snapshot: TrainingSnapshot) -> None:
        _write(self.model, self.run, path, self.settings, snapshot)


def pt_files(model: "PreTrainedModel", run: RunFolder, settings: Settings) -> PtFiles | None:
    """Return the writer of a run's ``.pt`` files, if its model is a Modern LLM model."""
    return PtFiles(model, run, settings) if isinstance(model, ModernLMForCausalLM) else None


def export_pt(
    path: Path,
    model: ModernLMForCausalLM,
    *,
    run: RunFolder | None,
    name: str,
    snapshot: TrainingSnapshot | None,
) -> None:
    """Write the new file ``path``: with the state of ``snapshot`` if there is one, else weights alone, as step 0.

    Args:
        path: Where to; the caller makes it whole or absent.
        model: Its weights are written where there is no snapshot.
        run: That made the model.
        name: Stands for the run's where there is none.
        snapshot: Of the run.
    """
    if run is not None and snapshot is not None:
        _write(model, run, path, read_settings(run), snapshot)
    else:
        write_pt(
            path,
            config=model.config,
            weights=dict(model.named_parameters()),
            optimizer={},
            group={"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2},  # AdamW's own
            step=0,
            run_name=name if run is None else pt_name(run),
        )


def pt_name(run: RunFolder) -> str:
    """Return the pipeline's name of a run: it ends in ``-sft``."""
    return run.name if run.name.endswith("-sft") else f"{run.name}-sft"


def _write(
    model: ModernLMForCausalLM, run: RunFolder, path: Path, settings: Settings, snapshot: TrainingSnapshot
) -> None:
    training = settings.training
    group = {
        "lr": learning_rate_at(max(0, snapshot.state.step - 1), training),
        "betas": (training.beta1, training.beta2),
        "eps": training.epsilon,
        "weight_decay": training.weight_decay,
    }
    named = dict(model.named_parameters())
    weights = {name: snapshot.weights.get(name, parameter) for name, parameter in named.items()}
    write_pt(
        path,
        config=model.config,
        weights=weights,
        # The original program knows AdamW's moments only.
        optimizer=snapshot.optimizer if OPTIMIZERS[training.optimizer].has_adamw_moments else {},
        group=group,
        step=snapshot.state.step,
        run_name=pt_name(run),
    )
