"""A run on disk.

``folder`` knows its files, ``event_log`` writes and mends its logs, ``lock`` keeps a second process out, ``summary``
is its line in a list, ``outcome`` is its model or why it has none, ``trained_rows`` are the rows it was trained on.
"""
