"""Flags that commands share, their completion, and their way into settings."""
