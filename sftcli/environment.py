"""Variables that libraries read once, when they are loaded: set before torch is imported. The user's own values stay."""

import os


def set_defaults() -> None:
    """Set what makes work on a CPU faster."""
    if "OMP_WAIT_POLICY" in os.environ:
        return
    # Threads that wait for each other must soon sleep: on a machine that does other work too, spinning made training two
    # times slower, and without other work it gains nothing.
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    # Between the small operations of decoding, though, waking a thread takes longer than the wait: a few microseconds of
    # spinning made a step of one row 10 to 20 % faster, and left training as it was.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
