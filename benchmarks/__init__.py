"""Benchmarks, each a program of its own; they run as ``sft`` does."""

from sftcli.environment import set_defaults

set_defaults()
