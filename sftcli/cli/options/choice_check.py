"""Words of flags that settings choose from, checked while flags are read. Imports nothing but Typer until one was given."""

from collections.abc import Callable

import typer


def one_of_setting(key: str) -> Callable[[object], object]:
    """Return a callback that checks words of a flag against the setting ``key``, together with the other flags.

    The settings would refuse them too, but only after the flags that Typer checks.
    """

    def check(value: object) -> object:
        if value:
            from sftcli.config.fields import choices, element_choices
            from sftcli.config.schema.settings import FIELDS

            words = choices(FIELDS[key]) or element_choices(FIELDS[key])
            for word in value if isinstance(value, list) else [value]:
                if word not in words:
                    raise typer.BadParameter(f"{word!r} is not one of {', '.join(map(repr, words))}")
        return value

    return check
