"""How many rows are among those that a run has trained on, as a value. Needs no numpy."""

from dataclasses import dataclass

from sftcli.figures import counted


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedRows:
    """How many of ``rows`` a run has trained on: the full row, or only its prompt. Tokens are compared."""

    rows: int
    same_row: int
    same_prompt: int  # those of ``same_row`` included

    def __str__(self) -> str:
        """Return it as a sentence."""
        if not self.same_prompt:
            return (
                "this row was not trained on"
                if self.rows == 1
                else f"none of these {self.rows:,} rows was trained on"
            )
        more = self.same_prompt - self.same_row
        said = f"{self.same_row:,} of {'this' if self.rows == 1 else 'these'} {counted(self.rows, 'row')} {_were(self.same_row)} trained on"
        return (
            f"{said}, and {more:,} more {'has' if more == 1 else 'have'} a prompt that was" if more else said
        )


def _were(rows: int) -> str:
    return "was" if rows == 1 else "were"
