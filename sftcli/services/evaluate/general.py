"""What a model has forgotten: its loss on general text, which no rows of anybody are about, beside that of its base."""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sftcli.data.example import Example
from sftcli.data.general.general import VERSION, GeneralText, general_texts
from sftcli.data.reading.record import Origin
from sftcli.modeling.tokenizer.files import read_tokenizer_files
from sftcli.services.evaluate.metrics import paired_difference
from sftcli.services.report.score import Forgetting
from sftcli.training.row_scores import RowScore

_ASKED = "Question: {}\nAnswer:"  # no chat template: a base may not have learned one, and would seem to remember less


@dataclass(frozen=True, slots=True, kw_only=True)
class GeneralRows:
    """The general text as rows: every token behind the first of a passage has loss, and those of answers."""

    examples: tuple[Example, ...]
    kinds: tuple[str, ...]

    @property
    def num_tokens(self) -> Sequence[int]:
        """Length of each row."""
        return [len(example.input_ids) for example in self.examples]

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int, /) -> Example:
        return self.examples[index]


def general_rows(folder: Path, *, most_tokens: int) -> GeneralRows:
    """Return the general text in the tokens of the tokenizer in ``folder``, each row cut to ``most_tokens``; 0 cuts none."""
    tokenizer = read_tokenizer_files(folder).tokenizer
    found: list[tuple[Example, str]] = []
    for line, text in enumerate(general_texts(), start=1):
        prompt = _ASKED.format(text.question) if text.question else ""
        ids = tokenizer.encode(f"{prompt} {text.text}" if prompt else text.text).ids
        first = _shared(ids, tokenizer.encode(prompt).ids) if prompt else 1
        cut = ids[: most_tokens or None]
        if len(cut) > first:
            found.append((_example(cut, first, line, text), text.kind))
    return GeneralRows(
        examples=tuple(example for example, _ in found), kinds=tuple(kind for _, kind in found)
    )


def forgotten(rows: GeneralRows, base: Sequence[RowScore], tuned: Sequence[RowScore]) -> Forgetting:
    """Return how much worse ``tuned`` predicts the general text than ``base``."""
    tokens = sum(row.tokens for row in base)
    by_kind: dict[str, list[tuple[RowScore, RowScore]]] = defaultdict(list)
    for kind, pair in zip(rows.kinds, zip(base, tuned, strict=True), strict=True):
        by_kind[kind].append(pair)
    return Forgetting(
        version=VERSION,
        texts=len(rows),
        tokens=tokens,
        base=math.fsum(row.nll for row in base) / tokens,
        tuned=math.fsum(row.nll for row in tuned) / tokens,
        difference=paired_difference(
            [row.nll for row in base], [row.nll for row in tuned], [row.tokens for row in base]
        ),
        kinds={
            kind: math.fsum(mine.nll - theirs.nll for theirs, mine in pairs)
            / sum(theirs.tokens for theirs, _ in pairs)
            for kind, pairs in by_kind.items()
        },
    )


def _shared(ids: Sequence[int], prompt: Sequence[int]) -> int:
    """Return how many tokens ``ids`` begins with that the prompt alone has: a token may reach over its end."""
    same = [mine == theirs for mine, theirs in zip(ids, prompt, strict=False)]
    return same.index(False) if False in same else len(same)


def _example(ids: Sequence[int], first: int, line: int, text: GeneralText) -> Example:
    return Example(
        input_ids=np.array(ids, dtype=np.int32),
        loss_mask=np.arange(len(ids)) >= max(1, first),
        origin=Origin(path=f"general text ({text.kind})", line=line),
        kind="text",
    )
