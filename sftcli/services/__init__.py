"""What a program would call: a request in, an outcome out, events on the way. No service knows a terminal.

``train``, ``evaluate``, ``generate`` and ``export`` are commands. They share ``prepare`` (rows), ``report`` (what a
person reads of a run), ``diagnosis`` (what its numbers mean), ``models``, ``trackers``, ``processes`` and ``runs`` (a
run on disk).
"""
