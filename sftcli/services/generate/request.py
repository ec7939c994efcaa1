"""What is to be answered and by whom, and the check of its names before torch is loaded."""

from dataclasses import dataclass
from pathlib import Path

from sftcli.config.schema.run import SamplingSettings
from sftcli.config.schema.training import Precision
from sftcli.errors import UsageError
from sftcli.modeling.tokenizer.files import read_tokenizer_files
from sftcli.paths import as_path
from sftcli.services.models.reference import ModelReference, find_model
from sftcli.services.server.address import ServerAddress, names_server, parse_server


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateRequest:
    """One prompt. ``checkpoint`` as in ``choose_model``; ``system`` empty leaves the template's own.

    ``with_base`` asks the model that the run started from as well, before the tuned one. ``tokenizer`` is a folder whose
    tokenizer is used instead of the model's.
    """

    prompt: str
    sampling: SamplingSettings
    root: Path
    precision: str
    checkpoint: str | None = None
    system: str = ""
    samples: int = 1
    with_base: bool = False
    tokenizer: str | None = (
        None  # of a .pt file, which holds none; for other models a folder that replaces theirs
    )
    ignored: tuple[str, ...] = ()  # keys of a file's rows that are dropped
    renames: tuple[str, ...] = ()  # columns of a file that are read under another name, each OURS=THEIRS
    trusts_code: bool = False  # that of the run, and of the model it started from
    base_model: str | None = None  # of an adapter, where its base is not where it says

    @property
    def is_pt(self) -> bool:
        """Whether a ``.pt`` file is asked."""
        return self.checkpoint is not None and self.checkpoint.endswith(".pt")

    @property
    def server(self) -> ServerAddress | None:
        """The server that is asked, if it is one.

        Raises:
            UsageError: It is written wrongly.
        """
        named = self.checkpoint is not None and names_server(self.checkpoint)
        return parse_server(self.checkpoint) if named and self.checkpoint is not None else None

    @property
    def tokenizer_folder(self) -> Path | None:
        """Folder of the tokenizer to use instead of the model's own."""
        return None if self.tokenizer is None or self.is_pt else as_path(self.tokenizer)

    @property
    def is_single(self) -> bool:
        """Whether there is one answer."""
        return self.samples == 1 and not self.with_base


def check_models(request: GenerateRequest) -> ModelReference:
    """Find the models of ``request`` by name, before anything slow, and return the tuned one.

    Raises:
        NotFoundError, UsageError, DataError: As ``find_model``, or there is no such tokenizer.
    """
    found = find_model(
        request.checkpoint,
        root=request.root,
        tokenizer=request.tokenizer if request.is_pt else None,
        trusts_code=request.trusts_code,
        base_model=request.base_model,
        takes_servers=True,
    )
    if found.server is not None:
        _check_server(request, found.server)
    if request.with_base and found.run is None and not found.is_adapter:
        raise unknown_base(found.name)
    if request.tokenizer_folder is not None:
        read_tokenizer_files(request.tokenizer_folder)
    return found


def _check_server(request: GenerateRequest, server: ServerAddress) -> None:
    """Refuse what a server does by itself.

    Raises:
        UsageError: It is asked for.
    """
    given = {
        "--tokenizer": request.tokenizer is not None,
        "--precision": request.precision != Precision.AUTO,
        "--base": request.with_base,
    }
    if flag := next((flag for flag, is_given in given.items() if is_given), ""):
        raise UsageError(f"{flag} is not for a server, and {server} is one", hint="leave it out")


def require_prompt(request: GenerateRequest) -> None:
    """Make sure that there is a prompt.

    Raises:
        UsageError: It is empty.
    """
    if not request.prompt.strip():
        raise UsageError(
            "the prompt is empty", hint='pass one: sft generate "your prompt", or - to read standard input'
        )


def unknown_base(name: str) -> UsageError:
    """Return the error of a model that is asked beside its base, which nothing tells."""
    return UsageError(
        f"{name} is not from a run, so its base is unknown",
        hint="prompt each model separately, with --checkpoint",
    )
