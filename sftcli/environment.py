"""Variables that libraries read once, when they are loaded: set before torch is imported. The user's own values stay."""

import os


def set_defaults() -> None:
    """Set what makes training on a CPU faster."""
    # Threads that wait for each other must sleep, not spin: on a machine that does other work too, spinning made training
    # two times slower, and without other work it gains nothing.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
