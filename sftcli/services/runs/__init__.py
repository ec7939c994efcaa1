"""A run on disk.

``folder`` knows its files, ``event_log`` writes and mends its logs, ``lock`` keeps a second process out, ``summary``
is its line in a list, ``trained_rows`` are the rows it was trained on.
"""
