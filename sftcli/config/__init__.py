"""Settings: every key, its default and its range stand here once.

Defaults, preset, file, environment and flags become ``layers``; ``resolve`` lets the later ones win, validates the
result against the ``schema``, and keeps for each value where it came from. ``interplay`` settles what one value says
about another.
"""
