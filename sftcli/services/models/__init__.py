"""Which model a command means: a checkpoint, a run, a folder, or the base of an adapter."""
