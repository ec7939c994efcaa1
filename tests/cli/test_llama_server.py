"""A real server of llama.cpp, by ``llama-cpp-python``, with a run that was exported for it. Skipped where that is not installed."""

import importlib.util
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.cli.test_verify_server import trained  # noqa: F401 - a fixture
from tests.support.serving import running

NEEDED = ("llama_cpp", "uvicorn", "starlette_context", "sse_starlette")
MISSING = [name for name in NEEDED if importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.skipif(
    bool(MISSING), reason=f"llama-cpp-python[server] is not installed: {', '.join(MISSING)}"
)


@contextmanager
def serving(gguf: Path, *more: str) -> Iterator[str]:
    """Yield the URL of a server that has opened ``gguf``."""
    words = ["--model", gguf, "--n_ctx", "512", "--logits_all", "true", *more]
    command = [sys.executable, "-m", "llama_cpp.server", *words]
    with running(command, answers_at="/v1/models", log=gguf.parent / "server.log") as url:
        yield f"{url}/v1"


@pytest.fixture
def run(trained, monkeypatch):  # noqa: F811
    monkeypatch.setenv("SFT_CACHE_DIR", str(trained.parent / "cache"))
    return ("export", "one", "--runs", trained)


def test_llama_cpp_answers_an_export_as_the_run_and_with_another_template_it_does_not(sft, run, tmp_path):
    gguf = tmp_path / "one.gguf"
    assert sft(*run, "--to", "gguf", "--dtype", "f32", "--out", gguf)[0] == 0
    with serving(gguf) as url:
        code, out, err = sft(*run, "--verify-server", f"llama.cpp={url}", "--verify-rows", 6, "--json")
        assert code == 0, (out, err)
        verified = json.loads(out)["verified"]
        assert (verified["prompts"], verified["findings"]) == ("counts", [])
        assert verified["compared_tokens"] > 0
        assert verified["mean_logprob_difference"] < 1e-3
        code, out, err = sft("generate", "What is 3 plus 3?", "-m", url, "--max-new-tokens", 12)
        assert (code, out.startswith("It is")) == (0, True), (out, err)
    with serving(gguf, "--chat_format", "llama-2") as url:
        code, out, _ = sft(*run, "--verify-server", f"llama.cpp={url}", "--verify-rows", 6)
        assert (code, "the server's prompts have another number of tokens" in " ".join(out.split())) == (
            3,
            True,
        )
