"""Rendering in processes of its own: what comes out is what one process makes, and none is left behind."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sftcli.config.schema.data import DataSettings, Thinking, TrainOn
from sftcli.data.conversations.messages import Conversation, Message, PlainText, Rejected, RejectReason
from sftcli.data.example import Example, RowFlag
from sftcli.data.reading.record import Origin
from sftcli.errors import DataError, ResourceError, StoppedError
from sftcli.events import NeverStop, Progressed, Session
from sftcli.modeling.tokenizer.chat_tokenizer import load_chat_tokenizer
from sftcli.services.prepare import workers as module
from sftcli.services.prepare.prepare import PreparedData, prepare_data
from sftcli.services.prepare.rendering import BatchRenderer, RenderedBatch, RenderOrder
from sftcli.services.prepare.sources import find_sources
from sftcli.services.prepare.wire import pack, unpack
from sftcli.services.prepare.workers import RenderWorkers, worker_count
from tests.support.recording import RecordingSink, StopAfter
from tests.support.tiny_model import build_tiny_model
from tests.support.tiny_tokenizer import CHATML, build_tiny_tokenizer

PATIENCE = 60.0  # seconds until something is taken for hung
REFUSES = (
    CHATML + "{% if messages[0].content == 'refuse' %}{{ raise_exception('I do not want it') }}{% endif %}"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = build_tiny_model(tmp_path_factory.mktemp("workers") / "model")
    build_tiny_tokenizer(folder, template=REFUSES)
    return folder


@pytest.fixture(autouse=True)
def _at_once(monkeypatch):
    monkeypatch.setattr(module, "ALONE_CHARS", 0)


def order(model: Path, **changes: object) -> RenderOrder:
    values = {
        "max_tokens": 64,
        "cuts": False,
        "allow_control_tokens": frozenset(),
        "compares": True,
        "template": None,
        "variables": {},
        "train_on": TrainOn.ALL,
        "thinking": Thinking.TRAIN,
    }
    return RenderOrder(model_folder=model, **values | changes)


def row(line: int, prompt: str, answer: str, score: float | None = None) -> Conversation:
    turns = (Message(role="user", content=prompt), Message(role="assistant", content=answer, trained=True))
    return Conversation(messages=turns, origin=Origin(path="rows.jsonl", line=line), score=score)


def seen(batch: RenderedBatch) -> object:
    """Return all of a batch as values that can be compared."""
    results = [
        (
            *(getattr(result, name) for name in Example.__slots__ if name not in ("input_ids", "loss_mask")),
            (result.input_ids.dtype.str, result.input_ids.tolist()),
            (result.loss_mask.dtype.str, result.loss_mask.tolist()),
        )
        if isinstance(result, Example)
        else result
        for result in batch.results
    ]
    marks = batch.marks.keys.tolist(), batch.marks.signatures.tolist()
    return results, list(batch.prompts), list(batch.wholes), marks


# What comes out


ODD = st.one_of(
    st.text(max_size=40), st.sampled_from(["", " \n", "<|im_end|>", "refuse", "Ã©", "\ufffd", "a " * 90])
)
ROWS = st.lists(
    st.one_of(
        st.builds(row, st.integers(1, 9), ODD, ODD, st.one_of(st.none(), st.floats(allow_nan=False))),
        st.builds(lambda text: PlainText(text=text, origin=Origin(path="t", line=1)), ODD),
        st.just(Rejected(origin=Origin(path="r", line=2), reason=RejectReason.ROLE_ORDER, detail="why", remedy="so")),
    ),
    max_size=9,
)  # fmt: skip


@pytest.fixture(scope="module", params=[False, True], ids=["reject", "cut"])
def both(request, model) -> Iterator[tuple[BatchRenderer, RenderWorkers]]:
    tokenizer, how = load_chat_tokenizer(model), order(model, cuts=request.param)
    with RenderWorkers(tokenizer, how, count=2, stop=NeverStop()) as workers:
        workers._chars_left = 0
        yield BatchRenderer(tokenizer, how), workers


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(batches=st.lists(ROWS, max_size=9))
def test_odd_rows_are_the_same_from_workers_and_in_the_same_order(both, batches):
    own, workers = both
    assert [seen(batch) for batch in workers.render(batches)] == [seen(own.render(rows)) for rows in batches]


def test_row_that_is_held_on_to_keeps_none_of_the_others_in_memory(model):
    rows = [row(line, "say", "yes " * line) for line in range(1, 9)]
    back = unpack(pack(BatchRenderer(load_chat_tokenizer(model), order(model)).render(rows)))
    assert len(back.kept) == len(rows)
    assert all(array.base is None for kept in back.kept for array in (kept.input_ids, kept.loss_mask))


def prepared(
    model: Path, folder: Path, workers: int, **changes: object
) -> tuple[PreparedData, RecordingSink]:
    os.environ["SFT_CACHE_DIR"] = str(folder)
    data, sink = DataSettings(**changes), RecordingSink()
    session = Session(sink, NeverStop())
    made = prepare_data(
        data, find_sources(data), model_folder=model, seed=3, session=session, workers=workers
    )
    return made, sink


@pytest.mark.parametrize(
    "more",
    [{}, {"heldout_sources": ("held.jsonl",), "allow_leak": True}, {"heldout_fraction": 0.2, "overlong": "truncate"}],
    ids=["split", "named", "cut"],
)  # fmt: skip
def test_store_audit_and_events_are_the_same_with_any_number_of_workers(model, tmp_path, monkeypatch, more):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sftcli.data.rendering.render.ROWS_PER_BATCH", 16)
    texts = ["yes", "", "refuse", "yes " * 70, "<|im_start|>", "Ã©t\u00e9", "東京"]
    rows = [{"question": f"Is {n % 150} it?", "answer": f"{texts[n % 7]} {n % 50}"} for n in range(400)]
    rows[5]["question"] = "refuse"
    rows += [{"question": None, "answer": "x"}, *rows[:20]]
    Path("a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in rows))
    Path("b.jsonl").write_text("".join(json.dumps(line) + "\n" for line in rows[::3]))
    Path("held.jsonl").write_text("".join(json.dumps(line) + "\n" for line in rows[::9]))
    monkeypatch.setenv("SFT_CACHE_DIR", "")
    outcomes = []
    for count in (0, 1, 2, 3):
        made, sink = prepared(
            model, tmp_path / f"cache{count}", count, sources=("a.jsonl:x2", "b.jsonl:70%"), max_tokens=64, **more
        )  # fmt: skip
        files = {path.name: path.read_bytes() for path in made.dataset.folder.iterdir()}
        outcomes.append((files, [event for event in sink.events if isinstance(event, Progressed)]))
    assert outcomes[1:] == outcomes[:1] * 3
    audit = made.audit["train"]
    assert audit.rejected["template-refused"]
    assert audit.flags[RowFlag.CONTROL_TEXT]
    assert audit.duplicate_rows


def test_workers_begin_only_where_there_is_text_enough(model, monkeypatch):
    monkeypatch.setattr(module, "ALONE_CHARS", 1000)
    few, many = ([[row(1, "u" * 100, "a")] for _ in range(count)] for count in (8, 40))
    with RenderWorkers(load_chat_tokenizer(model), order(model), count=2, stop=NeverStop()) as workers:
        assert len(list(workers.render(few))) == 8
        assert not workers._workers
        assert len(list(workers.render(many))) == 40
        assert len(workers._workers) == 2


# What goes wrong


def killed_on_the_way(workers: RenderWorkers) -> None:
    """Render rows without end, and kill a worker meanwhile."""
    batches = ([row(line, f"u{line}", "a")] for line in range(1, 10_000))
    for number, _ in enumerate(workers.render(batches)):
        if number == 20:
            workers._workers[1].kill()


def test_worker_that_is_killed_is_an_error_by_name_and_the_others_are_ended(model):
    tokenizer = load_chat_tokenizer(model)
    with (
        RenderWorkers(tokenizer, order(model), count=2, stop=NeverStop()) as workers,
        pytest.raises(ResourceError) as caught,
    ):
        killed_on_the_way(workers)
    assert caught.value.message == "a process that renders rows was killed by SIGKILL; nothing was kept"
    assert "memory runs out" in caught.value.hint
    assert [worker.returncode for worker in workers._workers] == [-signal.SIGKILL] * 2


def test_worker_that_dies_where_a_stop_was_asked_for_is_a_stop(model):
    tokenizer = load_chat_tokenizer(model)
    with (
        RenderWorkers(tokenizer, order(model), count=2, stop=StopAfter(0)) as workers,
        pytest.raises(StoppedError),
    ):
        killed_on_the_way(workers)


def test_what_goes_wrong_in_a_worker_is_raised_here(model):
    tokenizer = load_chat_tokenizer(model)
    with (
        RenderWorkers(tokenizer, order(model), count=1, stop=NeverStop()) as workers,
        pytest.raises(RuntimeError, match="NoneType"),
    ):
        list(workers.render([[row(1, "u", None)]]))  # which no reader makes


def test_worker_that_finds_another_tokenizer_refuses(model):
    tokenizer = load_chat_tokenizer(model)
    tokenizer.fingerprint = "another"
    with (
        RenderWorkers(tokenizer, order(model), count=1, stop=NeverStop()) as workers,
        pytest.raises(DataError, match="the tokenizer or the template in"),
    ):
        list(workers.render([[row(1, "u", "a")]]))


# The command


SCRIPT = """
import sys
from sftcli.services.prepare import prepare, workers
from sftcli.__main__ import main
prepare.worker_count = lambda: 2
workers.ALONE_CHARS = 0
sys.argv[0] = "sft"
main()
"""


def children_of(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []


def is_there(pid: int) -> bool:
    """Return whether a process runs; one that ended and waits for its parent does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until(holds) -> None:
    end = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < end
        os.sched_yield()


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="there is no /proc to see processes in")
@pytest.mark.parametrize(
    ("number", "group", "code"),
    [
        (signal.SIGTERM, False, 143),
        (signal.SIGINT, True, 130),
        (signal.SIGKILL, False, -9),
        (signal.SIGKILL, True, -9),
    ],
)
def test_no_worker_outlives_the_command_whatever_ends_it(model, tmp_path, number, group, code):
    rows = [json.dumps({"question": f"Is {n} it? {'why ' * 40}", "answer": "yes"}) for n in range(30_000)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    command = [sys.executable, "-c", SCRIPT, "prepare", "rows.jsonl", "--model", str(model)]
    environ = os.environ | {"SFT_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        command, cwd=tmp_path, env=environ, start_new_session=True, stderr=subprocess.PIPE, text=True
    ) as process:
        wait_until(lambda: len(children_of(process.pid)) == 2 or process.poll() is not None)
        workers = children_of(process.pid)
        assert len(workers) == 2
        (os.killpg if group else os.kill)(process.pid, number)
        _, err = process.communicate(timeout=PATIENCE)
    assert (process.returncode, "Traceback" in err) == (code, False), err
    wait_until(lambda: not any(map(is_there, workers)))
    if number != signal.SIGKILL:
        assert "nothing was kept" in err
        assert list((tmp_path / "cache" / "prepared").iterdir()) == []


@pytest.mark.parametrize(
    ("cores", "several", "count"), [(2, 0, 0), (3, 0, 0), (4, 0, 3), (16, 4, 3), (16, 8, 0), (64, 0, 8)]
)
def test_workers_of_all_processes_of_a_machine_share_its_cores(monkeypatch, cores, several, count):
    monkeypatch.setattr(module, "cpu_count", lambda: cores)
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    if several:
        shape = {"WORLD_SIZE": several, "LOCAL_WORLD_SIZE": several, "RANK": 0, "MASTER_PORT": 1}
        for name, value in {**shape, "MASTER_ADDR": "here"}.items():
            monkeypatch.setenv(name, str(value))
    assert worker_count() == count
