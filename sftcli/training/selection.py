"""Which weights of a whole model train, by patterns of their names.

A pattern is words between dots, which stand one after the other anywhere in a name: ``mlp`` and ``layers.0.mlp`` are in
``model.layers.0.mlp.up_proj.weight``. In a word ``*`` and ``?`` stand for letters; ``0-3`` for numbers from 0 to 3, and ``20-``
for 20 and all above.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from sftcli.errors import Location, UsageError
from sftcli.suggest import did_you_mean

if TYPE_CHECKING:
    import torch

TRAIN, FREEZE = "training.train", "training.freeze"
_RANGE = re.compile(r"(?P<first>\d+)-(?P<last>\d*)")


def matches(pattern: str, name: str) -> bool:
    """Return whether the weight called ``name`` is meant by ``pattern``."""
    wanted, words = pattern.split("."), name.split(".")
    starts = range(len(words) - len(wanted) + 1)
    return any(all(map(_is_word, wanted, words[start:])) for start in starts)


def _is_word(pattern: str, word: str) -> bool:
    if (found := _RANGE.fullmatch(pattern)) and word.isdecimal():
        return int(found["first"]) <= int(word) <= int(found["last"] or word)
    return fnmatchcase(word, pattern)


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """What ``select_weights`` made of a model: how many tensors and numbers train, of how many, and what goes together."""

    trained: int
    tensors: int
    share: float
    tied: tuple[str, ...]  # names of one tensor of which a pattern names some and others not

    def in_words(self) -> str:
        """Return it as a sentence."""
        text = f"trains {self.trained} of {self.tensors} tensors, {self.share:.3g} % of the weights"
        return f"{text}; {' and '.join(self.tied)} are one tensor" if self.tied else text


def select_weights(
    model: "torch.nn.Module", *, train: Sequence[str] = (), freeze: Sequence[str] = ()
) -> Selection:
    """Let the weights of ``model`` that train go on training where ``train`` (if it names any) means them and ``freeze`` does not.

    A tensor with several names, as a head that is tied to the embeddings, is meant where one of them is.

    Raises:
        UsageError: A pattern means no weight, or only weights that another setting freezes; or nothing is left.
    """
    names: dict[torch.nn.Parameter, list[str]] = {}
    for name, weight in model.named_parameters(remove_duplicate=False):
        names.setdefault(weight, []).append(name)
    for key, patterns in ((TRAIN, train), (FREEZE, freeze)):
        for pattern in patterns:
            _require_match(pattern, [name for found in names.values() for name in found], key)
    for weight, found in names.items():
        is_wanted = not train or _is_meant(found, train)
        weight.requires_grad_(weight.requires_grad and is_wanted and not _is_meant(found, freeze))
    trained = [found for weight, found in names.items() if weight.requires_grad]
    for pattern in train:
        _require_trained(pattern, trained)
    if not trained:
        raise UsageError(
            f"{FREEZE} leaves nothing to train", hint="freeze less", location=Location(key=FREEZE)
        )
    sizes = {weight: weight.numel() for weight in names}
    return Selection(
        trained=len(trained),
        tensors=len(names),
        share=100 * sum(sizes[weight] for weight in names if weight.requires_grad) / sum(sizes.values()),
        tied=next((tuple(found) for found in names.values() if _is_parted(found, (*train, *freeze))), ()),
    )


def trained_share(sizes: Mapping[str, int], *, train: Sequence[str], freeze: Sequence[str]) -> float:
    """Return about which share of tensors in files, name -> size, the patterns let train."""
    trained = sum(
        size
        for name, size in sizes.items()
        if (not train or _is_meant([name], train)) and not _is_meant([name], freeze)
    )
    return trained / max(1, sum(sizes.values()))


def _is_meant(names: Iterable[str], patterns: Iterable[str]) -> bool:
    return any(matches(pattern, name) for pattern in patterns for name in names)


def _is_parted(names: Sequence[str], patterns: Sequence[str]) -> bool:
    """Return whether some pattern means some of the ``names`` of one tensor and not the others."""
    return any(len({matches(pattern, name) for name in names}) > 1 for pattern in patterns)


def _require_match(pattern: str, names: Sequence[str], key: str) -> None:
    if _is_meant(names, [pattern]):
        return
    known = {word for name in names for word in name.split(".") if not word.isdecimal()}
    words = [word for word in pattern.split(".") if not any(_is_word(word, one) for one in known)]
    strange = next((word for word in words if not word[:1].isdecimal()), "")
    numbers = sorted({int(word) for name in names for word in name.split(".") if word.isdecimal()})
    layers = f"; layers are {numbers[0]} to {numbers[-1]}" if numbers else ""
    hint = strange and did_you_mean(strange, known)
    raise UsageError(
        f"{key} names {pattern!r}, and the model has no such weight",
        hint=hint or f"names are like {names[0]} and {names[len(names) // 2]}{layers}",
        location=Location(key=key),
    )


def _require_trained(pattern: str, trained: Sequence[Sequence[str]]) -> None:
    if not any(_is_meant(found, [pattern]) for found in trained):
        raise UsageError(
            f"{TRAIN} names {pattern!r}, and {FREEZE} or training.train_embeddings freezes all that it means",
            hint="leave one of them out",
            location=Location(key=TRAIN),
        )
