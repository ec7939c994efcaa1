"""A row that takes more memory than there is is named before anything works on it, and no process is killed by the system."""

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sftcli.modeling import pass_memory
from sftcli.modeling.pass_memory import PassMemory, measure_pass
from sftcli.runtime import _free_parts, free_memory_bytes

WORDS = "word " * 150
MEGABYTE = 10**6


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    prompts = [*(f"say {number}" for number in range(7)), WORDS, "say no"]
    path.write_text(
        "".join(json.dumps({"prompt": text, "response": "yes"}) + "\n" for text in prompts), encoding="utf-8"
    )
    return path


def say_free(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """Let the machine have so many bytes, wherever the program asks."""
    monkeypatch.setattr("sftcli.runtime._free_parts", lambda: iter([size]))


def eager_train(sft, tiny_model: Path, rows: Path, *more: object):
    return sft("train", "--data", rows, "--model", tiny_model, "--run", "a", "--max-steps", 1, "--set",
               "model.attention=eager", "--set", "data.heldout_fraction=0", "--set", "training.batch_size=9", *more)  # fmt: skip


def test_the_pass_over_a_long_row_is_foreseen_from_short_pieces():
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
                    attn_implementation="eager")
    )  # fmt: skip

    def take(tokens: int) -> None:
        ids = torch.full((1, tokens), 3)
        model(ids, labels=ids).loss.backward()

    foreseen = measure_pass(take, 400)  # pieces of 100, 200 and 400
    with pass_memory._Meter() as meter:
        take(1000)
    assert foreseen.pair > 0
    assert foreseen.at(1000) == pytest.approx(pass_memory.SPARE * meter.peak, rel=0.02)
    assert foreseen.longest(foreseen.at(700)) == 700


def test_no_row_fits_into_nothing():
    assert PassMemory(fixed=10.0, token=1.0, pair=0.0).longest(5) == 0


def test_a_training_row_without_room_is_named_with_what_would_fit(sft, tiny_model, rows, monkeypatch):
    say_free(monkeypatch, 30 * MEGABYTE)
    code, _, err = eager_train(sft, tiny_model, rows)
    assert code == 71, err
    assert f"{rows}:8 has" in err
    assert "training on it takes about" in err
    assert "--overlong drop" in err
    most = err.partition("--max-tokens ")[2].split()[0]
    code, _, err = eager_train(
        sft, tiny_model, rows, "--set", "run.root=more", "--max-tokens", most, "--overlong", "drop"
    )
    assert code == 0, err


def test_micro_batches_are_made_smaller_before_a_step_runs_out_of_memory(
    sft, tiny_model, tmp_path, monkeypatch
):
    foreseen = PassMemory(fixed=0.0, token=MEGABYTE / 10, pair=0.0)
    monkeypatch.setattr("sftcli.services.train.room.measure_pass", lambda *_: foreseen)
    say_free(monkeypatch, 60 * MEGABYTE)
    path = tmp_path / "even.jsonl"
    row = json.dumps({"prompt": "word " * 40, "response": "yes"})
    path.write_text(f"{row}\n" * 9, encoding="utf-8")
    code, _, err = eager_train(sft, tiny_model, path, "--set", "training.packing=off")
    assert code == 0, err
    assert "step 1 would run out of memory: micro-batches of 4 rows from here on" in err
    assert "micro-batches of 2 rows" in err


def test_a_prompt_and_a_held_out_row_without_room_are_named(sft, tiny_model, rows, monkeypatch):
    code, _, err = eager_train(sft, tiny_model, rows)
    assert code == 0, err
    say_free(monkeypatch, MEGABYTE)
    code, _, err = sft("generate", WORDS, "-c", tiny_model, "--precision", "fp32")
    assert code == 71, err
    assert "the prompt has" in err
    code, _, err = sft("eval", "a", "--data", rows, "--no-base", "--max-rows", 2)
    assert code == 71, err
    assert f"{rows}:8 has" in err


def test_limits_of_the_process_count(tmp_path):
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_AS)
    own = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * 4096
    try:
        resource.setrlimit(resource.RLIMIT_AS, (own + 300 * MEGABYTE, before[1]))
        assert 200 * MEGABYTE < free_memory_bytes() < 320 * MEGABYTE
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.parametrize(
    ("lines", "files"),
    [
        ("0::/a/b\n", {"a/b/memory.max": "max", "a/memory.max": "5000", "a/memory.current": "4000",
                       "a/memory.stat": "anon 9\ninactive_file 500\n"}),
        ("4:memory:/x\n0::/\n", {"memory/memory.limit_in_bytes": "5000", "memory/memory.usage_in_bytes": "4000",
                                 "memory/memory.stat": "total_inactive_file 500\n"}),
    ],
)  # fmt: skip
def test_limits_of_control_groups_count(tmp_path, monkeypatch, lines, files):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="ascii")
    (tmp_path / "own").write_text(lines, encoding="ascii")
    monkeypatch.setattr("sftcli.runtime._CONTROL_GROUPS", tmp_path)
    monkeypatch.setattr("sftcli.runtime._OWN_GROUPS", tmp_path / "own")
    assert 1500 in list(_free_parts())
