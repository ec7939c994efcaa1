"""The names of probed choices, as a run records them."""

from enum import StrEnum


class RowSharing(StrEnum):
    """How documents of one row are kept apart."""

    NONE = "none"  # each has a row of its own
    BOUNDS = "bounds"  # by an attention that is told where they begin
    MASK = "mask"  # by the mask that the model makes from positions


class HeadLoss(StrEnum):
    """Where the head of the model runs."""

    LEAN = "lean"  # at positions with loss alone
    WHOLE = "whole"  # everywhere, as the model does it


class WeightSharing(StrEnum):
    """Whether each process holds a replica or a shard."""

    WHOLE = "whole"  # all weights
    SHARED = "shared"  # a part of them; where there are several replicas, "shared by N" processes
