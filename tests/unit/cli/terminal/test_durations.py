"""Times as people write them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sftcli.figures import seconds_of, whole_duration


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90s", 90), ("30m", 1800), ("1h30m", 5400), ("2d", 172800), ("1.5s", 1.5), (" 1H05M ", 3900)],
)
def test_times_are_read(text, seconds):
    assert seconds_of(text) == seconds


@given(st.integers(1, 3599))
def test_what_is_shown_can_be_read(seconds):
    assert seconds_of(whole_duration(seconds)) == seconds


@pytest.mark.parametrize("text", ["", "30", "m30", "1h 30m", "0s", "-5m", "30min", "1m2h", "nan", "1.5m"])
def test_what_is_no_time_is_refused(text):
    with pytest.raises(ValueError, match="is not a time such as 90s, 30m or 1h30m"):
        seconds_of(text)
