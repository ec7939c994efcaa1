"""What is said about rows: counts and reasons, duplicates, damaged text, and the limits that turn them into an exit code."""
