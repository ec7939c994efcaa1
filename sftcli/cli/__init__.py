"""The command line: parses, calls one service, and shows what came back. Only here are Typer and Rich known.

``app`` has the commands and ``errors`` shows what went wrong. A command turns ``options`` into settings, runs its
service in a ``session``, whose ``views`` show events as they come, and prints ``results``. ``terminal`` is text that
is safe and fits.
"""
