"""Several processes of one command: who this one is, how they start, how they speak, and how they fail."""
