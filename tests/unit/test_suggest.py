from hypothesis import given
from hypothesis import strategies as st

from sftcli.config.presets import preset_names
from sftcli.config.schema.settings import FIELDS
from sftcli.suggest import did_you_mean, edit_distance, nearest

LETTERS = "abcdefghijklmnopqrstuvwxyz_.0123456789"


@st.composite
def slips(draw, names):
    """A name and the same name after one deletion, replacement or swap of neighbors."""
    name = draw(st.sampled_from(names))
    at = draw(st.integers(0, len(name) - 1))
    kind = draw(st.sampled_from(["delete", "replace", "swap", "insert"]))
    if kind == "delete":
        slip = name[:at] + name[at + 1 :]
    elif kind == "replace":
        slip = name[:at] + draw(st.sampled_from(LETTERS)) + name[at + 1 :]
    elif kind == "insert":
        slip = name[:at] + draw(st.sampled_from(LETTERS)) + name[at:]
    else:
        slip = name[:at] + name[at : at + 2][::-1] + name[at + 2 :]
    return name, slip


@given(slips(sorted(FIELDS)))
def test_any_settings_key_with_one_slip_suggests_the_key_that_was_meant(case):
    name, slip = case
    assert slip in FIELDS or name in nearest(slip, FIELDS)


@given(slips(preset_names()))
def test_any_preset_name_with_one_slip_suggests_the_preset_that_was_meant(case):
    name, slip = case
    assert slip in preset_names() or name in nearest(slip, preset_names())


@given(st.text("abc", max_size=6), st.text("abc", max_size=6))
def test_edit_distance_is_symmetric_and_zero_only_for_equal_words(a, b):
    assert edit_distance(a, b) == edit_distance(b, a)
    assert (edit_distance(a, b) == 0) == (a == b)


def test_a_swap_of_neighbors_is_one_edit():
    assert edit_distance("steps", "setps") == 1


def test_equally_near_names_are_all_suggested():
    assert did_you_mean("training.beta3", FIELDS) == "did you mean 'training.beta1' or 'training.beta2'?"


def test_a_key_without_its_section_is_found_in_its_section():
    assert did_you_mean("learning_rate", FIELDS) == "did you mean 'training.learning_rate'?"
    assert did_you_mean("seed", FIELDS) == "did you mean 'training.seed' or 'sampling.seed'?"


def test_a_word_that_resembles_nothing_gets_no_suggestion():
    assert did_you_mean("zzz", FIELDS) == ""
    assert did_you_mean("zzz", []) == ""
