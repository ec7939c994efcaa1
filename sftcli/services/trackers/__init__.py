"""Metrics of a run, sent to trackers: one file for each, and a table of them in ``sink``."""
