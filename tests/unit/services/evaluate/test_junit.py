"""The XML for systems of continuous integration."""

from xml.etree import ElementTree as Xml

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sftcli.errors import UsageError
from sftcli.services.evaluate.junit import Case, cases_of, write_junit
from sftcli.services.evaluate.limits import read_limits

cases = st.lists(st.builds(Case, name=st.text(), value=st.text(), failure=st.text()), max_size=5)


@given(cases, st.text())
def test_any_text_makes_xml_that_can_be_read_back(tmp_path_factory, found, model):
    path = tmp_path_factory.mktemp("junit") / "eval.xml"
    write_junit(found, path, model=model)
    root = Xml.parse(path).getroot()
    assert (root.tag, root.get("tests")) == ("testsuites", str(len(found)))
    assert root.get("failures") == str(sum(bool(case.failure) for case in found))
    assert len(list(root.iter("failure"))) == sum(bool(case.failure) for case in found)


def test_each_measure_is_a_case_and_broken_limits_fail_theirs():
    numbers = {"loss": 1.5, "match_fraction": 0.25, "seconds": 3.0, "rows": 7.0, "fields.city": 0.5}
    limits = read_limits(["loss=1", "loss=2"], ["fields.city=0.9", "seconds=1"])
    found = {case.name: case for case in cases_of(numbers, limits, None)}
    assert list(found) == ["loss", "match_fraction", "fields.city", "seconds"]
    assert found["loss"].failure == "loss is 1.5, above 1"
    assert found["fields.city"].failure == "fields.city is 0.5, under 0.9"
    assert (found["match_fraction"].failure, found["seconds"].failure) == ("", "")
    assert found["loss"].value == "1.5"


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_a_limit_that_no_number_breaks_is_refused(value):
    with pytest.raises(UsageError, match="expected METRIC=VALUE"):
        read_limits([f"loss={value}"], [])
