import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sftcli.errors import (
    ConsentError,
    DataError,
    MismatchError,
    NetworkError,
    NotFoundError,
    UsageError,
)
from sftcli.events import Notice, Warned
from sftcli.modeling.locate.default_model import ALIAS
from sftcli.modeling.locate.locate import LocatedModel, locate_model
from tests.support.fake_hub import COMMIT, FakeHub
from tests.support.recording import RecordingSink
from tests.support.tiny_model import build_tiny_model


def _notices(sink: RecordingSink) -> list[str]:
    return [event.text for event in sink.of(Notice)]


def test_a_model_folder_is_used_where_it_is(tiny: Path, sink: RecordingSink) -> None:
    located = locate_model(str(tiny), revision=None, emit=sink)
    assert located.folder == tiny
    assert _notices(sink) == [f"model {tiny}: from the folder {tiny}"]


def test_the_revision_of_a_folder_holds_until_its_weights_change(tiny: Path, sink: RecordingSink) -> None:
    first = locate_model(str(tiny), revision=None, emit=sink)
    assert locate_model(str(tiny), revision=first.revision, emit=sink) == first
    build_tiny_model(tiny, seed=1)
    with pytest.raises(MismatchError, match="have changed"):
        locate_model(str(tiny), revision=first.revision, emit=sink)


def test_a_hub_revision_does_not_apply_to_a_folder(tiny: Path, sink: RecordingSink) -> None:
    with pytest.raises(UsageError, match="applies to hub models"):
        locate_model(str(tiny), revision="main", emit=sink)


def test_a_path_wins_over_a_hub_name(
    tiny: Path, tmp_path: Path, sink: RecordingSink, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "owner").mkdir()
    tiny.rename(tmp_path / "owner" / "name")
    monkeypatch.chdir(tmp_path)
    assert locate_model("owner/name", revision=None, emit=sink).folder == Path("owner/name")


def test_an_adapter_folder_is_explained(tmp_path: Path, sink: RecordingSink) -> None:
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "some/base"}')
    with pytest.raises(UsageError, match="is a LoRA adapter of some/base, not a model"):
        locate_model(str(tmp_path), revision=None, emit=sink)


def test_an_empty_folder_is_explained(tmp_path: Path, sink: RecordingSink) -> None:
    (tmp_path / "nothing").mkdir()
    with pytest.raises(NotFoundError, match="is empty"):
        locate_model(str(tmp_path / "nothing"), revision=None, emit=sink)


def test_the_folder_above_a_model_names_the_model(tiny: Path, sink: RecordingSink) -> None:
    with pytest.raises(NotFoundError) as caught:
        locate_model(str(tiny.parent), revision=None, emit=sink)
    assert caught.value.hint == f"did you mean {tiny}?"


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.ckpt"])
def test_pickle_weights_are_refused_with_a_way_to_convert_them(
    tiny: Path, sink: RecordingSink, name: str
) -> None:
    (tiny / "model.safetensors").rename(tiny / name)
    with pytest.raises(ConsentError, match=f"{name} is a pickle file") as caught:
        locate_model(str(tiny), revision=None, emit=sink)
    assert "convert it to safetensors" in caught.value.hint


def test_a_pickle_file_named_directly_is_refused(tmp_path: Path, sink: RecordingSink) -> None:
    (tmp_path / "model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(ConsentError, match="pickle file"):
        locate_model(str(tmp_path / "model.bin"), revision=None, emit=sink)


def test_a_damaged_pt_file_is_told_before_its_tokenizer_is_looked_for(
    tmp_path: Path, sink: RecordingSink
) -> None:
    (tmp_path / "model.pt").write_bytes(b"\x80\x04.")
    with pytest.raises(DataError, match=r"model\.pt"):
        locate_model(str(tmp_path / "model.pt"), revision=None, emit=sink)


def test_a_weight_file_named_directly_points_to_its_folder(tiny: Path, sink: RecordingSink) -> None:
    with pytest.raises(UsageError) as caught:
        locate_model(str(tiny / "model.safetensors"), revision=None, emit=sink)
    assert caught.value.hint == f"name its folder: {tiny}"


def test_a_missing_shard_is_named(tiny: Path, sink: RecordingSink) -> None:
    (tiny / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "model-00002-of-00002.safetensors"}}'
    )
    with pytest.raises(NotFoundError, match=r"model-00002-of-00002\.safetensors does not exist"):
        locate_model(str(tiny), revision=None, emit=sink)


def test_a_shard_outside_of_the_folder_is_refused(tiny: Path, sink: RecordingSink) -> None:
    (tiny / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../elsewhere.safetensors"}}')
    with pytest.raises(DataError, match="outside of its folder"):
        locate_model(str(tiny), revision=None, emit=sink)


@pytest.mark.parametrize(
    "content",
    [b"", b"PK\x03\x04" + bytes(60), b"\x02\0\0\0\0\0\0\0{}tail", b"\x04\0\0\0\0\0\0\0null", bytes(7)],
)
def test_a_damaged_weight_file_is_named(tiny: Path, sink: RecordingSink, content: bytes) -> None:
    (tiny / "model.safetensors").write_bytes(content)
    with pytest.raises(DataError, match=r"model\.safetensors"):
        locate_model(str(tiny), revision=None, emit=sink)


def test_a_cut_weight_file_is_named_with_both_sizes(tiny: Path, sink: RecordingSink) -> None:
    path = tiny / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=f"is {path.stat().st_size} bytes long, its header says"):
        locate_model(str(tiny), revision=None, emit=sink)


def test_a_mistyped_path_names_the_nearest(tiny: Path, sink: RecordingSink) -> None:
    with pytest.raises(NotFoundError) as caught:
        locate_model(str(tiny.parent / "tinny"), revision=None, emit=sink)
    assert caught.value.hint == f"did you mean {str(tiny)!r}?"


def test_a_mistyped_alias_names_it_and_asks_no_hub(sink: RecordingSink) -> None:
    with pytest.raises(NotFoundError) as caught:
        locate_model("smolm2-135m", revision=None, emit=sink)
    assert caught.value.hint == f"did you mean {ALIAS!r}?"


def test_a_hub_model_is_fetched_once_and_its_commit_recorded(
    tiny: Path, sink: RecordingSink, use_hub: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tiny / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    (tiny / "modeling_own.py").write_text("raise RuntimeError\n")
    monkeypatch.setenv("HF_TOKEN", "hf_secretsecret")
    with FakeHub("owner/name", tiny).serving() as hub:
        use_hub(hub.url)
        located = locate_model("owner/name", revision=None, emit=sink)
        asked = len(hub.requests)
        again = locate_model("owner/name", revision=None, emit=sink)
        by_commit = locate_model("owner/name", revision=COMMIT, emit=sink)
        assert len(hub.requests) == asked
    assert located.revision == again.revision == by_commit.revision == COMMIT
    names = {path.name for path in located.folder.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"} <= names
    assert not {"pytorch_model.bin", "modeling_own.py"} & names
    assert "hf_secretsecret" not in repr(sink.events)


def test_a_branch_is_asked_for_again_and_taken_from_the_cache_when_the_hub_is_gone(
    tiny: Path, sink: RecordingSink, use_hub: Callable[[str], None]
) -> None:
    with FakeHub("owner/name", tiny).serving() as hub:
        use_hub(hub.url)
        located = locate_model("owner/name", revision="main", emit=sink)
    again = locate_model("owner/name", revision="main", emit=sink)
    assert again.folder == located.folder
    assert "is taken from the cache" in sink.of(Warned)[0].text


def test_download_that_is_cut_off_goes_on_where_it_broke(
    tiny: Path, sink: RecordingSink, use_hub: Callable[[str], None]
) -> None:
    weights = load_file(tiny / "model.safetensors")
    save_file(weights | {"large": torch.zeros(22 << 20, dtype=torch.uint8)}, tiny / "model.safetensors")
    hub = FakeHub("owner/name", tiny)
    hub.cuts = 1
    located = _fetch_from(hub, use_hub, "owner/name", sink)
    assert (located.folder / "model.safetensors").stat().st_size > 22 << 20
    assert [begin for begin in hub.ranges if begin] == [10 << 20]  # it is read in pieces of this size


def test_download_of_a_busy_hub_is_tried_again_with_a_word(
    tiny: Path, sink: RecordingSink, use_hub: Callable[[str], None]
) -> None:
    hub = FakeHub("owner/name", tiny)
    hub.busy = 2
    assert (_fetch_from(hub, use_hub, "owner/name", sink).folder / "model.safetensors").is_file()
    assert any("owner/name: retrying after HfHubHTTPError" in text for text in _notices(sink))


def test_download_that_never_succeeds_ends_with_69_and_leaves_no_model(
    tiny: Path, sink: RecordingSink, use_hub: Callable[[str], None]
) -> None:
    hub = FakeHub("owner/name", tiny)
    hub.busy = 1000
    with pytest.raises(NetworkError, match="503") as caught:
        _fetch_from(hub, use_hub, "owner/name", sink)
    assert caught.value.exit_code == 69
    with pytest.raises(NetworkError):
        _fetch_from(hub, use_hub, "owner/name", sink)


def _fetch_from(hub: FakeHub, use_hub: Callable[[str], None], name: str, sink: RecordingSink) -> LocatedModel:
    with hub.serving():
        use_hub(hub.url)
        return locate_model(name, revision=None, emit=sink)


def test_a_gated_model_tells_where_to_ask(
    tiny: Path, sink: RecordingSink, use_hub: Callable[[str], None]
) -> None:
    hub = FakeHub("owner/name", tiny, status=403, error_code="GatedRepo")
    with pytest.raises(ConsentError, match="access to owner/name needs approval") as caught:
        _fetch_from(hub, use_hub, "owner/name", sink)
    assert "hf auth login" in caught.value.hint


def test_an_unknown_hub_model_names_the_nearest_alias(
    tiny: Path, sink: RecordingSink, use_hub: Callable[[str], None]
) -> None:
    with pytest.raises(NotFoundError, match="no model 'owner/smollm2-135' on the hub") as caught:
        _fetch_from(FakeHub("owner/name", tiny), use_hub, "owner/smollm2-135", sink)
    assert f"did you mean {ALIAS!r}?" in caught.value.hint


def test_a_hub_model_of_pickle_files_is_refused(
    tiny: Path, sink: RecordingSink, use_hub: Callable[[str], None]
) -> None:
    (tiny / "model.safetensors").rename(tiny / "pytorch_model.bin")
    with pytest.raises(ConsentError, match="only pickle weights"):
        _fetch_from(FakeHub("owner/name", tiny), use_hub, "owner/name", sink)


def test_an_unreachable_hub_says_how_to_bring_the_model(
    sink: RecordingSink, use_hub: Callable[[str], None]
) -> None:
    use_hub("http://user:secret@127.0.0.1:9")
    begin = time.monotonic()
    with pytest.raises(NetworkError, match="the hub cannot be reached") as caught:
        locate_model("owner/name", revision=None, emit=sink)
    assert time.monotonic() - begin < 10
    assert "hf download owner/name" in caught.value.hint
    assert "secret" not in caught.value.message + caught.value.hint


def test_the_offline_switch_asks_nobody(sink: RecordingSink) -> None:
    with pytest.raises(NetworkError, match="HF_HUB_OFFLINE is set"):
        locate_model("owner/name", revision=None, emit=sink)
