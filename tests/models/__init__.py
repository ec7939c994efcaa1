"""Every model family and chat template that is at hand, tried on the whole program; ``README.md`` tells how each is run."""
