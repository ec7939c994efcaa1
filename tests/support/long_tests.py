"""Which tests are long: those that `tests/long.txt` names. Nobody keeps that list by hand:

    pytest -n 2 tests --junitxml=times.xml && python -m tests.support.long_tests times.xml

A test is long if it takes over a third of a second on average over its parameters, on a machine that does nothing else.
"""

import sys
from collections import defaultdict
from pathlib import Path
from statistics import mean
from xml.etree import ElementTree

LIST = Path(__file__).parents[1] / "long.txt"
SECONDS = 0.3


def long_tests() -> frozenset[str]:
    """Return the long tests, each as ``tests/folder/test_file.py::test_name``."""
    return frozenset(LIST.read_text(encoding="utf-8").split())


def main(files: list[Path]) -> None:
    """Write the list from the times in ``files``, which pytest has written as XML."""
    found: dict[str, list[float]] = defaultdict(list)
    for case in (case for file in files for case in ElementTree.parse(file).getroot().iter("testcase")):
        name, place = case.attrib["name"].partition("[")[0], case.attrib["classname"].replace(".", "/")
        found[f"{place}.py::{name}"].append(float(case.attrib["time"]))
    every = sorted(name for name, took in found.items() if mean(took) > SECONDS)
    LIST.write_text("".join(f"{name}\n" for name in every), encoding="utf-8")


if __name__ == "__main__":
    main([Path(name) for name in sys.argv[1:]])
