"""``sft push``: the files of a model and no others, in one commit, private unless asked; every refusal by its name."""

import json
import os
from pathlib import Path

import pytest

from tests.support.fake_hub import silent_server
from tests.support.tiny_model import build_tiny_model
from tests.support.upload_hub import TOKEN, Repo, UploadHub


@pytest.fixture
def hub(monkeypatch, tmp_path):
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")  # the other protocol for large files is not spoken here
    with UploadHub().serving() as serving:
        monkeypatch.setenv("HF_ENDPOINT", serving.url)
        yield serving


@pytest.fixture
def run(tmp_path) -> Path:
    """A finished run, by the files that it leaves."""
    folder = tmp_path / "runs" / "one"
    folder.mkdir(parents=True)
    build_tiny_model(folder / "final")
    (folder / "run.json").write_text("{}")
    (folder / "events.jsonl").write_text("")
    (folder / "config.toml").write_text(
        '[model]\nname = "smollm2-135m"\n[data]\nsources = ["/home/x/rows.jsonl"]\n'
    )
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_a_final_model_goes_to_a_private_repository_with_a_card(sft, hub, run):
    code, out, err = sft("push", "mine", "one")
    assert (code, out) == (0, f"{hub.url}/me/mine\n"), (err, hub.requests)
    repo = hub.repos["me/mine"]
    assert repo.private
    card = repo.files.pop("README.md").decode()
    assert repo.files == contents(run / "final")
    assert "base_model: HuggingFaceTB/SmolLM2-135M-Instruct\n" in card
    assert 'from_pretrained("mine")' in card or 'from_pretrained("me/mine")' in card
    assert "/home/x" not in card
    assert not (run / "final" / "README.md").exists()
    assert "made the private repository me/mine" in err
    assert TOKEN not in err + out


def test_a_dry_run_lists_what_would_go_and_asks_nobody(sft, hub, run):
    code, out, err = sft("push", "me/mine", "--dry-run")
    assert (code, out) == (0, "runs/one/final\n")
    assert "model.safetensors" in err
    assert "would go to me/mine (private)" in err
    listed = json.loads(sft("push", "me/mine", "--dry-run", "--json")[1])
    sizes = {name: len(content) for name, content in contents(run / "final").items()}
    assert {name: listed["files"][name] for name in sizes} == sizes
    assert set(listed["files"]) == {*sizes, "README.md"}
    assert hub.requests == []


def test_only_what_makes_up_a_model_leaves_the_machine(sft, hub, run):
    final = run / "final"
    secrets = (
        "optimizer.safetensors",
        "state.json",
        "events.jsonl",
        "training.log",
        ".env",
        "notes.txt",
        "a.bin",
    )
    for name in secrets:
        (final / name).write_text("secret")
    (final / ".git").mkdir()
    (final / ".git" / "config.json").write_text("{}")
    (final / "sub").mkdir()
    (final / "sub" / "rows.json").write_text("{}")
    code, _, err = sft("push", "me/mine", final)
    assert code == 0, err
    assert not set(hub.repos["me/mine"].files) & {*secrets, ".git/config.json", "sub/rows.json"}
    assert "left out, no part of a model: " in err
    assert "optimizer.safetensors" in err


def test_a_link_out_of_the_folder_is_refused(sft, hub, run, tmp_path):
    (tmp_path / "elsewhere.json").write_text('{"secret": 1}')
    (run / "final" / "extra.json").symlink_to(tmp_path / "elsewhere.json")
    code, _, err = sft("push", "me/mine", "one")
    assert code == 65
    assert "extra.json is a link out of the folder" in err
    assert hub.requests == []


def test_an_upload_that_broke_off_goes_on_with_what_is_missing(sft, hub, run):
    (run / "final" / "large.safetensors").write_bytes(os.urandom(1_200_000))
    hub.fail["/commit/"] = 400
    code, _, err = sft("push", "me/mine", "one")
    assert code == 73
    assert "the hub refuses the upload to me/mine" in err
    assert hub.repos["me/mine"].files == {}
    assert hub.puts == 2
    hub.fail.clear()
    code, _, err = sft("push", "me/mine", "one")
    assert code == 0, err
    assert hub.puts == 2  # nothing large twice
    assert "me/mine exists already and is private: adding a commit" in err
    assert len(hub.repos["me/mine"].files["large.safetensors"]) == 1_200_000


def test_a_public_repository_takes_files_only_when_it_is_asked_for(sft, hub, run):
    hub.repos["me/mine"] = Repo(private=False)
    code, _, err = sft("push", "me/mine", "one")
    assert code == 77
    assert "me/mine is public on the hub" in err
    assert "--public" in err
    assert hub.repos["me/mine"].files == {}
    assert sft("push", "me/mine", "one", "--public", "--message", "second try")[0] == 0
    assert hub.repos["me/mine"].messages == ["second try"]
    assert sft("push", "me/new", "one", "--public")[0] == 0
    assert not hub.repos["me/new"].private


def test_a_repository_that_the_hub_makes_public_all_the_same_takes_nothing(sft, hub, run):
    hub.makes_public = True
    assert sft("push", "me/mine", "one")[0] == 77
    assert hub.repos["me/mine"].files == {}


@pytest.mark.parametrize(
    ("fail", "code", "words"),
    [
        ({"whoami": 401}, 77, "the hub does not accept the token"),
        ({"repos/create": 403}, 77, "the token may not write to me/mine"),
        ({"repos/create": 404}, 66, "there is no 'me/mine' on the hub"),
        ({"PUT ": 403}, 77, "the token may not write to me/mine"),
        ({"repos/create": 402}, 73, "the hub refuses the upload to me/mine"),
        ({"whoami": 500}, 69, "the hub cannot be reached"),
    ],
    ids=str,
)
def test_each_refusal_of_the_hub_has_a_name(sft, hub, run, fail, code, words):
    hub.fail = fail
    found, out, err = sft("push", "me/mine", "one")
    assert (found, out) == (code, ""), err
    assert words in err
    assert TOKEN not in err


def test_others_names_are_refused_by_the_hub(sft, hub, run):
    code, _, err = sft("push", "them/mine", "one")
    assert code == 77
    assert "the token may not write to them/mine" in err


def test_without_token_network_or_hub_it_says_so(sft, hub, run, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    code, _, err = sft("push", "me/mine", "one")
    assert code == 77
    assert "there is no token for the hub" in err
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    code, _, err = sft("push", "me/mine", "one")
    assert code == 69
    assert "the hub cannot be reached (http://127.0.0.1:9)" in err
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code, _, err = sft("push", "me/mine", "one")
    assert code == 69
    assert "HF_HUB_OFFLINE is set" in err


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["bad name", "one"], 2, "is no name of a repository"),
        (["mine", "two"], 66, "there is no run or folder called 'two'"),
        (["mine", "empty"], 66, "empty holds no model"),
        (["mine", "step-00000004"], 2, "is a checkpoint of step 4"),
        (["mine", "runs/unfinished"], 66, "unfinished has no final model yet"),
    ],
    ids=lambda value: str(value),
)
def test_what_is_no_model_is_refused_before_the_hub_is_asked(sft, hub, run, arguments, code, words, tmp_path):
    (tmp_path / "empty").mkdir()
    checkpoint = tmp_path / "step-00000004"
    checkpoint.mkdir()
    for name in ("state.json", "manifest.json", "config.json"):
        (checkpoint / name).write_text("{}")
    (tmp_path / "runs" / "unfinished").mkdir()
    (tmp_path / "runs" / "unfinished" / "run.json").write_text("{}")
    found, _, err = sft("push", *arguments)
    assert found == code
    assert words in err
    assert hub.requests == []


def test_an_adapter_that_names_a_path_is_told(sft, hub, tmp_path):
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(
        json.dumps({"r": 8, "base_model_name_or_path": str(tmp_path)})
    )
    (folder / "adapter_model.safetensors").write_bytes(b"x")
    code, _, err = sft("push", "mine", folder)
    assert code == 0, err
    assert f"names its base by a path of this machine, {tmp_path}" in err
    assert "library_name: peft\n" in hub.repos["me/mine"].files["README.md"].decode()


def test_a_hub_that_says_nothing_is_given_up(run, hub, monkeypatch):
    from sftcli.errors import NetworkError
    from sftcli.events import NeverStop, Session
    from sftcli.modeling.hub.snapshot import Patience
    from sftcli.services.export.push import PushRequest, run_push

    request = PushRequest(name="me/mine", model=str(run / "final"), root=run.parent)
    with silent_server() as url:
        monkeypatch.setenv("HF_ENDPOINT", url)
        with pytest.raises(NetworkError, match="stopped responding"):
            run_push(
                request, Session(lambda _: None, NeverStop()), Patience(answer_seconds=0.3, file_seconds=0.0)
            )
