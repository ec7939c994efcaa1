"""Checkpoints that say something else than the run that saved them, and verify all the same."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from sftcli.training.checkpoint.format import MANIFEST, RNG, STATE, manifest_bytes
from sftcli.training.checkpoint.names import step_of


def forge_fingerprints(checkpoint: Path, change: Callable[[dict[str, str]], object]) -> None:
    """Let ``change`` alter what a checkpoint says that it was made of."""
    state = json.loads((checkpoint / STATE).read_bytes())
    change(state["fingerprints"])
    (checkpoint / STATE).write_text(json.dumps(state), encoding="utf-8")
    _seal(checkpoint)


def forge_random_state(checkpoint: Path, **states: Tensor) -> None:
    """Put other states of random generators, by name, into a checkpoint."""
    save_file(load_file(checkpoint / RNG) | states, checkpoint / RNG)
    _seal(checkpoint)


def _seal(checkpoint: Path) -> None:
    names = json.loads((checkpoint / MANIFEST).read_bytes())["files"]
    files = {
        name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name in names
        for content in [(checkpoint / name).read_bytes()]
    }
    (checkpoint / MANIFEST).write_bytes(manifest_bytes(step_of(checkpoint), files))
