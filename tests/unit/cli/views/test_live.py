import io
import re
import sys
from collections.abc import Iterator

import pytest
from rich.console import Console

from sftcli.cli.views.live import LiveView
from sftcli.events import Ending, FitEnded, FitStarted, HeldoutDone, Notice, Progressed, StepDone, TextDelta
from tests.support.fake_run import run_events, step_done
from tests.support.golden import assert_golden


class Screen:
    """Just enough of a terminal: text, line ends, carriage return, cursor up, erase line, hide and show the cursor."""

    def __init__(self) -> None:
        self.rows: list[str] = [""]
        self.row = 0
        self.has_cursor = True

    def feed(self, text: str) -> None:
        for escape, plain in re.findall(r"(\x1b\[[0-9;?]*[A-Za-z])|([^\x1b]+)", text):
            if escape:
                self.control(escape)
            for char in plain:
                self.put(char)

    def put(self, char: str) -> None:
        if char == "\n":
            self.row += 1
            if self.row == len(self.rows):
                self.rows.append("")
        elif char != "\r":
            self.rows[self.row] += char

    def control(self, escape: str) -> None:
        if escape.endswith("A"):
            self.row -= int(escape[2:-1] or 1)
        elif escape == "\x1b[2K":
            self.rows[self.row] = ""
        elif escape in {"\x1b[?25l", "\x1b[?25h"}:
            self.has_cursor = escape.endswith("h")
        else:
            raise AssertionError(f"the view sent {escape!r}")

    def text(self) -> str:
        return "".join(row + "\n" for row in self.rows).rstrip("\n") + "\n"


class Rig:
    """A live view on a screen, with a clock that stands still."""

    def __init__(self, *, columns: int = 80, color: bool = False, encoding: str = "utf-8") -> None:
        self.now = 1000.0
        self.binary = io.BytesIO()
        self.console = Console(
            file=io.TextIOWrapper(self.binary, encoding=encoding, newline="\n", write_through=True),
            force_terminal=True,
            color_system="standard" if color else None,
            width=columns,
            height=24,
            markup=False,
            highlight=False,
            emoji=False,
            _environ={},
        )
        self.view = LiveView(console=self.console, get_time=lambda: self.now, auto_refresh=False)
        self.encoding = encoding

    def sent(self) -> str:
        return self.binary.getvalue().decode(self.encoding)

    def screen(self) -> Screen:
        screen = Screen()
        screen.feed(self.sent())
        return screen


@pytest.fixture(params=[60, 100])
def wide_rig(request: pytest.FixtureRequest) -> Iterator[Rig]:
    rig = Rig(columns=request.param)
    rig.view.open()
    yield rig
    rig.view.close()


def play(rig: Rig, *, until_step: int = 1000) -> None:
    for event in run_events():
        if isinstance(event, StepDone):
            if event.step > until_step:
                return
            rig.now += event.seconds
        rig.view(event)
        rig.view.refresh()


def test_a_run_looks_good_in_the_middle_and_at_the_end(wide_rig: Rig) -> None:
    play(wide_rig, until_step=52)
    middle = wide_rig.screen().text()
    wide_rig = Rig(columns=wide_rig.console.width)
    play(wide_rig)
    wide_rig.view.close()
    end = wide_rig.screen().text()
    assert_golden(f"views/live-{wide_rig.console.width}.txt", f"# middle\n{middle}\n# end\n{end}")


def test_of_two_trainings_each_has_a_panel_of_its_own() -> None:
    rig = Rig()
    play(rig)
    first = rig.screen().text()
    panel = [line for line in first.splitlines() if line.startswith("train ")]
    play(rig, until_step=3)
    both = rig.screen().text()
    assert len(panel) == 1
    panels = [line for line in both.splitlines() if line.startswith("train ")]
    assert panels[0] == panel[0]
    assert len(panels) == 2
    assert rig.view.measures.step == 3
    rig.view.close()


def test_the_cursor_comes_back() -> None:
    rig = Rig()
    play(rig, until_step=3)
    assert not rig.screen().has_cursor
    rig.view.close()
    assert rig.screen().has_cursor


def test_nothing_is_sent_when_nothing_changed() -> None:
    rig = Rig()
    play(rig, until_step=3)
    sent = rig.sent()
    rig.view.refresh()
    rig.view.refresh()
    assert rig.sent() == sent


def test_bars_leave_no_trace() -> None:
    rig = Rig()
    rig.view(Notice(text="before"))
    for done in (0, 50, 100):
        rig.view(Progressed(task="reading", done=done, total=100))
        rig.view.refresh()
    rig.view(Notice(text="after"))
    rig.view.close()
    assert rig.screen().text() == "before\nafter\n"


def test_the_panel_makes_room_for_an_answer() -> None:
    rig = Rig()
    rig.view(Progressed(task="loading", done=1, total=3))
    rig.view(TextDelta(text="half a line"))
    rig.view.refresh()
    rig.view(Progressed(task="loading", done=2, total=3))
    assert rig.screen().text() == "\n"
    rig.view(TextDelta(text=", the rest\n"))
    rig.view.refresh()
    assert "loading" in rig.screen().text()
    rig.view.close()


def test_a_stop_request_is_answered_in_the_panel() -> None:
    rig = Rig()
    play(rig, until_step=3)
    rig.view.show_stopping()
    assert rig.screen().rows[-1] == "stopping after this step; press Ctrl-C again to quit now"
    rig.view.close()
    assert "stopping" not in rig.screen().text()


def test_a_stop_request_without_a_panel_is_answered_on_a_line() -> None:
    rig = Rig()
    rig.view.show_stopping()
    assert rig.screen().text() == "stopping; press Ctrl-C again to quit now\n"


def test_time_moves_during_a_long_step() -> None:
    rig = Rig()
    rig.view(FitStarted(step=0, last_step=10))
    rig.view(step_done(1, seconds=10))
    rig.view.refresh()
    rig.now += 30
    rig.view.refresh()
    assert "1m00s left" in rig.screen().rows[0]
    rig.view.close()


def test_the_time_of_an_evaluation_is_taken_off_once() -> None:
    rig = Rig()
    rig.view(HeldoutDone(step=0, loss=2.0, response_tokens=1, seconds=25))
    rig.view(FitStarted(step=0, last_step=10))
    rig.view(step_done(5, seconds=10))
    rig.now += 25
    rig.view(HeldoutDone(step=5, loss=1.0, response_tokens=1, seconds=25))
    rig.view.refresh()
    assert "1m15s left" in rig.screen().rows[0]  # five steps and one more evaluation
    rig.view.close()


def test_a_narrower_window_leaves_no_half_lines() -> None:
    rig = Rig(columns=120)
    play(rig, until_step=52)
    widths = [len(row) for row in rig.screen().rows[-8:]]
    before = len(rig.sent())
    rig.console.width = 60
    rig.view.refresh()
    wrapped = sum(-(-width // 60) for width in widths if width)
    assert rig.sent()[before:].count("\x1b[1A") == wrapped - 1
    rig.view.close()


def test_what_others_print_goes_above_the_panel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    rig = Rig()
    rig.view(FitStarted(step=0, last_step=10))
    sys.stderr.write("a library says hello\n")
    rows = rig.screen().rows
    assert (rows[0], rows[1][:5]) == ("a library says hello", "train")
    rig.view.close()
    assert isinstance(sys.stderr, io.StringIO)


def test_a_closed_terminal_does_not_end_the_work() -> None:
    rig = Rig()
    play(rig, until_step=3)
    rig.console.file.close()
    play(rig)
    rig.view.close()


def test_every_sign_can_be_written_in_ascii() -> None:
    rig = Rig(encoding="ascii")
    play(rig)
    rig.view.close()
    assert r"\u2603" in rig.screen().text()


def test_no_byte_from_data_reaches_the_terminal() -> None:
    rig = Rig(color=True)
    play(rig)
    rig.view.close()
    assert set(re.findall(r"\x1b(?!\[[0-9;?]*[mAKhl])", rig.sent())) == set()
    assert not re.search("[\x07\x9b\u202e]", rig.sent())
    assert "[bold]red" in rig.sent()


def test_a_long_silence_has_a_sign_that_moves_until_there_is_news() -> None:
    rig = Rig()
    rig.view(Notice(text="loading torch and transformers"))
    rig.view.refresh()
    assert "still at it" not in rig.screen().text()
    for seconds in (3, 5):
        rig.now += seconds
        rig.view.refresh()
    assert "still at it, 8s" in rig.screen().text()
    rig.view(Notice(text="done"))
    rig.view.refresh()
    assert rig.screen().text().split() == ["loading", "torch", "and", "transformers", "done"]
    rig.now += 5
    rig.view.close()
    assert "still at it" not in rig.screen().text()


def test_a_command_that_says_nothing_at_first_has_a_sign_that_moves() -> None:
    rig = Rig()
    rig.view.open()
    rig.now += 3
    rig.view.refresh()
    assert "still at it, 3s" in rig.screen().text()
    rig.view.close()
    assert rig.screen().text().strip() == ""


def test_what_comes_behind_a_training_has_a_sign_that_moves() -> None:
    rig = Rig()
    rig.view(FitStarted(step=0, last_step=2))
    rig.view(Progressed(task="waiting for the checkpoint of step 2", done=0, total=0))
    for seconds in ("5s", "10s"):
        rig.now += 5
        rig.view.refresh()
        assert f"waiting for the checkpoint of step 2 {seconds}" in rig.screen().text()
    rig.view(Progressed(task="waiting for the checkpoint of step 2", done=1, total=1))
    rig.view(FitEnded(step=2, ending=Ending.FINISHED))
    rig.now += 5
    rig.view.refresh()
    assert "still at it, 5s" in rig.screen().text()
    rig.view.close()
    assert "still at it" not in rig.screen().text()
    assert "waiting" not in rig.screen().text()


def test_a_stop_that_is_asked_for_in_a_silence_is_answered_at_once() -> None:
    rig = Rig()
    rig.view(Notice(text="loading torch and transformers"))
    rig.now += 5
    rig.view.refresh()
    rig.view.show_stopping()
    assert "stopping" in rig.screen().text()
    rig.now += 5
    rig.view.refresh()
    assert "stopping" in rig.screen().text()


def test_a_stop_within_an_answer_leaves_the_answer_as_it_is() -> None:
    rig = Rig()
    rig.view(TextDelta(text="It is a"))
    rig.view.show_stopping()
    assert "stopping" not in rig.screen().text()
