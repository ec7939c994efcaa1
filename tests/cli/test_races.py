"""Five that do the same at one moment: one does it, whole, the others are told so, and nothing is left behind."""

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.cli.conftest import short_training, write_sums
from tests.support.commands import Said, import_all, run_command, run_together

FIVE, ROUNDS = 5, 20
SHORT = ("--max-new-tokens", "3")
TOLD = r"is in use by pid \d+|exists already|is complete already"


@dataclass(frozen=True)
class Race:
    """A command, by its name, and the paths that it makes; ``together`` if all of them may succeed, one after the other."""

    name: str
    arguments: tuple[str, ...]
    makes: tuple[str, ...]
    together: bool = False
    is_quick: bool = False


TRAIN = ("train", "--data", "rows.jsonl", "FLAGS")
ANSWER = ("generate", "--file", "few.jsonl", "--checkpoint", "one", *SHORT, "--out", "out.jsonl")
RACES = (
    Race("generate", ANSWER, ("out.jsonl",)),
    Race("generate-rest", (*ANSWER, "--min-confidence", "0.02", "--rest", "rest.jsonl"), ("out.jsonl", "rest.jsonl"), is_quick=True),
    Race("export-hf", ("export", "one", "--to", "hf", "--out", "out"), ("out",), is_quick=True),
    Race("export-gguf", ("export", "one", "--to", "gguf", "--out", "out.gguf"), ("out.gguf",)),
    Race("export-ollama", ("export", "one", "--to", "ollama", "--out", "out"), ("out",)),
    Race("prepare-parquet", ("prepare", "rows.jsonl", "--model", "model", "--out", "new/out"), ("new",), is_quick=True),
    Race("prepare-messages", ("prepare", "rows.jsonl", "--model", "model", "--out", "out.jsonl"), ("out.jsonl",)),
    Race("prepare-cache", ("prepare", "rows.jsonl", "--model", "model"), ("cache",), together=True),
    Race("report", ("report", "one", "--out", "out.html"), ("out.html",), together=True, is_quick=True),
    Race("eval", ("eval", "one", "--max-rows", "2"), ("runs/one/eval.json", "runs/one/report.html"), together=True),
    Race("try", ("try", "rows.jsonl", "--model", "model", "--max-rows", "2"), (), together=True),
    Race("train", (*TRAIN, "--run", "new"), ("runs/new",), is_quick=True),
    Race("train-auto", (*TRAIN, "--run", "new", "--resume", "auto"), ("runs/new",)),
    Race("resume", ("resume", "half"), ("runs/half",)),
    Race("compare", (*TRAIN, "--run", "all", "--compare", "rows=50%,100%"), ("runs/all",)),
)  # fmt: skip


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A folder with a finished run, one that was taken back to its second step, and a filled cache."""
    import_all()
    place = tmp_path_factory.mktemp("races") / "place"
    place.mkdir()
    write_sums(place / "rows.jsonl")
    few = (place / "rows.jsonl").read_text(encoding="utf-8").splitlines()[:4]
    (place / "few.jsonl").write_text("\n".join(few) + "\n", encoding="utf-8")
    shutil.copytree(tiny_model, place / "model")
    with pytest.MonkeyPatch.context() as patch:
        at(place, patch)
        for name in ("one", "half"):
            done = run_command(
                words((*TRAIN, "--run", name, "--set", "checkpoint.every_steps=2")), place.parent / "said"
            )
            assert done.code == 0, done.text
        shutil.rmtree(place / "runs" / "half" / "final")
        shutil.rmtree(place / "runs" / "half" / "checkpoints" / "step-00000004")
    return place


def at(place: Path, patch: pytest.MonkeyPatch) -> None:
    patch.chdir(place)
    patch.setenv("SFT_CACHE_DIR", str(place / "cache"))


def words(arguments: tuple[str, ...]) -> list[str]:
    flags = short_training(Path("model"), Path())
    return [word for one in arguments for word in (flags if one == "FLAGS" else [one])]


def names(place: Path) -> set[str]:
    return {path.relative_to(place).as_posix() for path in place.rglob("*")}


def contents(place: Path, makes: tuple[str, ...]) -> dict[str, bytes]:
    """Return what was made, without the files that hold times."""
    files = [path for one in makes for path in (place / one, *(place / one).rglob("*")) if path.is_file()]
    timed = re.compile(r"\.(?:json|jsonl|log|html|toml)|audit\.json")
    return {
        str(path.relative_to(place)): path.read_bytes()
        for path in files
        if not timed.fullmatch(path.suffix) or path.name == "out.jsonl"
    }


def race(one: Race, origin: Path, place: Path, patch: pytest.MonkeyPatch, *, rounds: int) -> None:
    alone = Path(shutil.copytree(origin, place / "alone"))
    at(alone, patch)
    if "cache" in one.makes:
        shutil.rmtree("cache")
    done = run_command(words(one.arguments), place / "said.txt")
    assert done.code == 0, done.text
    for _ in range(rounds):
        copy = Path(shutil.copytree(origin, place / "copy"))
        at(copy, patch)
        if "cache" in one.makes:
            shutil.rmtree("cache")
        said = run_together([words(one.arguments)] * FIVE, place)
        require_one(one, said)
        assert names(copy) == names(alone)
        assert contents(copy, one.makes) == contents(alone, one.makes)
        patch.chdir(place)
        shutil.rmtree(copy)


def require_one(one: Race, said: list[Said]) -> None:
    """See that one has done it, and that the others say that they have not."""
    texts = "\n".join(f"{each.code}: {each.text}" for each in said)
    assert {each.code for each in said} <= {0, 73}, texts
    others = [each for each in said if each.code or "is complete already" in each.text]
    assert all(re.search(TOLD, each.text) for each in others), texts
    done = len(said) - len(others)
    assert done >= 1 if one.together else done == 1, texts


@pytest.mark.parametrize("one", [one for one in RACES if one.is_quick], ids=lambda one: one.name)
def test_of_five_that_do_the_same_one_does_it_and_the_others_say_so(one, origin, tmp_path, monkeypatch):
    race(one, origin, tmp_path, monkeypatch, rounds=1)


@pytest.mark.slow
@pytest.mark.parametrize("one", RACES, ids=lambda one: one.name)
def test_of_five_that_do_the_same_twenty_times_one_does_it_each_time(one, origin, tmp_path, monkeypatch):
    race(one, origin, tmp_path, monkeypatch, rounds=ROUNDS)
