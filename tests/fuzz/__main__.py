"""Damage files at random and run commands on them: each must end with an exit code of its own, and say in words what is wrong.

    python -m tests.fuzz --kind own --count 1000 --seed 0

``own`` are files that this program has written, ``foreign`` those of others; ``paths`` are odd names in each place that takes a
text, and nothing is damaged. A case fails that ends with 1 or by a signal, takes 30 s or
2 GB, says "hit a bug", lets an escape character through, or leaves a scratch file. Each is kept, and printed with what repeats it.
"""

import argparse
import shlex
import sys
import tempfile
import time
from pathlib import Path
from random import Random

from tests.fuzz import runner
from tests.fuzz.runner import Case, Result, Runner, Tally


def main() -> None:
    """Run the cases that were asked for, and exit with 1 if one has failed."""
    options = _options()
    runner.load()
    from tests.fuzz.foreign import FOREIGN
    from tests.fuzz.own import OWN
    from tests.fuzz.paths import path_commands

    odd = list(path_commands()) if options.kind == "paths" else []
    every = {"own": OWN, "foreign": FOREIGN, "paths": [target for target, _ in odd]}[options.kind]
    targets = [target for target in every if options.only in (None, target.name)]
    if not targets:
        raise SystemExit(f"no target of {options.kind} files is called {options.only}")
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(prefix="fuzz-", dir=shared if shared.is_dir() else None) as folder:
        kept = options.keep or Path(tempfile.mkdtemp(prefix="fuzz-kept-"))
        running = Runner(Path(folder), kept, options.jobs, options.seconds)
        begin = time.monotonic()
        running.build(targets)
        built, tally = time.monotonic(), Tally()
        cases = [Case(targets[n % len(targets)], options.seed + n) for n in range(options.count)]
        if options.intact:
            cases = [
                Case(target, n, command, is_good=True)
                for target in targets
                for n, command in enumerate(target.commands)
            ]
        if odd:
            cases = [Case(target, n, command) for n, (target, command) in enumerate(odd) if target in targets]
            cases = Random(options.seed).sample(cases, min(options.count, len(cases)))
        for result in running.run(cases):
            tally.add(result)
            if result.fault:
                _say(_told(result, options.kind, kept))
            if options.max_seconds and time.monotonic() - begin > options.max_seconds:
                break
        seconds = time.monotonic() - built
        _say(tally.table())
        count = sum(sum(codes.values()) for codes in tally.codes.values())
        last = options.seed + count - 1
        _say(
            f"{options.kind}: {count} cases, seeds {options.seed} to {last}, in {seconds:.0f} s ({count / max(seconds, 1e-9):.1f} a second)"
            f", {built - begin:.0f} s to build {len(running.samples)} samples; {len(tally.faults)} faults"
            + (f", kept in {kept}" if tally.faults else "")
        )
    if not tally.faults and options.keep is None:
        kept.rmdir()
    sys.exit(1 if tally.faults else 0)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kind", choices=("own", "foreign", "paths"), required=True)
    parser.add_argument("--count", type=int, default=100, help="cases, over all targets in turn")
    parser.add_argument(
        "--seed", type=int, default=0, help="of the first case; those after it have the next ones"
    )
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument(
        "--seconds", type=float, default=30.0, help="limit of a case; more on a machine with other work"
    )
    parser.add_argument("--only", help="one target")
    parser.add_argument("--keep", type=Path, help="folder for the cases that fail; a new one by default")
    parser.add_argument("--max-seconds", type=float, help="begin no more cases after this")
    parser.add_argument(
        "--intact",
        action="store_true",
        help="try each command once without damage instead: it must end with 0",
    )
    return parser.parse_args()


def _told(result: Result, kind: str, kept: Path) -> str:
    case = result.case
    again = f"python -m tests.fuzz --kind {kind} --only {shlex.quote(case.target.name)} --seed {case.seed} --count 1"
    return (
        f"FAULT {case.target.name} seed {case.seed}: {result.fault} (exit {result.code}, {result.seconds:.1f} s)\n"
        f"  damage: {result.damage}\n  command: sft {result.command}\n  last line: {result.last_line!a}\n  again: {again}"
    )


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
