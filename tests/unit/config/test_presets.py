from pathlib import Path

import pytest

from sftcli.config.presets import preset_file, preset_folder, preset_names, read_preset
from sftcli.errors import NotFoundError, UsageError

REPO = Path(__file__).parents[3]


def write(folder, name, text):
    (folder / f"{name}.toml").write_text(text)


@pytest.fixture
def package(tmp_path):
    """An installed package `site/sftcli` with presets inside and a stranger's `site/presets` beside it."""
    for folder in ("site/sftcli/_presets", "site/presets"):
        (tmp_path / folder).mkdir(parents=True)
        write(tmp_path / folder, "quick", 'description = "x"')
    return tmp_path / "site" / "sftcli"


def test_presets_inside_the_package_come_first(package):
    assert preset_folder(package) == package / "_presets"


def test_without_presets_inside_the_package_those_of_the_source_tree_are_used(package):
    (package / "_presets" / "quick.toml").unlink()
    assert preset_folder(package) == package.parent / "presets"


def test_an_installation_without_presets_says_so(package):
    (package / "_presets" / "quick.toml").unlink()
    (package.parent / "presets" / "quick.toml").unlink()
    with pytest.raises(NotFoundError, match="presets are missing"):
        preset_folder(package)


def test_the_presets_have_the_names_of_the_source_document():
    assert {"gpu", "gpu-smoke", "local", "local-smoke"} <= set(preset_names())


def test_a_chain_of_presets_starts_with_the_one_at_the_bottom(tmp_path):
    write(tmp_path, "a", 'description = "A"\nextends = "b"')
    write(tmp_path, "b", 'description = "B"\nextends = "c"')
    write(tmp_path, "c", 'description = "C"')
    preset = read_preset("a", folder=tmp_path)
    assert [link.name for link in preset.chain] == ["c", "b", "a"]
    assert preset.description == "A"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('description = "A"\nextends = "a"', "a.toml:2: presets extend each other in a cycle: a -> a"),
        ('description = "A"\nextends = "b"', "b.toml:2: presets extend each other in a cycle: a -> b -> a"),
        ('description = "A"\nextends = "bb"', "no preset 'bb' (did you mean 'b'?)"),
        ('description = "A"\nextends = 5', "a.toml:2: extends must be text"),
        ("[training]", "a.toml: a preset needs a description of one line"),
        ('description = ""', "a.toml:1: a preset needs a description of one line"),
        ('description = "one\\ntwo"', "a.toml:1: a preset needs a description of one line"),
        ("description = 5", "a.toml:1: description must be text"),
    ],
)
def test_a_broken_preset_is_refused(tmp_path, text, message):
    write(tmp_path, "a", text)
    write(tmp_path, "b", 'description = "B"\nextends = "a"')
    with pytest.raises(UsageError) as caught:
        read_preset("a", folder=tmp_path)
    assert caught.value.message.removeprefix(f"{tmp_path}/") == message


@pytest.mark.parametrize("name", ["qick", "Quick", "quick.toml", "../presets/quick"])
def test_an_unknown_preset_is_answered_with_the_nearest_and_the_list(name):
    with pytest.raises(UsageError) as caught:
        read_preset(name)
    assert caught.value.message.startswith(f"no preset {name!r}")
    assert caught.value.hint == f"Presets are {', '.join(preset_names())}."
    assert name != "qick" or caught.value.message == "no preset 'qick' (did you mean 'quick'?)"


def test_a_reference_names_a_file_of_a_preset():
    path = preset_file("preset:quick/train.jsonl")
    assert path == (REPO / "presets" / "quick" / "train.jsonl").resolve()
    assert path.is_file()


@pytest.mark.parametrize(
    "reference", ["preset:../pyproject.toml", "preset:/etc/passwd", "preset:", "quick/train.jsonl"]
)
def test_a_reference_that_leaves_the_presets_is_refused(reference):
    with pytest.raises(UsageError, match="is not a preset file"):
        preset_file(reference)


def test_a_reference_to_a_missing_file_suggests_the_nearest():
    with pytest.raises(NotFoundError, match=r"did you mean 'preset:quick/train\.jsonl'\?"):
        preset_file("preset:quick/trian.jsonl")
