"""Who hears nothing of another machine ends, with the code of a lost process."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch.distributed as dist

from sftcli.services.processes import pulse
from sftcli.services.processes.pulse import FAILURE, Pulse

BEAT = 0.01


@dataclass
class Ending:
    """What a pulse has said and done."""

    texts: list[str] = field(default_factory=list)
    codes: list[int] = field(default_factory=list)

    def of(self, words: object, rank: int, size: int = 2) -> Pulse:
        return Pulse(
            words, rank=rank, size=size, tell=self.texts.append, end=self.codes.append, beat_seconds=BEAT
        )


class GoneStore(dist.HashStore):
    """Gives no answer any more."""

    def check(self, _keys: object) -> bool:
        time.sleep(5)
        return False


class BrokenStore(dist.HashStore):
    def check(self, _keys: object) -> bool:
        raise dist.DistNetworkError("connection reset")


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pulse, "SILENT_BEATS", 5)
    monkeypatch.setattr(pulse, "GRACE_BEATS", 5)


def within(seconds: float, is_so: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and not is_so():
        time.sleep(BEAT)
    return is_so()


def test_processes_that_beat_end_nobody():
    words, endings = dist.HashStore(), [Ending(), Ending()]
    with endings[0].of(words, 0), endings[1].of(words, 1):
        assert not within(20 * BEAT, lambda: bool(endings[0].codes or endings[1].codes))


def test_first_process_misses_one_that_fell_silent_and_leaves_word_of_it():
    words, ending, other = dist.HashStore(), Ending(), Ending()
    with ending.of(words, 0, size=3), other.of(words, 1, size=3):
        assert within(3, lambda: ending.codes == [71])
    assert "nothing was heard of process 2 of 3" in ending.texts[0]
    assert json.loads(words.get(FAILURE))["exit_code"] == 71


def test_process_that_cannot_end_after_the_failure_of_another_is_ended():
    words, ending = dist.HashStore(), Ending()
    words.set(FAILURE, "{}")
    with ending.of(words, 1):
        assert within(3, lambda: ending.codes == [71])
    assert "could not end" in ending.texts[0]


@pytest.mark.parametrize("store", [GoneStore, BrokenStore])
def test_others_miss_the_store_of_the_first_process(store):
    ending = Ending()
    with ending.of(store(), 1):
        assert within(3, lambda: ending.codes == [71])
