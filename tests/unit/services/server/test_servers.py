"""Names of servers, where a key goes, and several requests at once."""

import threading
import time

import pytest

from sftcli.errors import NetworkError, StoppedError, UsageError
from sftcli.events import NeverStop, Warned
from sftcli.services.server.address import ServerKind, names_server, parse_server
from sftcli.services.server.connection import KEY_VARIABLE, Connection
from sftcli.services.server.several import KeptEvents, ask_several
from tests.support.recording import RecordingSink


@pytest.mark.parametrize(
    ("text", "kind", "url", "model"),
    [
        ("http://localhost:8080/v1", "openai", "http://localhost:8080/v1", ""),
        ("https://api.example.org", "openai", "https://api.example.org/v1", ""),
        ("openai=https://api.example.org/v1/#big", "openai", "https://api.example.org/v1", "big"),
        ("openai=http://h/proxy/v2", "openai", "http://h/proxy/v2", ""),
        ("llama.cpp=http://localhost:8080/v1/", "llama.cpp", "http://localhost:8080", ""),
        ("vllm=HTTP://[::1]:8000", "vllm", "http://[::1]:8000", ""),
        ("ollama=hf.co/me/my:Q4_K_M", "ollama", "http://127.0.0.1:11434", "hf.co/me/my:Q4_K_M"),
        ("ollama=http://far:1234#my", "ollama", "http://far:1234", "my"),
    ],
)
def test_a_name_is_read(text, kind, url, model):
    address = parse_server(text, {})
    assert (address.kind, address.url, address.model) == (ServerKind(kind), url, model)
    assert names_server(text)
    assert parse_server(str(address), {}) == address


@pytest.mark.parametrize(
    ("host", "url"),
    [("0.0.0.0", "http://127.0.0.1:11434"), ("far:99", "http://far:99"), ("https://far", "https://far")],
)
def test_ollama_is_where_its_own_variable_says(host, url):
    assert parse_server("ollama=my", {"OLLAMA_HOST": host}).url == url


@pytest.mark.parametrize(
    "text",
    ["openai=", "openai=x", "openai=ftp://x", "http://", "http://me:secret@host", "http://host/?key=secret",
     "http://host:port", "http://ho st", "ollama=http://host", "vllm=http://h\x1b[2J"],
)  # fmt: skip
def test_what_is_no_name_is_refused_without_its_secret(text):
    with pytest.raises(UsageError) as caught:
        parse_server(text, {})
    assert "secret@" not in caught.value.message


def test_names_of_models_are_no_servers():
    assert not any(
        map(names_server, ["my-run", "runs/one", "Qwen/Qwen3-0.6B", "smollm2-135m", "a=b", "x.gguf"])
    )


@pytest.mark.parametrize(
    ("text", "is_sent"),
    [
        ("https://far.example.org/v1", True),
        ("http://localhost:8080", True),
        ("http://127.8.1.1:8080", True),
        ("http://far.example.org/v1", False),
        ("http://10.0.0.5/v1", False),
        ("ollama=http://localhost:1#m", False),
    ],
)
def test_a_key_goes_only_where_nobody_reads_along(text, is_sent):
    sink = RecordingSink()
    connection = Connection(parse_server(text, {}), sink, NeverStop(), environ={KEY_VARIABLE: "sk-abc"})
    assert (connection._key == "sk-abc") is is_sent
    assert bool(sink.of(Warned)) is (not is_sent and "ollama" not in text)


def test_several_are_asked_at_once_and_each_once():
    together = threading.Barrier(3, timeout=5)
    asked = []

    def ask(number: int) -> int:
        together.wait()
        asked.append(number)
        return number * number

    assert sorted(ask_several(ask, 9, NeverStop(), at_once=3)) == [(n, n * n) for n in range(9)]
    assert sorted(asked) == list(range(9))
    assert list(ask_several(ask, 0, NeverStop())) == []


def test_a_failure_is_raised_behind_the_answers_that_came():
    def ask(number: int) -> int:
        if number == 4:
            raise NetworkError("gone")
        time.sleep(0.01)
        return number

    found = list[int]()
    answers = ask_several(ask, 100, NeverStop(), at_once=2)
    with pytest.raises(NetworkError, match="gone"):
        found.extend(number for number, _ in answers)
    assert len(found) < 20
    assert len(found) == len(set(found))


def test_a_stop_begins_no_other():
    class Stop(NeverStop):
        is_set = False

        def requested(self) -> bool:
            return self.is_set

    stop, asked = Stop(), []

    def ask(number: int) -> int:
        asked.append(number)
        if number == 3:
            stop.is_set = True
            raise StoppedError
        return number

    assert [number for number, _ in ask_several(ask, 50, stop, at_once=1)] == [0, 1, 2]
    assert asked == [0, 1, 2, 3]


def test_what_threads_say_is_told_by_the_one_that_waits():
    told = []
    events = KeptEvents(lambda event: told.append((event.text, threading.get_ident())))

    def ask(number: int) -> int:
        events(Warned(text=f"{number}"))
        return number

    assert len(list(ask_several(ask, 5, NeverStop(), tell=events.tell))) == 5
    events(Warned(text="own"))
    assert sorted(told) == sorted([(text, threading.get_ident()) for text in (*"01234", "own")])
