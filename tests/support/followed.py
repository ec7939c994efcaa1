"""The settings that the help of a refusal names, as options of rendering."""

import re
from typing import Any

from sftcli.config.schema.data import Thinking, TrainOn
from sftcli.modeling.tokenizer.variables import parse_variables


def options_in(remedy: str) -> dict[str, Any]:
    """Return the flags in ``remedy`` as ``variables``, ``train_on`` and ``thinking``; nothing where it has none of them."""
    options: dict[str, Any] = {}
    for name, value in re.findall(r"--(template-var|train-on|thinking) (\S+)", remedy):
        match name:
            case "template-var":
                options["variables"] = parse_variables([value])
            case "train-on":
                options["train_on"] = TrainOn(value)
            case _:
                options["thinking"] = Thinking(value)
    return options
