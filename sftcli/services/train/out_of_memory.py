"""Running out of memory as an error that names the way out."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from sftcli.errors import ResourceError
from sftcli.training.out_of_memory import is_out_of_memory


@contextmanager
def memory_errors(
    tried: Callable[[], str], *, resume_command: str, way_down: Callable[[], str] = str
) -> Iterator[None]:
    """Turn running out of memory inside the block into an error with flags, the one that costs no quality first.

    Args:
        tried: Returns in words with what it ran out, such as "micro-batches of 4 rows".
        resume_command: Goes on with the run.
        way_down: Returns the setting that goes on with less memory, such as "training.micro_batch_size=2", where there is one.

    Raises:
        ResourceError: Memory ran out; checkpoints are intact.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        setting = way_down()
        smaller = f"{resume_command} --set {setting} --allow-change {setting.partition('=')[0]}"
        raise ResourceError(
            f"out of memory with {tried()}; checkpoints are intact",
            hint=(f"go on in smaller steps of the same updates: {smaller}; or " if setting else "")
            + "in a new run lower training.micro_batch_size, or training.micro_batch_tokens where that is set (the updates stay "
            "the same), set "
            "training.gradient_checkpointing, choose training.optimizer=adafactor, lower data.max_tokens, or choose a "
            f"smaller model; where something else took the memory: {resume_command}",
        ) from error
