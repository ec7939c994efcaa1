"""This machine: its facts, and in which precision it multiplies faster."""
