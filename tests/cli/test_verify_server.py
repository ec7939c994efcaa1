"""``sft export --verify-server``: a server that answers as the model was trained to passes, and each planted fault is named."""

import json
from pathlib import Path

import pytest

from sftcli.services.verify.answers import OFF
from tests.cli.conftest import write_sums
from tests.support.model_server import Faults, ModelServer
from tests.support.runs import StopAtStep, settings_of, train

OTHER = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


@pytest.fixture(scope="module")
def trained(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs with a run whose answers are sure of themselves."""
    folder = tmp_path_factory.mktemp("served")
    write_sums(folder / "rows.jsonl")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SFT_CACHE_DIR", str(folder / "cache"))
        sets = ("run.name=one", "training.epochs=10", "training.batch_size=8", "training.micro_batch_size=8",
                "training.learning_rate=2e-2", "training.eval_every_steps=0", "checkpoint.every_steps=0")  # fmt: skip
        assert train(settings_of(folder, tiny_model, *sets), StopAtStep(9999)).final is not None
    return folder / "runs"


@pytest.fixture
def verify(sft, trained, monkeypatch):
    monkeypatch.setenv("SFT_CACHE_DIR", str(trained.parent / "cache"))

    def run(kind: str, faults: Faults, *more: object) -> tuple[int, str, str]:
        with ModelServer(trained / "one" / "final", faults).serving() as server:
            monkeypatch.setenv("OLLAMA_HOST", server.url)
            url = {"ollama": "ollama=tiny", "openai": f"openai={server.url}/v1"}.get(
                kind, f"{kind}={server.url}"
            )
            code, out, err = sft("export", "one", "--runs", trained, "--verify-server", url,
                                 "--verify-rows", 6, *more)  # fmt: skip
            return code, " ".join(out.split()), " ".join(err.split())

    return run


@pytest.mark.parametrize("kind", ["llama.cpp", "vllm", "openai", "ollama"])
def test_a_server_of_the_same_model_gives_its_answers(verify, kind):
    code, out, err = verify(kind, Faults())
    assert (code, "6 of 6" in out) == (0, True), (out, err)


@pytest.mark.parametrize("kind", ["llama.cpp", "vllm"])
def test_a_planted_system_message_is_found_with_its_text(verify, kind):
    code, out, err = verify(kind, Faults(system="Speak like a pirate."))
    assert code == 3
    assert "6 of 6 prompts differ: the server puts a system message in front" in out
    assert "'Speak like a pirate.'" in out
    assert "6 of 6 prompts differ" in err


def test_a_planted_system_message_is_found_by_what_a_server_counts(verify):
    code, out, _ = verify("openai", Faults(system="Speak like a pirate."))
    assert (code, "tokens more than ours" in out) == (3, True), out


@pytest.mark.parametrize("kind", ["llama.cpp", "vllm", "ollama"])
def test_another_template_is_found(verify, kind, tmp_path):
    (tmp_path / "other.jinja").write_text(OTHER)
    code, out, _ = verify(kind, Faults(template=str(tmp_path / "other.jinja")))
    assert code == 3
    assert "6 of 6 prompts differ: the server has another chat template" in out
    assert "where the server has" in out


@pytest.mark.parametrize("kind", ["llama.cpp", "openai", "ollama"])
def test_a_missing_stop_token_is_found(verify, kind):
    code, out, _ = verify(kind, Faults(stops=False))
    assert code == 3
    assert "answers differ: the server does not stop where the answer ends" in out
    assert "'<|im_end|>'" in out
    assert "prompts differ" not in out


@pytest.mark.parametrize("kind", ["llama.cpp", "ollama"])
def test_a_context_that_is_too_small_for_the_answers_is_found(verify, kind):
    code, out, _ = verify(kind, Faults(room=3))
    assert code == 3
    assert "6 of 6 answers differ: the server cuts answers" in out
    assert "rounded too coarsely" not in out


def test_a_system_message_that_ollama_puts_in_front_is_found_where_it_shows_its_prompts_and_where_it_does_not(
    verify,
):
    for shows, how in ((True, "prompts are compared as text"), (False, "answers alone are compared")):
        code, out, err = verify("ollama", Faults(system="Speak like a pirate.", shows_prompts=shows))
        assert (code, how in err) == (3, True), err
        assert "6 of 6 prompts differ: the server puts a system message in front" in out


def test_weights_that_are_rounded_too_coarsely_are_found_and_those_of_8_bits_are_not(verify):
    code, out, err = verify("llama.cpp", Faults(bits=8), "--json")
    assert code == 0, (out, err)
    assert json.loads(out)["verified"]["mean_logprob_difference"] < OFF / 5
    code, out, _ = verify("llama.cpp", Faults(bits=3))
    assert code == 3
    assert "rounded too coarsely" in out
    assert "prompts differ" not in out


def test_a_difference_is_one_object_for_scripts_too(verify):
    code, out, _ = verify("vllm", Faults(), "--json")
    verified = json.loads(out)["verified"]
    assert (code, verified["prompts"], verified["findings"]) == (0, "ids", [])
    code, out, _ = verify("vllm", Faults(stops=False), "--json")
    assert (code, json.loads(out)["ok"], json.loads(out)["exit_code"]) == (3, False, 3)


def test_it_follows_an_export(verify, tmp_path):
    code, out, _ = verify("llama.cpp", Faults(), "--to", "hf", "--out", tmp_path / "out")
    assert code == 0
    assert (tmp_path / "out" / "config.json").is_file()
    assert out.startswith(str(tmp_path / "out"))


def test_nothing_to_do_and_no_such_server_are_told_at_once(sft, trained):
    assert sft("export", "one", "--runs", trained)[0] == 2
    for text in (
        "lama=http://x",
        "llama.cpp=",
        "openai=http://me:secret@x",
        "openai=ftp://x",
        "vllm=http://",
    ):
        code, _, err = sft("export", "one", "--runs", trained, "--verify-server", text)
        assert (code, "secret" in err) == (2, False), err


def test_held_out_prompts_of_a_run_are_not_asked_of_a_teacher(sft, trained, monkeypatch, tmp_path):
    monkeypatch.setenv("SFT_CACHE_DIR", str(trained.parent / "cache"))
    with ModelServer(trained / "one" / "final", echoes=True).serving() as server:
        sft(
            "export",
            "one",
            "--runs",
            trained,
            "--verify-server",
            f"llama.cpp={server.url}",
            "--verify-rows",
            99,
        )
        held = set(server.asked)
        server.asked.clear()
        code, _, err = sft("generate", "-f", trained.parent / "rows.jsonl", "-m", server.url, "-o", tmp_path / "out.jsonl",
                           "--runs", trained, "--apart-from", "one", "--keep", "ended")  # fmt: skip
    assert code == 0, err
    assert len(held) == 12
    assert server.asked
    assert not held & set(server.asked)
