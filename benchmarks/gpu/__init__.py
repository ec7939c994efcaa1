"""What a GPU must be shown to do: the same numbers as a CPU, then how fast; ``README.md`` tells how it is run."""
