"""The names nearest to a mistyped one. Guarantees that any single slip of the finger finds the name that was meant."""

from collections.abc import Iterable, Mapping, Sequence

MAX_SUGGESTIONS = 3


def edit_distance(a: str, b: str) -> int:
    """Return how many insertions, deletions, replacements and swaps of neighbors turn ``a`` into ``b``."""
    rows = [list(range(len(b) + 1))]
    for i, left in enumerate(a, start=1):
        row = [i]
        for j, right in enumerate(b, start=1):
            cost = min(rows[-1][j] + 1, row[-1] + 1, rows[-1][j - 1] + (left != right))
            if i > 1 and j > 1 and left == b[j - 2] and a[i - 2] == right:
                cost = min(cost, rows[-2][j - 2] + 1)
            row.append(cost)
        rows.append(row)
    return rows[-1][-1]


def nearest(word: str, known: Iterable[str]) -> Sequence[str]:
    """Return the names that ``word`` was probably meant to be: all at the smallest distance, none when all are far.

    Where no whole name is near, names are compared by their last dotted part: ``seed`` finds ``training.seed``.
    """
    names = list(known)
    return _nearest(word, {name: name for name in names}) or _nearest(
        word.rpartition(".")[2], {name: name.rpartition(".")[2] for name in names}
    )


def _nearest(word: str, spellings: Mapping[str, str]) -> Sequence[str]:
    # One slip is always worth a suggestion. More are, while at least two thirds of the word may be right.
    limit = max(1, len(word) // 3)
    distances = {
        name: edit_distance(word, spelling)
        for name, spelling in spellings.items()
        if abs(len(word) - len(spelling)) <= limit  # else it is as far at least
    }
    least = min(distances.values(), default=0)
    return [name for name in distances if distances[name] == least <= limit][:MAX_SUGGESTIONS]


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return "did you mean 'x' or 'y'?" with the names nearest to ``word``, or an empty string."""
    return question(nearest(word, known))


def question(names: Sequence[str]) -> str:
    """Return "did you mean 'x' or 'y'?", or an empty string when there are no names."""
    return f"did you mean {' or '.join(map(repr, names))}?" if names else ""


def aside(text: str) -> str:
    """Return ``text`` in brackets behind a space, or nothing."""
    return f" ({text})" if text else ""
