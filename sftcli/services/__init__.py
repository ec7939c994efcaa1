"""The work of the commands and of ``sftcli.api``: a request in, a result out, events in between. No service writes to a terminal.

``train``, ``evaluate``, ``generate`` and ``export`` are commands. They share ``prepare`` (rows), ``report`` (what a
person reads of a run), ``diagnosis`` (what its numbers mean), ``models``, ``trackers``, ``processes`` and ``runs`` (a
run on disk).
"""
