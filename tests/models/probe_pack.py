"""How far logits of packed rows are from those of the rows alone, and whether a training would pack them.

    python -m tests.models.probe_pack llama falcon_h1 --out DIR

For each family, in float32 and bfloat16, with three rows of 30 and of 200 tokens. Models are those of ``matrix.py`` in ``DIR``, built
where they are missing.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sftcli.data.example import Example
from sftcli.data.reading.record import Origin
from sftcli.modeling.kernels.document_attention import attend_by_document
from sftcli.modeling.load import load_model
from sftcli.training.probes.packing import Probe, difference
from tests.models.child import call, prepare_children
from tests.models.families import FAMILIES
from tests.models.matrix import build_once
from tests.support.smollm2 import STOP_ID
from tests.support.training import CPU, ExampleList


def main() -> None:
    """Print a line for each family."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("families", nargs="+", choices=FAMILIES, metavar="FAMILY")
    parser.add_argument("--out", type=Path, required=True, help="folder of models")
    args = parser.parse_args()
    out = args.out.absolute()
    folders = {name: build_once(name, out) for name in args.families}
    prepare_children(out)
    for name, folder in folders.items():
        try:
            cells = call(_seen, str(folder))
        except RuntimeError as error:
            cells = {"error": str(error)[:160]}
        print(f"{name}: " + "  ".join(f"{key} {value}" for key, value in cells.items()), flush=True)


def _seen(folder: str) -> dict[str, str]:
    return {
        f"{str(dtype).removeprefix('torch.')}/{length}": _cell(folder, dtype, length)
        for dtype in (torch.float32, torch.bfloat16)
        for length in (30, 200)
    }


def _cell(folder: str, dtype: torch.dtype, length: int) -> str:
    model: Any = load_model(Path(folder), dtype=torch.float32, device=CPU).to(dtype)
    probe = Probe(model, _rows(length), STOP_ID)
    if not attend_by_document(model):
        return "has no such attention"
    verdict = "packs" if probe.keeps_apart([probe.rows]) else "does not pack"
    try:
        with torch.no_grad():
            packed = probe.by_row([probe.rows])
            alone = [probe.by_row([[row]])[0] for row in probe.rows]
    except (AttributeError, TypeError, ValueError, RuntimeError, LookupError) as error:
        return f"{verdict} ({type(error).__name__}: {str(error)[:60]})"
    return f"{max(map(difference, packed, alone)):.1e}, {verdict}"


def _rows(length: int) -> ExampleList:
    generator = np.random.default_rng(0)
    return ExampleList(
        Example(
            input_ids=generator.integers(100, 40000, length).astype(np.int32),
            loss_mask=np.ones(length, bool),
            origin=Origin(path="random", line=line),
        )
        for line in range(3)
    )


if __name__ == "__main__":
    main()
