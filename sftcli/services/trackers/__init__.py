"""Numbers of a run, handed on to programs that draw them: one file for each, and a table of them in ``sink``."""
