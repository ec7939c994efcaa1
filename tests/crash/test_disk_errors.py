"""A disk that fails at any operation of any command; the whole of it is ``make disk-errors``."""

import random

import pytest

from tests.crash.disk_errors import ERRORS, Errors
from tests.support.bench import CASES

TRIES = 3


QUICK = ("train", "export to hf")
SLOW = [pytest.param(case.name, marks=pytest.mark.slow) for case in CASES if case.name not in QUICK]


@pytest.mark.parametrize("name", [*QUICK, *SLOW])
def test_a_disk_that_fails_is_told_and_nothing_half_is_left(name, machine):
    (case,) = [case for case in CASES if case.name == name]
    bench, chance = Errors(machine), random.Random(name)
    bench.measure(case)
    faults = []
    for turn, (at, operation) in enumerate(chance.sample(list(bench.moments(case)), TRIES)):
        number = ERRORS[turn % len(ERRORS)]
        fault = bench.fail(case, at, number, forever=turn == TRIES - 1, again=turn == 0)
        faults += [f"{operation}: {fault}"] if fault else []
    assert faults == []
    assert bench.codes.total() == TRIES
