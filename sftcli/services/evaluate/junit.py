"""An evaluation as the XML that systems of continuous integration read: a test case for each measure."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree as Xml

from sftcli import storage
from sftcli.errors import OutputError
from sftcli.services.evaluate.against import Against
from sftcli.services.evaluate.limits import SCORE_NUMBERS, Limit
from sftcli.services.report.measures import MEASURES

_HINT = "choose another --junit FILE"
_NO_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A measure with its value in words, and what is wrong with it, if anything."""

    name: str
    value: str
    failure: str = ""


def check_place(path: Path) -> None:
    """Make sure that ``path`` can be written, before an evaluation.

    Raises:
        OutputError: It cannot.
    """
    if path.is_dir():
        raise OutputError(f"cannot write {path}: it is a folder", hint=_HINT)
    storage.require_place(path, hint=_HINT)


def cases_of(numbers: Mapping[str, float], limits: Sequence[Limit], against: Against | None) -> list[Case]:
    """Return a case for each measure, those that limits name among them, and for each comparison with an earlier evaluation."""
    measures = [measure.key for measure in MEASURES if measure.key in numbers]
    others = [name for name in numbers if name not in SCORE_NUMBERS]
    named = [limit.metric for limit in limits if limit.metric in numbers]
    names = dict.fromkeys((*measures, *others, *named))
    compared = [] if against is None else list(_compared(against))
    return [
        *(
            Case(name=name, value=f"{numbers[name]:.6g}", failure=_broken(numbers[name], name, limits))
            for name in names
        ),
        *compared,
    ]


def write_junit(cases: Sequence[Case], path: Path, *, model: str) -> None:
    """Write ``cases`` of ``model`` to ``path``, whole or not at all.

    Raises:
        OutputError, StorageError: It cannot be written.
    """
    failures = sum(bool(case.failure) for case in cases)
    counts = {"tests": str(len(cases)), "failures": str(failures), "errors": "0", "skipped": "0"}
    root = Xml.Element("testsuites", {"name": "sft eval", **counts})
    suite = Xml.SubElement(root, "testsuite", {"name": _safe(f"sft eval {model}"), **counts})
    for case in cases:
        element = Xml.SubElement(
            suite, "testcase", {"classname": _safe(f"sft.eval.{model}"), "name": _safe(case.name)}
        )
        if case.failure:
            Xml.SubElement(element, "failure", {"message": _safe(case.failure), "type": "threshold"})
        Xml.SubElement(element, "system-out").text = _safe(case.value)
    Xml.indent(root)
    with storage.whole_file(path, hint=_HINT) as fresh:
        storage.write_file(fresh, [Xml.tostring(root, encoding="utf-8", xml_declaration=True), b"\n"])


def _broken(number: float, name: str, limits: Sequence[Limit]) -> str:
    return "; ".join(filter(None, (limit.fault_of(number) for limit in limits if limit.metric == name)))


def _compared(against: Against) -> Iterator[Case]:
    for moved in against.answers:
        name = f"{moved.measure} against {against.path}"
        yield Case(name=name, value=str(moved), failure=str(moved) if moved.is_worse else "")


def _safe(text: str) -> str:
    """Return ``text`` without the characters that XML cannot hold."""
    return _NO_XML.sub("?", text)
