"""What pydantic-settings merges and what ``winning`` names as the origin are one."""

from hypothesis import given, settings
from hypothesis import strategies as st

from sftcli.config.layers import Entry, Layer, winning
from sftcli.config.schema.settings import Settings
from sftcli.errors import Location

KEYS = ("training.seed", "sampling.seed", "sampling.top_k")


def layer(values: dict[str, int], name: str) -> Layer:
    return Layer(
        entries={
            key: Entry(key=key, value=value, origin=name, location=Location(key=key))
            for key, value in values.items()
        }
    )


@settings(deadline=None)
@given(st.lists(st.dictionaries(st.sampled_from(KEYS), st.integers(0, 9))))
def test_the_value_of_a_key_is_that_of_the_origin_that_is_told(values: list[dict[str, int]]) -> None:
    layers = [layer(given, str(index)) for index, given in enumerate(values)]
    merged, told = Settings.of_layers(layers), winning(layers)
    for key in KEYS:
        section, _, name = key.partition(".")
        holders = [index for index, given in enumerate(values) if key in given]
        default = getattr(getattr(Settings(), section), name)
        expected = values[holders[-1]][key] if holders else default
        assert getattr(getattr(merged, section), name) == expected
        assert not holders or told[key].origin == str(holders[-1])
        assert bool(holders) == (key in told)
