"""Fail each kind of operation on the disk that a command does, with each error that disks have, and look at what is left.

    python -m tests.crash.disk_errors

The command ends with 73 or 74 and says so, or goes on where that is promised; nothing half has a final name; where the disk
fails once, nothing else is left behind; and the same command again ends as it does on a disk that never failed.
"""

import argparse
import errno
import random
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from tests.support.bench import CASES, Bench, Case
from tests.support.faulty_disk import FailingDisk

ERRORS = (errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EMFILE)
EXPECTED = {0, 73, 74}
TOKENS = re.compile(r"[0-9a-f]{8,}|\d+")
OURS = re.compile(r"\.sft-|.*lock")


class Errors(Bench):
    """Failed operations, by exit code; ``begun_again`` counts those after which the command was repeated."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.codes: Counter[str] = Counter()
        self.begun_again = 0

    def moments(self, case: Case) -> Iterator[tuple[int, str]]:
        """Yield the first and the last operation of each kind on each file, tokens and numbers aside, and its name."""
        found: dict[str, list[int]] = {}
        for number, line in enumerate(self.logs[case.name], start=1):
            found.setdefault(TOKENS.sub("N", line), []).append(number)
        for name, numbers in found.items():
            for at in sorted({numbers[0], numbers[-1]}):
                yield at, name

    def fail(self, case: Case, at: int, number: int, *, forever: bool, again: bool) -> str:
        """Fail operation ``at``; return what is wrong then."""
        self.fresh(case)
        done = self.run(case.arguments, lambda: FailingDisk(at, number, forever=forever))
        self.codes[f"{errno.errorcode[number]} {done.code}"] += 1
        fault = self.fault_of(case, done.code, done.text, forever=forever)
        if not fault and again:
            self.begun_again += 1
            repeated = self.run(case.arguments)
            is_there = repeated.code == 73 and "exists already" in repeated.text and not case.run
            fault = (
                "" if repeated.code == 0 or is_there else f"again: {repeated.code}: {repeated.text[-300:]}"
            )
            fault = fault or self.differences(case)
        return fault

    def fault_of(self, case: Case, code: int, text: str, *, forever: bool) -> str:
        """Return what is wrong with the end of a command on a disk that failed."""
        if code not in EXPECTED or "hit a bug" in text or "Traceback" in text:
            return f"it ends with {code}: {text[-300:]}"
        if code == 0 and (differs := self.differences(case)):
            return f"it ends with 0, and {differs}"
        try:
            case.check(self.place, case, text)
        except Exception as error:  # noqa: BLE001 - whatever a reader stumbles over
            return f"{type(error).__name__} {error}"
        if not case.run and any((self.place / one).exists() for one in case.makes):
            golden, found = self.golden[case.name], self.result(case)
            if half := [name for name in found if found[name] != golden[name]]:
                return f"half: {half}"
        left = [path for path in self.place.rglob("*") if OURS.match(path.name)]
        return "" if forever or not left else f"left behind: {[path.name for path in left]}"


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default="", help="commands whose name has this in it")
    parser.add_argument("--some", type=int, default=0, help="that many operations, drawn; 0 for each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-seconds", type=float, default=7200)
    asked = parser.parse_args()
    cases = [case for case in CASES if asked.only in case.name]
    begin, chance, failures = time.monotonic(), random.Random(asked.seed), 0
    with tempfile.TemporaryDirectory() as folder:
        bench = Errors(Path(folder).resolve())
        bench.set_up()
        for case in cases:
            bench.measure(case)
        tries = [
            (case, at, name, number)
            for case in cases
            for at, name in bench.moments(case)
            for number in ERRORS
        ]
        if asked.some:
            tries = chance.sample(tries, min(asked.some, len(tries)))
        for turn, (case, at, name, number) in enumerate(tries):
            if time.monotonic() - begin > asked.max_seconds:
                break
            forever = turn % 3 == 2
            if fault := bench.fail(case, at, number, forever=forever, again=turn % 4 == 0):
                failures += 1
                kind = f"{errno.errorcode[number]}{' for ever' if forever else ''}"
                say(f"FAILED {case.name}, {kind} at {at}, {name}: {fault}\n")
    say(f"{bench.codes.total()} of {len(tries)} operations failed in {time.monotonic() - begin:.0f} s")
    say(
        f"by error and exit code: {dict(sorted(bench.codes.items()))}; {bench.begun_again} commands were repeated"
    )
    say(f"{failures} failures")
    raise SystemExit(bool(failures))


if __name__ == "__main__":
    main()
