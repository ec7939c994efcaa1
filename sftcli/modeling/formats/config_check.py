"""What a ``config.json`` must not hold: values that load without a word and compute nothing, or weights that do not train.

The classes of transformers look at types at most. What they refuse by themselves is not looked at here.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from sftcli.errors import DataError, Location, UsageError
from sftcli.json_files import read_json

CONFIG = "config.json"
# Quantizations whose weights transformers unpacks while it loads, or adapters train on: bitsandbytes by QLoRA.
_TRAINABLE = ("mxfp4", "bitsandbytes")
# Last part of a key -> which numbers may stand there, and how that is said.
_RANGES: tuple[tuple[re.Pattern[str], Callable[[float], bool], str], ...] = (
    (re.compile(r".*(?:dropout|pdrop)(?:_p|_prob|_rate|_ratio)?"), lambda x: 0 <= x <= 1, "from 0 to 1"),
    (re.compile(r"(?:.*_)?(?:eps|epsilon)"), lambda x: 0 <= x < 1, "from 0 to below 1"),
    (re.compile(r"(?:.*_)?(?:rope_theta|rotary_base|rotary_emb_base|rope_local_base_freq)"), lambda x: x > 0, "above 0"),
)  # fmt: skip


def check_config(folder: Path) -> None:
    """Refuse the configuration of the model in ``folder`` where it cannot be computed with, or trained.

    Raises:
        NotFoundError, DataError: It is missing or damaged, or holds a number that nothing can be computed with.
        UsageError: The weights are quantized in a form that is not trained.
    """
    path = folder / CONFIG
    config = read_json(path)
    for key in ("model_type", "text_config.model_type"):
        value = _at(config, key)
        if not isinstance(value, str | None):
            raise _unfit(path, key, repr(value)[:60], "a text")
    _refuse_packed(path, config.get("quantization_config"))
    for key, value, is_listed in _numbers(config):
        # Limits may be infinite, and stand in lists. A whole number may be too large to be made a float.
        if type(value) is float and (math.isnan(value) or (math.isinf(value) and not is_listed)):
            raise _unfit(path, key, value, "a finite number")
        for pattern, fits, told in _RANGES:
            if pattern.fullmatch(key.rpartition(".")[2]) and not fits(value):
                raise _unfit(path, key, value, f"a number {told}")


def _at(config: Mapping[str, object], key: str) -> object:
    value: object = config
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _numbers(value: object, key: str = "") -> Iterator[tuple[str, float, bool]]:
    """Yield the path of every number in ``value``, the number, and whether it stands in a list."""
    waiting = [(key, value, False)]
    while waiting:
        key, value, is_listed = waiting.pop()
        match value:
            case bool():
                pass
            case int() | float():
                yield key, value, is_listed
            case list():
                waiting += [(key, one, True) for one in value]
            case dict():
                waiting += [(f"{key}.{name}".lstrip("."), one, is_listed) for name, one in value.items()]


def _refuse_packed(path: Path, quantization: object) -> None:
    if not quantization:
        return
    method = quantization.get("quant_method") if isinstance(quantization, Mapping) else quantization
    if (
        method is None
        and isinstance(quantization, Mapping)
        and any(key.startswith("load_in_") for key in quantization)
    ):
        method = "bitsandbytes"  # older files do not name it
    if method not in _TRAINABLE:
        raise UsageError(
            f"{path}: the weights are quantized ({str(method)[:60]}), and such a base is not trained, exported or asked here",
            hint="name the model that they were made of, in bf16 or f32; --set adapter.quantize=4bit packs one for an adapter",
            location=Location(file=str(path), key="quantization_config"),
        )


def _unfit(path: Path, key: str, value: object, expected: str) -> DataError:
    return DataError(
        f"{path}: {key} is {value}, expected {expected}",
        hint="correct it, or download the model again",
        location=Location(file=str(path), key=key),
    )
