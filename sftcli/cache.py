"""The folder that keeps what was downloaded or converted once."""

import os
from pathlib import Path

from sftcli import storage
from sftcli.errors import ConsentError, OutputError

CACHE_HINT = "set SFT_CACHE_DIR to a folder that you can write to"


def cache_folder() -> Path:
    """Return the cache folder, created for this user alone if missing.

    ``SFT_CACHE_DIR``, else ``$XDG_CACHE_HOME/sft``, else ``~/.cache/sft``.

    Raises:
        OutputError: There is no home folder, or the folder cannot be made or written to.
        ConsentError: It belongs to another user, who could put a model of theirs there; naming it allows that.
    """
    root = _named_root()
    try:
        storage.make_folders(root, mode=0o700)
    except OSError as error:
        raise OutputError(
            f"cannot make the cache folder {root}: {error.strerror}", hint=CACHE_HINT
        ) from error
    if not os.access(root, os.W_OK | os.X_OK):
        raise OutputError(f"the cache folder {root} is not writable", hint=CACHE_HINT)
    has_owner = hasattr(os, "getuid")  # not on Windows, where the folder lies in the user's own
    if has_owner and not os.environ.get("SFT_CACHE_DIR") and root.stat().st_uid not in (os.getuid(), 0):
        raise ConsentError(
            f"the cache folder {root} belongs to another user, who controls its contents",
            hint=f"trust it with SFT_CACHE_DIR={root}, or set SFT_CACHE_DIR to a folder of your own",
        )
    return root


def _named_root() -> Path:
    if chosen := os.environ.get("SFT_CACHE_DIR"):
        return Path(chosen).expanduser().absolute()
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base).expanduser().absolute() / "sft"
    try:
        return Path.home() / ".cache" / "sft"
    except RuntimeError as error:
        raise OutputError("no home folder is known to keep models in", hint=CACHE_HINT) from error
