"""Cut the power of a machine at random operations of its disk, start the same command again, and compare.

    python -m tests.crash.power_loss --cuts 200

What a command had announced before the cut has to be there and whole; the same command again has to end as it does on a
machine that was left in peace, or say that its output is there, which then has to be that. What survives of names and
content that were not synced: ``tests/support/power.py``.
"""

import argparse
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.support.bench import CASES, Bench, Case, events_in
from tests.support.power import PowerDisk


class Cuts(Bench):
    """Cuts, by command; ``there`` counts those after which the output was there and the command said so."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.counts: Counter[str] = Counter()
        self.announced: Counter[str] = Counter()
        self.there = 0

    def cut(self, case: Case, at: int, seed: int) -> str:
        """Cut the power before operation ``at``, look, and run the command again; return what is wrong then."""
        self.fresh(case)
        cut = self.run(case.arguments, lambda: PowerDisk(self.place, at, seed))
        if cut.code == 0:
            return ""  # fewer operations than the last time: a thread counts, too
        assert cut.code == -signal.SIGKILL, cut.text
        self.counts[case.name] += 1
        for kind in ("RunStarted", "CheckpointSaved", "ModelSaved"):
            self.announced[kind] += len(events_in(cut.text, kind))
        fault = self.fault_after(case, cut.text)
        if not fault:
            return ""
        said = "; ".join(line[:90] for line in cut.text.splitlines())
        where = f"{case.name}, operation {at} of {len(self.logs[case.name])}, seed {seed}"
        return f"{where}: {fault}\n  said before the cut: {said}"

    def fault_after(self, case: Case, text: str) -> str:
        """Return what is wrong on the disk after a command that has said ``text``, or once it is repeated."""
        try:
            case.check(self.place, case, text)
        except Exception as error:  # noqa: BLE001 - whatever a reader stumbles over
            return f"{type(error).__name__} {error}"
        again = self.run(case.arguments)
        is_there = again.code == 73 and "exists already" in again.text and not case.run
        self.there += is_there
        if again.code and not is_there:
            return f"the same command ends with {again.code}: {again.text}"
        return self.differences(case)


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--cuts", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="commands whose name has this in it")
    parser.add_argument("--max-seconds", type=float, default=3600)
    asked = parser.parse_args()
    cases = [case for case in CASES if asked.only in case.name]
    begin, chance = time.monotonic(), random.Random(asked.seed)
    with tempfile.TemporaryDirectory() as folder:
        bench = Cuts(Path(folder).resolve())
        bench.set_up()
        for case in cases:
            bench.measure(case)
        failures = []
        for number in range(asked.cuts):
            if time.monotonic() - begin > asked.max_seconds:
                break
            (case,) = chance.choices(cases, [case.weight for case in cases])
            at, seed = chance.randint(1, len(bench.logs[case.name])), asked.seed * 1_000_003 + number
            if fault := bench.cut(case, at, seed):
                failures.append(fault)
                say(f"FAILED {fault}\n")
    say(f"operations: { {name: len(log) for name, log in bench.logs.items()} }")
    say(f"cuts: {dict(bench.counts)}, {bench.counts.total()} in {time.monotonic() - begin:.0f} s")
    say(
        f"announced before them: {dict(bench.announced)}; {bench.there} times the output was there, and said to be"
    )
    say(f"{len(failures)} failures")
    raise SystemExit(bool(failures))


if __name__ == "__main__":
    main()
