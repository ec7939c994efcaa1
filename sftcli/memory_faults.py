"""Running out of memory: what says so, and trying things so that it is never taken for an answer.

Nothing here imports torch: whoever ends a command asks too.
"""

import errno
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Self

from sftcli.errors import ResourceError

# What libraries say in errors of no kind of their own: torch on a CPU, the CUDA runtime, its libraries of products
# (CUBLAS_STATUS_ALLOC_FAILED, CUDNN_STATUS_ALLOC_FAILED), Triton, NCCL, MPS.
_WORDS = ("out of memory", "defaultcpuallocator", "status_alloc_failed", "errormemoryallocation")
_KINDS = ("OutOfMemoryError", "OutOfResources")  # of torch and of Triton, in whatever version
_OF_KERNELS = (
    "OutOfResources"  # a kernel that is too large for this kind of card, however much of its memory is free
)

Kinds = tuple[type[Exception], ...]
CANNOT: Kinds = (AttributeError, TypeError, ValueError, RuntimeError, LookupError)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether ``error`` says that the machine or the device has no memory left.

    torch has a kind for what its own cache cannot get. What other libraries allocate beside it fails as a plain
    ``RuntimeError``, ``AcceleratorError`` or ``DistBackendError``, of which the words tell.
    """
    if isinstance(error, MemoryError) or any(kind.__name__ in _KINDS for kind in type(error).__mro__):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in _WORDS)


class Attempt(AbstractContextManager["Attempt"]):
    """A try of what a model may be unable to do: an error in the block ends it, and ``failed`` is set.

    Running out of memory is no inability: taken for one, it would lead to the way that needs more. It passes.

    Args:
        kinds: The errors that say "cannot".
    """

    def __init__(self, *kinds: type[Exception]) -> None:
        self.kinds = kinds or CANNOT
        self.failed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> bool:
        """End the block; true where its error says that the model cannot."""
        if error is None:
            return False
        is_too_large = any(one.__name__ == _OF_KERNELS for one in type(error).__mro__)
        self.failed = is_too_large or (isinstance(error, self.kinds) and not is_out_of_memory(error))
        return self.failed


class MemoryErrors(AbstractContextManager[None]):
    """Turns running out of memory in a block into the error that ``told`` returns; inner blocks know more and come first.

    Raises:
        ResourceError: Memory ran out.
    """

    def __init__(self, told: Callable[[], ResourceError] | None = None) -> None:
        self.told = told or out_of_memory

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None:
        """End the block."""
        if error is not None and is_out_of_memory(error):
            raise self.told() from error


def out_of_memory() -> ResourceError:
    """Return the error of a command that knows no more than that memory ran out."""
    return ResourceError(
        "out of memory",
        hint="free memory that other programs hold, or choose a smaller model or shorter rows; --precision bf16 halves the weights "
        "of one that is only read",
    )
