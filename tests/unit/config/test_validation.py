from typing import Annotated

from pydantic import AfterValidator, BaseModel, ValidationError

from sftcli.config.layers import Entry
from sftcli.config.resolve import wrong_value
from sftcli.errors import Location


def is_even(value: int) -> int:
    if value % 2:
        raise ValueError("must be even")
    return value


class Pairs(BaseModel):
    count: Annotated[int, AfterValidator(is_even)]


def test_a_validator_of_one_field_speaks_in_its_own_words():
    place = Location(file="my.toml", line=3)
    entry = Entry(key="pairs.count", value=3, origin="my.toml:3", location=place)
    try:
        Pairs(count=3)
    except ValidationError as invalid:
        (error,) = invalid.errors()
        problem = wrong_value(error, "pairs.count", entry, Pairs.model_fields["count"])
        assert (problem.text, problem.location) == ("my.toml:3: pairs.count must be even", place)
