"""One stage of the check, in this process; ``check.py`` runs them in order."""

import argparse
import time
from pathlib import Path

import torch

from benchmarks.gpu.answers import time_decoding
from benchmarks.gpu.commands import run_commands
from benchmarks.gpu.correct import check_numbers
from benchmarks.gpu.findings import Check
from benchmarks.gpu.machine import describe_machine
from benchmarks.gpu.peer import time_peer
from benchmarks.gpu.speed import time_compiled, time_training
from benchmarks.gpu.training import kernels

STAGES = {
    "env": describe_machine,
    "correct": check_numbers,
    "speed": time_training,
    "trl": time_peer,
    "cli": run_commands,
    "compiled": time_compiled,
    "decode": time_decoding,
}


def main() -> None:
    """Run the stage."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path)
    args = parser.parse_args()
    if args.device == "cpu":
        torch.set_num_threads(1)
    for folder in (args.out, args.work):
        folder.mkdir(parents=True, exist_ok=True)
    check = Check(
        stage=args.stage,
        device=torch.device("cpu") if args.device == "cpu" else torch.device("cuda", 0),
        out=args.out,
        work=args.work,
        tokenizer=args.tokenizer,
    )
    begin = time.perf_counter()
    with kernels():
        STAGES[args.stage](check)
    check.say("seconds", seconds=time.perf_counter() - begin)


if __name__ == "__main__":
    main()
