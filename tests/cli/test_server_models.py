"""Servers as models: ``sft generate`` and ``sft try`` with a URL where a model's name stands, faults of the server included."""

import json
import os
import random
import signal
import sys
from collections import deque
from pathlib import Path

import pytest

from sftcli.cli import app as app_module
from sftcli.services.server import connection
from tests.cli.conftest import write_sums
from tests.support.forked import end_forked, start_forked
from tests.support.model_server import Faults, ModelServer

KEY = "sk-CANARYCANARYCANARYCANARY12"


@pytest.fixture
def faults() -> Faults:
    return Faults()


@pytest.fixture
def server(tiny_model: Path, faults: Faults):
    with ModelServer(tiny_model, faults, echoes=True).serving() as serving:
        yield serving


@pytest.fixture
def model_server(tiny_model: Path):
    with ModelServer(tiny_model).serving() as serving:
        yield serving


@pytest.fixture(autouse=True)
def _hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection.Patience, "__init__", _Hurried.__init__)


class _Hurried:
    def __init__(self) -> None:
        for name, value in {"tries": 8, "first_wait": 0.01, "longest_wait": 0.05, "silence_seconds": 60.0, "request_seconds": 90.0}.items():  # fmt: skip
            object.__setattr__(self, name, value)


def prompts_file(path: Path, count: int = 8) -> Path:
    rows = [{"prompt": f"Tell me of ferry number {number}.", "id": number} for number in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_server_answers_as_the_model_itself(sft, model_server, tiny_model):
    server = model_server
    text = "Name 3 ferries."
    local = sft("generate", text, "-m", tiny_model, "--max-new-tokens", 6, "--precision", "fp32", "--json")
    for name in (f"{server.url}/v1", server.url, f"openai={server.url}", f"llama.cpp={server.url}", f"vllm={server.url}#tiny", f"ollama={server.url}#tiny"):  # fmt: skip
        code, out, err = sft("generate", text, "-m", name, "--max-new-tokens", 6, "--json")
        assert code == 0, err
        ours, theirs = json.loads(local[1]), json.loads(out)
        assert theirs["text"].strip() == ours["text"].strip()
        assert (theirs["prompt_tokens"], theirs["new_tokens"], theirs["finish"]) == (ours["prompt_tokens"], ours["new_tokens"], ours["finish"])  # fmt: skip
        if not name.startswith("ollama"):
            assert theirs["logprob"] == pytest.approx(ours["logprob"], abs=1e-3)


def test_every_prompt_is_answered_once_by_a_server_that_fails_limits_and_truncates(
    sft, server, faults, tmp_path
):
    faults.next = deque([429, 500, "cut", "hang up", "", 503, "slow", "cut", 502])
    code, _, err = sft("generate", "-f", prompts_file(tmp_path / "in.jsonl"), "-o", tmp_path / "out.jsonl",
                       "-m", server.url, "--max-new-tokens", 3)  # fmt: skip
    assert code == 0, err
    rows = lines_of(tmp_path / "out.jsonl")
    assert [row["id"] for row in rows] == list(range(8))
    assert set(server.asked.values()) == {1}
    assert len(server.asked) == 8
    for what in ("429", "500", "cut after", "asking again"):
        assert what in err


def test_a_server_that_always_fails_ends_with_69_and_what_there_is_stays(sft, server, faults, tmp_path):
    faults.next = deque(["", "", "", *[500] * 60])
    command = ("generate", "-f", prompts_file(tmp_path / "in.jsonl"), "-o", tmp_path / "out.jsonl",
               "-m", server.url, "--max-new-tokens", 2)  # fmt: skip
    code, _, err = sft(*command)
    assert (code, "failed 8 times" in err) == (69, True), err
    assert not (tmp_path / "out.jsonl").exists()
    done = sum(server.asked.values())
    assert done >= 3
    faults.next.clear()
    code, out, err = sft(*command, "--json")
    assert (code, json.loads(out)["kept"], json.loads(out)["answered"]) == (0, done, 8 - done), err
    assert set(server.asked.values()) == {1}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_command_that_is_killed_at_twenty_moments_has_each_prompt_once(sft, server, faults, tmp_path):
    prompts, out, count = prompts_file(tmp_path / "in.jsonl", 120), tmp_path / "out.jsonl", 120
    words = [
        "sft",
        "generate",
        "-f",
        prompts,
        "-o",
        out,
        "-m",
        server.url,
        "--max-new-tokens",
        "2",
        "--quiet",
    ]
    assert (
        sft(
            "generate",
            "-f",
            prompts_file(tmp_path / "one.jsonl", 1),
            "-o",
            tmp_path / "one",
            "-m",
            server.url,
        )[0]
        == 0
    )
    server.asked.clear()

    def work() -> None:
        sys.argv = [str(word) for word in words]
        app_module.main()

    draw, children, last = random.Random(3), list[int](), [0]

    def kill(answered: int) -> None:
        if answered >= last[0] and children:
            os.kill(children[-1], signal.SIGKILL)

    server.on_chat = kill
    for _ in range(20):
        faults.next = deque(draw.choices([*[""] * 6, 429, 500, "cut", "hang up"], k=60))
        last[0] = sum(server.asked.values()) + draw.randrange(1, 3)
        children.clear()  # so that no process is killed that has this number later
        children.append(start_forked(work))
        assert end_forked(children[-1]) == -signal.SIGKILL
        assert not out.exists()
    server.on_chat = lambda _: None
    faults.next.clear()
    assert end_forked(start_forked(work)) == 0
    rows = lines_of(out)
    assert [row["id"] for row in rows] == list(range(count))
    assert all(row["answer"] == f"You said: Tell me of ferry number {row['id']}." for row in rows)
    assert sum(server.asked.values()) <= count + 20 * 4  # those under way when it was killed are asked again
    assert not list(tmp_path.glob(".out*"))


@pytest.mark.parametrize(
    ("body", "exit_code"),
    [
        (b"[" * 100_000, 69),
        (b'{"choices": [{"message": {"content": "\\ud800"}, "finish_reason": "stop"}]}', 65),
        (b'{"choices": 3}', 65),
        (b'{"choices": [{"message": {"content": "half', 69),
        (b'{"choices": [{"message": {"content": "x"}}], "usage": {"prompt_tokens": 1e400}}', 65),
        (b"<html>a page</html>", 69),
        (b"x" * (17 << 20), 65),
    ],
)
def test_foreign_answers_are_refused_and_never_believed(sft, server, faults, body, exit_code):
    faults.body = body
    code, out, err = sft("generate", "Hi", "-m", f"{server.url}#tiny", "--max-new-tokens", 2)
    assert (code, out) == (exit_code, "")
    assert len(err) < 3000


def test_text_of_a_server_cannot_command_the_terminal(sft, server, faults):
    faults.refuses = ("temperature",)
    code, _, err = sft("generate", "Hi", "-m", server.url)
    assert (code, "\x1b" in err, "Unsupported parameter" in err) == (65, False, True)
    faults.refuses = ()
    server.models = ["a\x1b[31m", "b"]
    code, _, err = sft("generate", "Hi", "-m", server.url)
    assert (code, "\x1b" in err, "has 2 models" in err) == (2, False, True)


def test_the_key_is_sent_and_never_shown_or_written(sft, server, faults, tmp_path, monkeypatch):
    faults.key = KEY
    command = ("generate", "-f", prompts_file(tmp_path / "in.jsonl", 2), "-o", tmp_path / "out.jsonl",
               "-m", server.url, "--max-new-tokens", 2)  # fmt: skip
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    code, _, err = sft(*command)
    assert (code, "OPENAI_API_KEY" in err) == (77, True)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-WRONGWRONGWRONGWRONG99")
    code, out, err = sft(*command)
    assert (code, "WRONGWRONG" in out + err) == (77, False), err
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    code, out, err = sft(*command, "--keep", "ended")
    assert (code, KEY in out + err) == (0, False)
    assert [
        path for path in tmp_path.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()
    ] == []
    # Ollama takes none, and none leaves this machine unless nobody can read it.
    server.requests.clear()
    faults.key = ""
    assert sft("generate", "Hi", "-m", f"ollama={server.url}#tiny", "--max-new-tokens", 1)[0] == 0
    assert all("Authorization" not in headers for _, _, headers in server.requests)


def test_what_a_server_does_not_know_is_left_out_or_refused_by_name(sft, server, faults, tmp_path):
    faults.refuses = ("logprobs",)
    code, out, err = sft("generate", "Hi", "-m", server.url, "--max-new-tokens", 2, "--json")
    assert (code, json.loads(out)["logprob"], json.loads(out)["confidence"]) == (0, None, None)
    prompts = prompts_file(tmp_path / "in.jsonl")
    code, _, err = sft(
        "generate", "-f", prompts, "-o", tmp_path / "out", "-m", server.url, "--max-new-tokens", 2
    )
    assert (code, len(lines_of(tmp_path / "out"))) == (0, 8), err
    code, _, err = sft("generate", "Hi", "-m", server.url, "--top-k", 5)
    assert (code, "--top-k" in err) == (2, True)
    assert sft("generate", "Hi", "-m", f"vllm={server.url}", "--top-k", 5, "--max-new-tokens", 1)[0] == 0
    assert server.requests[-1][1]["top_k"] == 5
    for flag in (("--tokenizer", "x"), ("--base",), ("--precision", "fp32")):
        assert sft("generate", "Hi", "-m", server.url, *flag)[0] == 2
    training = ("train", "--data", prompts, "--model", server.url)
    for command in (("eval", server.url), ("export", server.url, "--to", "hf"), training):
        code, _, err = sft(*command)
        assert (code, "gives answers and no weights" in err) == (2, True), err


def test_a_prompt_that_is_refused_has_no_answer_and_the_others_have(sft, server, faults, tmp_path):
    faults.next = deque(["", "", "", 400])
    code, _, err = sft("generate", "-f", prompts_file(tmp_path / "in.jsonl"), "-o", tmp_path / "out.jsonl",
                       "-m", server.url, "--max-new-tokens", 2)  # fmt: skip
    rows = lines_of(tmp_path / "out.jsonl")
    assert (code, [row["finish"] for row in rows].count("refused"), len(rows)) == (0, 1, 8), err
    faults.next = deque([400] * 8)
    code, _, err = sft(
        "generate", "-f", tmp_path / "in.jsonl", "-o", tmp_path / "other.jsonl", "-m", server.url
    )
    assert (code, "no prompt has been answered" in err) == (65, True)


@pytest.mark.parametrize("kind", ["llama.cpp", "ollama"])
def test_a_prompt_that_is_longer_than_the_context_is_refused_and_never_cut(
    sft, server, faults, tmp_path, kind
):
    faults.context = 200
    rows = tmp_path / "in.jsonl"
    rows.write_text(
        "".join(json.dumps({"prompt": text}) + "\n" for text in ("Hi", "Count the crates. " * 100))
    )
    code, _, err = sft(
        "generate", "-f", rows, "-o", tmp_path / "out.jsonl", "-m", f"{kind}={server.url}#tiny"
    )
    assert [row["finish"] for row in lines_of(tmp_path / "out.jsonl")] == ["stop", "refused"]
    assert (code, "with 400: request (" in err, "{" in err) == (0, True, False), err


def test_answers_that_pass_a_check_become_rows_that_can_be_trained_on(sft, server, tmp_path, tiny_model):
    rows = prompts_file(tmp_path / "in.jsonl")
    check = tmp_path / "mine.py"
    check.write_text("def even(answer, expected, row):\n    return row['id'] % 2 == 0\n")
    command = ("generate", "-f", rows, "-m", server.url, "--max-new-tokens", 16, "--temperature", 1,
               "--system", "Be brief.", "--samples", 2)  # fmt: skip
    code, out, err = sft(*command, "-o", tmp_path / "taught.jsonl", "--keep", "check", "--check", f"{check}:even", "--json")  # fmt: skip
    assert code == 0, err
    taught = lines_of(tmp_path / "taught.jsonl")
    assert json.loads(out)["rows"] == len(taught)
    assert all(row["line"] % 2 == 1 for row in taught)
    for row in taught:
        assert [turn["role"] for turn in row["messages"]] == ["system", "user", "assistant"]
        assert row["teacher"] == f"openai={server.url}/v1#tiny"
        assert len(row["prompt_sha256"]) == 64
        assert row["date"].startswith("20")
    code, _, err = sft(*command, "-o", tmp_path / "bare.jsonl", "--keep", "ended", "--without-system")
    bare = lines_of(tmp_path / "bare.jsonl")
    assert all(row["messages"][0]["role"] == "user" for row in bare)
    known = {row["line"]: row for row in bare}
    assert all(
        known[row["line"]]["prompt_sha256"] == row["prompt_sha256"] for row in taught if row["line"] in known
    )
    assert (len(taught), len(bare)) == (4, 8)
    code, out, err = sft("prepare", tmp_path / "bare.jsonl", "--model", tiny_model, "--json")
    assert code == 0, err
    assert sum(part["kept"] for part in json.loads(out)["audit"].values()) == 8


def test_checks_compare_with_the_answers_that_rows_have(sft, server, tmp_path):
    rows = write_sums(tmp_path / "sums.jsonl")
    code, _, err = sft("generate", "-f", rows, "-m", server.url, "-o", tmp_path / "out.jsonl", "--max-new-tokens", 2,
                       "--keep", "check")  # fmt: skip
    assert (code, "check: number" in err) == (0, True), err
    assert [row["line"] for row in lines_of(tmp_path / "out.jsonl")] == [1]  # 0 plus 0 is what it repeats
    bare = prompts_file(tmp_path / "bare.jsonl", 2)
    none = (
        "generate",
        "-f",
        bare,
        "-m",
        server.url,
        "-o",
        tmp_path / "none.jsonl",
        "--keep",
        "check",
        "--check",
    )
    code, _, err = sft(*none, "regex:[0-9]{9}")
    assert (code, "none of 2 prompts" in err) == (65, True), err
    asked = server.asked.total()
    code, out, err = sft(*none, "regex:.*ferry.*", "--json")
    assert (code, json.loads(out)["rows"], server.asked.total()) == (0, 2, asked), err
    code, _, err = sft(
        "generate", "-f", bare, "-m", server.url, "-o", tmp_path / "no.jsonl", "--keep", "check"
    )
    assert (code, "no answer to compare with" in err) == (65, True)


def test_prompts_that_nearly_equal_held_out_ones_are_not_asked(sft, server, tmp_path):
    long = (
        "Please write down, word by word and in good order, all that the harbour master of the little town at the river's mouth "
        "told the two travellers from the north about ferry number {}, and why they did not believe him until evening came."
    )
    held, asked = tmp_path / "held.jsonl", tmp_path / "in.jsonl"
    held.write_text(
        json.dumps({"prompt": long.format("seven of the old line, which left at dawn"), "response": "x"})
        + "\n"
    )
    rows = [long.format("seven of the old line, which left at  DAWN"), long.format("seven of the old line, which left at dusk"), "Count the crates."]  # fmt: skip
    asked.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in rows))
    code, _, err = sft("generate", "-f", asked, "-m", server.url, "-o", tmp_path / "out.jsonl", "--max-new-tokens", 1,
                       "--apart-from", held)  # fmt: skip
    assert code == 0, err
    assert [row["line"] for row in lines_of(tmp_path / "out.jsonl")] == [3]
    assert "lines 1, 2" in " ".join(err.split())
    assert [*server.asked] == ["Count the crates."]


def test_a_server_in_a_conversation_keeps_its_turns(server, tmp_path, monkeypatch):
    from typer.testing import CliRunner

    from sftcli.cli.app import app

    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(
        app, ["generate", "--chat", "-m", server.url, "--max-new-tokens", "2"], input="One\nTwo\n/quit\n"
    )
    assert done.exit_code == 0, done.output
    chats = [body for path, body, _ in server.requests if path.endswith("completions")]
    assert [[turn["role"] for turn in body["messages"]] for body in chats] == [
        ["user"],
        ["user", "assistant", "user"],
    ]


def test_a_server_is_tried_with_and_without_examples(sft, server, tiny_model, tmp_path):
    rows = write_sums(tmp_path / "rows.jsonl")
    command = (
        "try",
        rows,
        "--model",
        f"vllm={server.url}",
        "--tokenizer",
        tiny_model,
        "--max-rows",
        3,
        "--shots",
        1,
    )
    code, out, err = sft(*command, "--json", "--set", "data.heldout_fraction=0.2")
    assert code == 0, err
    report = json.loads(out)
    assert report["model"] == f"vllm={server.url}#tiny"
    assert [way["name"] for way in report["ways"]] == ["alone", "random", "nearest"]
    assert "--model" not in report["train_command"]
    chats = [body["messages"] for path, body, _ in server.requests if path.endswith("completions")]
    assert sorted(map(len, chats)) == [1] * 3 + [3] * 6
