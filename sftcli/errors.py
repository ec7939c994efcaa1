"""The errors a user can meet, each with its exit code.

SftError
  UsageError        2   a flag, preset, key or value is wrong
  ThresholdError    3   a limit that the user set was not met
  DivergedError     4   training gave no finite loss
  DataError        65   rows or checkpoint content are invalid
  NotFoundError    66   an input does not exist
  NetworkError     69   the network or a hub cannot be reached
  ResourceError    71   memory or device
  OutputError      73   an output cannot be created, exists, or is locked
  StorageError     74   input or output failed, the disk is full
  ConsentError     77   a safety opt-in or a login is needed
  MismatchError    78   a checkpoint and the configuration or data disagree
  StoppedError    130   the user stopped a command that keeps nothing

Codes follow sysexits where it has one; they are a published interface. 0 is done, 1 is a bug in this
program, 75 is "stopped on request, saved, run again", 128 + n is a signal.
"""

import re
from dataclasses import dataclass
from typing import ClassVar

STOPPED_EXIT_CODE = 75  # also of a process of several that was stopped without a signal of its own

# Access tokens, which have 16 characters and more or mixed case where a name such as hf_models has not, and what stands
# before the host of an address.
_SECRETS = re.compile(
    r"hf_(?:\w*[a-z0-9][A-Z]\w*|[A-Za-z0-9]{16,})|\bsk-[A-Za-z0-9_-]{16,}|(?<=//)[^\s/@]+(?=@)|(?<=[Bb]earer )\S{8,}"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Location:
    """Where in the user's input the fault is: a file, a line and column (1-based), or a settings key."""

    file: str | None = None
    line: int | None = None
    column: int | None = None
    key: str | None = None

    def __str__(self) -> str:
        place = ":".join(str(part) for part in (self.file, self.line, self.column) if part is not None)
        return place or (self.key or "")


class SftError(Exception):
    """Base of every expected error: says what was found, where, and what to do next.

    Args:
        message: What is wrong, one sentence without a full stop.
        hint: What to do about it, one sentence; empty when the message says it.
        location: The file, line or key it was found at.
    """

    exit_code: ClassVar[int] = 1
    kind: ClassVar[str] = "error"

    def __init__(self, message: str, *, hint: str = "", location: Location | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.location = location or Location()


class UsageError(SftError):
    """A flag, preset, settings key or value is wrong."""

    exit_code = 2
    kind = "usage"


class ThresholdError(SftError):
    """A limit that the user set was not met."""

    exit_code = 3
    kind = "threshold"


class DivergedError(SftError):
    """Training gave no finite loss several steps in a row."""

    exit_code = 4
    kind = "diverged"


class DataError(SftError):
    """Rows, files or checkpoint content are invalid."""

    exit_code = 65
    kind = "data"


class NotFoundError(SftError):
    """A named input does not exist."""

    exit_code = 66
    kind = "not-found"


class NetworkError(SftError):
    """The network or a hub cannot be reached, and nothing local serves instead."""

    exit_code = 69
    kind = "network"


class ResourceError(SftError):
    """Memory ran out or a device is missing."""

    exit_code = 71
    kind = "resource"


class OutputError(SftError):
    """An output cannot be created, already exists, or is in use."""

    exit_code = 73
    kind = "output"


class StorageError(SftError):
    """Reading or writing failed, or the disk is full."""

    exit_code = 74
    kind = "storage"


class UnsavedError(StorageError):
    """A checkpoint could not be written, but the disk is not full: training may go on and try again when next due."""


class ConsentError(SftError):
    """A safety opt-in or a login is needed."""

    exit_code = 77
    kind = "consent"


class MismatchError(SftError):
    """A checkpoint disagrees with the configuration, the model or the data."""

    exit_code = 78
    kind = "mismatch"


class StoppedError(SftError):
    """The user asked to stop a command that keeps nothing when stopped; the exit code is that of the signal."""

    exit_code = 130
    kind = "stopped"

    def __init__(self) -> None:
        super().__init__("stopped early; nothing was kept")


class ReportedByPeerError(Exception):
    """Another rank has reported the failure; exit quietly with its ``exit_code``."""

    def __init__(self, exit_code: int) -> None:
        super().__init__(f"another process failed with exit code {exit_code}")
        self.exit_code = exit_code


def redact(text: str) -> str:
    """Return ``text`` without access tokens and without the user part of addresses."""
    return _SECRETS.sub("***", text)


def first_line(error: Exception) -> str:
    """Return the first line of what another library says went wrong, or the kind of its error where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
