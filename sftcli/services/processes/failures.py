"""Why one of several processes ended, as a message to rank 0, which shows it."""

import json
import traceback
from collections.abc import Iterator
from dataclasses import asdict

from sftcli.errors import Location, ResourceError, SftError, StoppedError
from sftcli.memory_faults import is_out_of_memory, out_of_memory

_INTERNAL, _MAX_TRACE = "internal", 20_000


class PeerBugError(RuntimeError):
    """A bug showed in another process; its traceback is a note of this error."""


def lost_peer(what: str) -> ResourceError:
    """Return the error of a training that ``what`` happened to one process of."""
    return ResourceError(
        f"{what}; all others were stopped; checkpoints are intact",
        hint="resume from the last checkpoint: sft resume RUN, with the path that was shown at the start. If the system killed it for lack of memory, lower "
        "training.micro_batch_size or start fewer processes",
    )


def describe_failure(error: BaseException, *, rank: int) -> str:
    """Return ``error`` of process ``rank`` as one line of JSON."""
    if isinstance(error, KeyboardInterrupt):
        error = StoppedError()
    if is_out_of_memory(error):
        error = out_of_memory()
    if isinstance(error, SftError):
        about: dict[str, object] = {
            "kind": error.kind,
            "message": error.message,
            "hint": error.hint,
            "location": asdict(error.location),
            "exit_code": error.exit_code,
        }
    else:
        trace = "".join(traceback.format_exception(error))[-_MAX_TRACE:]
        text = f"process {rank}: {type(error).__name__}: {error}"
        about = {"kind": _INTERNAL, "message": text, "trace": trace, "exit_code": 1}
    return json.dumps(about)


def exit_code_of(described: str) -> int:
    """Return the exit code of a described failure."""
    return int(json.loads(described)["exit_code"])


def error_of(described: str) -> Exception:
    """Return the error that ``describe_failure`` was given, or one like it."""
    about = json.loads(described)
    if about["kind"] == _INTERNAL:
        bug = PeerBugError(about["message"])
        bug.add_note(about["trace"])
        return bug
    if about["kind"] == StoppedError.kind:
        return StoppedError()
    kinds: dict[str, type[SftError]] = {}
    for kind in _kinds(SftError):
        kinds.setdefault(kind.kind, kind)
    return kinds[about["kind"]](about["message"], hint=about["hint"], location=Location(**about["location"]))


def _kinds(base: type[SftError]) -> Iterator[type[SftError]]:
    for kind in base.__subclasses__():
        yield kind
        yield from _kinds(kind)
