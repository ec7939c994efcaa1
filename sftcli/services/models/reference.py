"""What a word names as a model: a run, a folder, or a model name. Needs no torch, so a slip is told at once."""

from dataclasses import dataclass
from pathlib import Path

from sftcli.errors import DataError, NotFoundError, UsageError
from sftcli.modeling.adapter.folder import is_adapter_folder
from sftcli.modeling.locate.locate import check_name
from sftcli.paths import as_path
from sftcli.services.runs.folder import RunFolder, list_runs, owner_of, read_settings
from sftcli.services.runs.outcome import model_of, newest_finished
from sftcli.services.server.address import ServerAddress, names_server, parse_server
from sftcli.suggest import did_you_mean


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelReference:
    """A model that was named. ``folder`` is None where ``locate_model`` has to find it; ``run`` made the model.

    ``server`` has it where it runs elsewhere, and there is no folder then. ``fault`` is why the run that ``folder`` lies in cannot be read: the model is used without what that says of it.
    """

    name: str
    folder: Path | None
    run: RunFolder | None
    fault: str = ""
    server: ServerAddress | None = None

    @property
    def is_adapter(self) -> bool:
        """Whether it is the folder of an adapter."""
        return self.folder is not None and is_adapter_folder(self.folder)


def find_model(
    reference: str | None,
    *,
    root: Path,
    tokenizer: str | None = None,
    trusts_code: bool = False,
    base_model: str | None = None,
    takes_servers: bool = False,
) -> ModelReference:
    """Return what ``reference`` names: by default the newest finished run's final model. Nothing is fetched or converted.

    The arguments are those of ``choose_model``; ``takes_servers`` tells that a server will do, which nobody asks here.

    Raises:
        NotFoundError: Nothing is there.
        UsageError: Code is trusted of a model that no run has made, or a base is named of a model that is no adapter; or a server
            is named where weights are needed.
        DataError, ConsentError: What is there is no model that can be opened.
    """
    found = _find(reference, root)
    if trusts_code and found.fault:
        raise DataError(
            f"{found.fault}: which code {found.name} was trained with is not known",
            hint="leave --trust-remote-code out",
        )
    if trusts_code and found.run is None:
        raise UsageError(
            f"--trust-remote-code applies to models trained with it, and {found.name} is not one",
            hint="leave --trust-remote-code out",
        )
    if base_model is not None:
        if not found.is_adapter:
            raise UsageError(
                f"--base-model names the base model of an adapter, and {found.name} is not an adapter",
                hint="leave --base-model out",
            )
        check_name(base_model)
    if found.server is not None:
        if not takes_servers:
            raise _is_server(found.server)
    elif found.folder is None:
        check_model_name(found.name, root=root, tokenizer=tokenizer)
    return found


def check_model_name(
    name: str, *, root: Path, revision: str | None = None, tokenizer: str | None = None
) -> None:
    """Raise what ``check_name`` raises; of a name that is near to that of a run under ``root``, tell that.

    Raises:
        NotFoundError, UsageError, ConsentError, DataError: As ``check_name``.
        UsageError: It names a server.
    """
    if names_server(name):
        raise _is_server(parse_server(name))
    try:
        check_name(name, revision=revision, tokenizer=tokenizer)
    except NotFoundError as error:
        near = did_you_mean(name, [run.name for run in list_runs(root)])
        raise NotFoundError(error.message, hint=near or error.hint) from error


def _is_server(server: ServerAddress) -> UsageError:
    return UsageError(
        f"{server} is a server, which gives answers and no weights",
        hint="sft generate and sft try ask servers; name a run, a model or a folder here",
    )


def _find(reference: str | None, root: Path) -> ModelReference:
    if reference is None:
        run = newest_finished(root)
        return ModelReference(name=run.name, folder=run.final, run=run)
    for path in (root / reference, as_path(reference)):
        if (path / "run.json").is_file():
            run = RunFolder(path)
            return ModelReference(name=run.name, folder=model_of(run), run=run)
        if (path / "config.json").is_file() or is_adapter_folder(path):
            owner, fault = _readable_owner(path)
            return ModelReference(name=reference, folder=path, run=owner, fault=fault)
    if names_server(reference):
        server = parse_server(reference)
        return ModelReference(name=str(server), folder=None, run=None, server=server)
    return ModelReference(name=reference, folder=None, run=None)


def _readable_owner(folder: Path) -> tuple[RunFolder | None, str]:
    """Return the run that a model's ``folder`` lies in, or why that cannot be read."""
    run = owner_of(folder)
    if run is None:
        return None, ""
    try:
        run.record()
        run.rows()
        read_settings(run)
    except NotFoundError:  # whoever needs that file says so
        return run, ""
    except (DataError, UsageError) as error:
        return None, error.message
    return run, ""
