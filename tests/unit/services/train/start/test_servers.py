"""What a server refuses is said by name before the training."""

from pathlib import Path

import pytest

from sftcli.config.schema.run import Server
from sftcli.config.schema.settings import Settings
from sftcli.errors import UsageError
from sftcli.events import Warned
from sftcli.services.train.start.servers import REFUSALS, require_served, require_served_model
from tests.support.gguf_families import build_gguf_family
from tests.support.recording import RecordingSink
from tests.support.tiny_model import build_tiny_model

LORA = {"kind": "lora"}
REFUSED = {
    "adapter.kind": {"adapter": {"kind": "dora"}},
    "model.new_tokens": {"adapter": LORA, "model": {"new_tokens": ["<tool>"]}},
    "adapter.experts": {"adapter": LORA | {"experts": True}},
    "adapter.rank": {"adapter": LORA | {"rank": 513}},
}


def settings(server: str | None, **parts: object) -> Settings:
    return Settings.model_validate({"run": {"served_by": server}, **parts})


@pytest.mark.parametrize("server", list(Server))
@pytest.mark.parametrize("row", REFUSALS, ids=lambda row: row.key)
def test_each_row_of_the_table_refuses_by_name_and_for_its_servers_alone(row, server: Server) -> None:
    asked = settings(server, **REFUSED[row.key])
    if server not in row.servers:
        return require_served(asked)
    with pytest.raises(UsageError, match=row.what) as caught:
        require_served(asked)
    assert caught.value.location.key == row.key
    assert "sft export --to" in caught.value.hint
    return require_served(settings(None, **REFUSED[row.key]))


@pytest.mark.parametrize("server", list(Server))
def test_plain_adapters_and_whole_models_are_taken(server: Server) -> None:
    require_served(settings(server, adapter=LORA | {"rank": 512, "rslora": True}))
    require_served(settings(server, model={"new_tokens": ["<tool>"]}))  # merged, as it were


@pytest.mark.parametrize(("rank", "room"), [(16, None), (17, 32), (257, 320)])
def test_vllm_is_to_be_told_of_a_rank_above_its_default(rank: int, room: int | None, tmp_path: Path) -> None:
    sink = RecordingSink()
    require_served_model(
        settings("vllm", adapter=LORA | {"rank": rank}), build_tiny_model(tmp_path / "model"), sink
    )
    told = [event.text for event in sink.of(Warned)]
    assert [text.rpartition(" ")[2] for text in told] == ([] if room is None else [str(room)])


@pytest.mark.parametrize("server", ["llama.cpp", "ollama"])
def test_an_architecture_without_a_form_in_llama_cpp_is_refused(server: str, tmp_path: Path) -> None:
    build_gguf_family("gpt2", tmp_path / "gpt2")
    with pytest.raises(UsageError, match="models of type 'gpt2'"):
        require_served_model(settings(server), tmp_path / "gpt2", RecordingSink())
    require_served_model(settings("vllm"), tmp_path / "gpt2", RecordingSink())
    require_served_model(settings(server), build_tiny_model(tmp_path / "llama"), RecordingSink())
