"""Charts: steps are whole, and an axis that begins at 0 where a part of it would mislead."""

import re

from sftcli.services.report.charts import Series, draw


def labels(svg: str, axis: str) -> list[float]:
    """Return the numbers along an axis, by the ids that are given to its marks."""
    marks = re.findall(rf'<g id="c-{axis}tick_\d+">.*?<text[^>]*>([^<]*)</text>', svg, re.DOTALL)
    return [float(mark.replace("\N{MINUS SIGN}", "-")) for mark in marks]


def chart(*, from_zero: bool) -> str:
    series = [Series(name="memory", x=[1, 2, 3, 4], y=[3.05, 3.2, 3.3, 3.35], color=0)]
    return draw("Peak memory", series, y_label="GB", from_zero=from_zero, identity="c")


def test_steps_are_whole_numbers():
    steps = labels(chart(from_zero=True), "x")
    assert len(steps) > 2
    assert all(step == round(step) for step in steps)


def test_an_axis_begins_at_zero_where_it_is_asked_to():
    assert min(labels(chart(from_zero=True), "y")) == 0
    assert min(labels(chart(from_zero=False), "y")) > 3
