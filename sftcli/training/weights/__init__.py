"""The numbers that train, and where they lie: float32 masters, and parts of them in each process."""
