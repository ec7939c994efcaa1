"""Hostile files and a secret, each with a payload that would leave a trace: none does."""

import ast
import io
import json
import pickle
import shutil
from contextlib import redirect_stderr
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import sftcli
from sftcli.cli.app import app
from tests.support.runs import StopAtStep, copied_here, settings_of, train, write_rows
from tests.support.tiny_model import build_tiny_model

PACKAGE = Path(sftcli.__file__).parent
PICKLES = ("model.bin", "pytorch_model.bin", "optimizer.pt", "training_args.bin", "rng_state.pth", "scheduler.ckpt",
           ".metadata", "__0_0.distcp")  # fmt: skip


class Payload:
    """Touches a file when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return (Path.touch, (self.trace,))


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped after its second step."""
    folder = tmp_path_factory.mktemp("canary")
    write_rows(folder / "rows.jsonl", 15)
    build_tiny_model(folder / "model")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("SFT_CACHE_DIR", str(folder / "cache"))
        train(settings_of(Path(), Path("model"), "run.name=exp", "training.max_steps=3"), StopAtStep(2))
    return folder


@pytest.fixture
def place(origin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return copied_here(origin, tmp_path, monkeypatch)


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """The file that a payload would touch."""
    return tmp_path / "the payload was run"


def sft(*arguments: object) -> tuple[int, str]:
    """Return exit code and all output of a command."""
    from sftcli.cli.errors.show import guarded

    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is None or isinstance(result.exception, SystemExit):
        return result.exit_code, result.output
    error = result.exception

    def fail() -> None:
        raise error

    shown = io.StringIO()
    with redirect_stderr(shown):
        code = guarded(fail, command="sft", json=False)
    return code, result.output + shown.getvalue()


def plant_pickles(folder: Path, trace: Path) -> None:
    for name in PICKLES:
        with (folder / name).open("wb") as file:
            pickle.dump(Payload(trace), file)


def test_payload_works_where_pickle_is_opened(tmp_path, trace):
    plant_pickles(tmp_path, trace)
    pickle.loads((tmp_path / "model.bin").read_bytes())
    assert trace.exists()


def test_pickles_beside_a_checkpoint_are_never_opened(place, trace):
    checkpoint = place / "runs" / "exp" / "checkpoints" / "step-00000002"
    plant_pickles(checkpoint, trace)
    assert sft("resume", "exp")[0] == 0
    assert sft("generate", "Hello?", "--checkpoint", checkpoint, "--max-new-tokens", "2")[0] == 0
    assert not trace.exists()


def test_weights_that_are_really_a_pickle_are_refused(place, trace):
    checkpoint = place / "runs" / "exp" / "checkpoints" / "step-00000002"
    torch.save({"weight": Payload(trace)}, checkpoint / "model.safetensors")
    assert sft("resume", "exp")[0] == 65
    assert sft("generate", "Hello?", "--checkpoint", checkpoint)[0] == 65
    torch.save({"weight": Payload(trace)}, place / "model" / "model.safetensors")
    assert sft("train", "--data", "rows.jsonl", "--model", place / "model", "--max-steps", 1)[0] == 65
    assert not trace.exists()


def test_model_of_pickles_only_is_refused(place, trace):
    (place / "model" / "model.safetensors").unlink()
    plant_pickles(place / "model", trace)
    code, text = sft("train", "--data", "rows.jsonl", "--model", place / "model", "--max-steps", 1)
    assert code == 77
    assert "pickle" in text
    assert not trace.exists()


@pytest.mark.parametrize(
    "kind", ["auto_map of the model", "auto_map of the tokenizer", "nested trust", "attention"]
)
def test_code_of_a_model_folder_is_never_run(place, trace, kind):
    model = place / "model"
    code = f"from pathlib import Path\nPath({str(trace)!r}).touch()\nclass Config: ...\nclass Model: ...\nclass Tokenizer: ...\n"
    (model / "evil.py").write_text(code)
    file = model / ("tokenizer_config.json" if kind == "auto_map of the tokenizer" else "config.json")
    content = json.loads(file.read_text())
    content |= {
        "auto_map of the model": {"auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}},
        "auto_map of the tokenizer": {"auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]}},
        "nested trust": {"trust_remote_code": True, "text_config": {"trust_remote_code": True,
                                                                    "auto_map": {"AutoModel": "evil.Model"}}},
        "attention": {"_attn_implementation_internal": "evil/evil", "_attn_implementation": "evil/evil"},
    }[kind]  # fmt: skip
    file.write_text(json.dumps(content))
    code, _ = sft("train", "--data", "rows.jsonl", "--model", model, "--max-steps", 1, "--run", "evil")
    assert code == (77 if kind == "auto_map of the model" else code)
    assert code in {0, 2, 65, 77, 78}
    assert not trace.exists()


def test_trust_cannot_be_set_by_file_or_flag(place):
    (place / "c.toml").write_text("[model]\ntrust_remote_code = true\n")
    assert sft("train", "--config", place / "c.toml")[0] == 2
    assert sft("train", "--set", "model.trust_remote_code=true")[0] == 2


def test_scripts_and_pickles_in_a_data_folder_are_not_run(place, trace):
    data = place / "data"
    data.mkdir()
    shutil.copy(place / "rows.jsonl", data / "rows.jsonl")
    for name in ("data.py", "__init__.py", "conftest.py"):
        (data / name).write_text(f"from pathlib import Path\nPath({str(trace)!r}).touch()\n")
    plant_pickles(data, trace)
    with (data / "rows.pkl").open("wb") as file:
        pickle.dump(Payload(trace), file)
    sft("prepare", data, "--model", place / "model")
    for name in ("data.py", "rows.pkl"):
        code, _ = sft("prepare", data / name, "--model", place / "model")
        assert code in {2, 65, 66}
    assert not trace.exists()


def test_formula_in_a_table_stays_text(place):
    (place / "rows.csv").write_text("instruction,response\n" + '"=cmd()|calc","=HYPERLINK(1)"\n' * 3)
    code, text = sft("prepare", place / "rows.csv", "--model", place / "model", "--show", 1)
    assert code == 0
    assert "=HYPERLINK(1)" in text.replace("|", "").replace("\n", "")


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ ''|attr('__class__') }}",
        "{{ cycler.__init__.__globals__ }}",
        "{% for a in range(100000) %}{% for b in range(100000) %}{% for c in range(100000) %}x{% endfor %}{% endfor %}"
        "{% endfor %}",
        "{{ 'x' * 9999999999 }}",
        "{% include '/etc/passwd' %}",
    ],
)
def test_template_of_a_model_cannot_reach_out_or_run_on(place, source):
    (place / "model" / "chat_template.jinja").write_text(source)
    code, text = sft("train", "--data", place / "rows.jsonl", "--model", place / "model")
    assert code == 65
    assert "root:" not in text


def test_secret_of_the_environment_is_written_nowhere(place, monkeypatch):
    secret = "hf_CANARYCANARYCANARYCANARYCANARY12"
    monkeypatch.setenv("HF_TOKEN", secret)
    monkeypatch.setenv("SFT_DEBUG", "1")
    monkeypatch.setenv("XDG_STATE_HOME", str(place / "state"))
    outputs = [
        sft(*command.split())[1]
        for command in (
            "env", "env --json", "resume exp", "train --data rows.jsonl --model model --max-steps 1 --run two",
            "train --data missing.jsonl --model model", f"train --data https://u:{secret}@127.0.0.1/x --model model",
            f"train --set model.name=http://{secret}@127.0.0.1/x --data rows.jsonl", "eval two --runs runs --json", "prepare rows.jsonl --model model",
        )
    ]  # fmt: skip
    shown = [text for text in outputs if secret in text]
    assert not shown
    assert [
        path for path in place.rglob("*") if path.is_file() and secret.encode() in path.read_bytes()
    ] == []


def test_escape_sequences_of_rows_do_not_reach_the_terminal(place):
    evil = "\x1b]52;c;aGFjaw==\x07 \x1b[2J \x9b31m [/bold] [link=http://x] \x08\x08"
    rows = "".join(json.dumps({"question": f"{n}? {evil}", "answer": f"{n} {evil}"}) + "\n" for n in range(6))
    (place / "evil.jsonl").write_text(rows)
    code, text = sft("prepare", place / "evil.jsonl", "--model", place / "model", "--show", 2)
    assert code == 0
    assert not set(text) & {"\x1b", "\x07", "\x9b", "\x08"}


def test_code_that_could_run_what_it_reads_is_not_in_the_package():
    """No pickle reader, no ``eval``, no shell; ``torch.load`` only for the one exchange format, if at all."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {alias.name.split(".")[0] for alias in node.names} | {
                    str(getattr(node, "module", ""))
                }
                if names == {"pickle", "UnpicklingError"}:
                    continue  # an error to catch reads nothing
                unsafe = {"pickle", "dill", "joblib", "marshal", "shelve", "yaml"}
                if path.name == "plain_yaml.py":  # which makes plain values alone, by the safe loader
                    unsafe -= {"yaml"}
                found += [f"{path.name}: {name}" for name in names & unsafe]
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                if (
                    name
                    in {
                        "eval",
                        "exec",
                        "os.system",
                        "torch.load",
                        "yaml.load",
                        "yaml.unsafe_load",
                        "yaml.full_load",
                    }
                    and path.name != "pt_file.py"
                ):
                    found.append(f"{path.name}: {name}")
                if name != "shared.get_completion_script":  # a text for the shell of that name
                    found += [f"{path.name}: shell" for word in node.keywords if word.arg == "shell"]
    assert found == []


def test_every_loading_says_that_remote_code_is_not_trusted():
    calls = 0
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if (
                isinstance(node, ast.Call)
                and ast.unparse(node.func).startswith("Auto")
                and ".from_" in ast.unparse(node.func)
            ):
                words = {word.arg: ast.unparse(word.value) for word in node.keywords}
                if ast.unparse(node.func).endswith("from_pretrained"):
                    calls += 1
                    allowed = {"False"} if path.name != "load.py" else {"False", "trusts_code"}
                    assert words.get("trust_remote_code") in allowed, f"{path.name}:{node.lineno}"
    assert calls >= 3
