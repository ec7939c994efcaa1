"""What the shell offers after Tab, and how it is told to ask. Offers read names from disk and from the schema; they never raise."""

from collections.abc import Callable, Iterator, Sequence
from functools import wraps
from pathlib import Path
from textwrap import shorten

import typer

from sftcli.errors import UsageError

HELP_COLUMNS = 70
ROOT = Path("runs")  # where runs are unless a flag says otherwise


def _quiet(
    offer: Callable[[str], Iterator[str | tuple[str, str]]],
) -> Callable[[str], list[str | tuple[str, str]]]:
    """Offer nothing where a fault would print a traceback into the line that is being typed."""

    @wraps(offer)
    def offered(incomplete: str) -> list[str | tuple[str, str]]:
        try:
            return list(offer(incomplete))
        except Exception:  # noqa: BLE001 - there is nobody to tell
            return []

    return offered


@_quiet
def presets(incomplete: str) -> Iterator[str | tuple[str, str]]:
    """Offer presets with what they are for."""
    from sftcli.config.presets import preset_names, read_preset

    for name in preset_names():
        if name.startswith(incomplete):
            yield name, _short(read_preset(name).description)


@_quiet
def settings(incomplete: str) -> Iterator[str | tuple[str, str]]:
    """Offer ``KEY=`` of every setting, and the values of a setting that is a choice."""
    from sftcli.config.fields import choices, leaf_fields
    from sftcli.config.schema.settings import Settings

    fields = leaf_fields(Settings)
    key, has_value, value = incomplete.partition("=")
    if has_value and key in fields:
        words = choices(fields[key]) or (("true", "false") if fields[key].annotation is bool else ())
        yield from (f"{key}={word}" for word in words if word.startswith(value))
        return
    for name, field in fields.items():
        if name.startswith(incomplete):
            yield f"{name}=", _short(field.description or "")


@_quiet
def runs(incomplete: str) -> Iterator[str | tuple[str, str]]:
    """Offer runs, newest first."""
    from sftcli.services.runs.folder import list_runs

    for run in list_runs(ROOT):
        if run.name.startswith(incomplete):
            yield run.name


@_quiet
def models(incomplete: str) -> Iterator[str | tuple[str, str]]:
    """Offer runs, the checkpoints of a run once it is named, then folders and model files."""
    from sftcli.services.runs.folder import list_runs
    from sftcli.training.checkpoint.names import list_checkpoints

    for run in list_runs(ROOT):
        if run.name.startswith(incomplete):
            yield run.name
        for path in list_checkpoints(run.checkpoints):
            if incomplete.startswith(str(run.path)) and str(path).startswith(incomplete):
                yield str(path)
    yield from _paths(incomplete, lambda path: path.suffix in {".gguf", ".pt"})


@_quiet
def rows(incomplete: str) -> Iterator[str | tuple[str, str]]:
    """Offer folders and files that can hold rows."""
    from sftcli.data.reading.source import row_format

    yield from _paths(incomplete, lambda path: row_format(path) is not None)


@_quiet
def config_files(incomplete: str) -> Iterator[str | tuple[str, str]]:
    """Offer folders and files of settings."""
    yield from _paths(incomplete, lambda path: path.suffix in {".toml", ".yaml", ".yml", ".json"})


def _short(text: str) -> str:
    """Return the beginning of ``text`` that fits beside a name: Typer breaks longer help into lines, which zsh takes as they are."""
    return shorten(text, HELP_COLUMNS, placeholder="...")


def _paths(incomplete: str, is_wanted: Callable[[Path], bool]) -> Iterator[str]:
    folder, slash, begin = incomplete.rpartition("/")
    for path in sorted(Path(folder + slash or ".").iterdir()):
        if not path.name.startswith(begin) or (path.name.startswith(".") and not begin):
            continue
        shown = f"{folder}{slash}{path.name}"
        if path.is_dir():
            yield f"{shown}/"
        elif is_wanted(path):
            yield shown


def _leave_no_space_behind_equals() -> None:
    """Let the script for bash put no space behind ``KEY=``: the value follows. Elsewhere ``--set KEY= VALUE`` is read as well."""
    from typer import _completion_shared

    scripts = _completion_shared._completion_scripts
    ending = "    return 0\n"
    scripts["bash"] = scripts["bash"].replace(
        ending, f"    [[ ${{COMPREPLY-}} == *= ]] && compopt -o nospace\n{ending}"
    )


def set_up_for_shell(arguments: Sequence[str]) -> None:
    """Print or install the completions of the shell that is named, else of the one that runs the program.

    Raises:
        UsageError: There is no shell above the program, or none that is known.
    """
    from typer import _completion_shared as shared

    option, *names = arguments
    known = [shell.value for shell in shared.Shells]
    shell = " ".join(names) or shared._get_shell_name()
    if shell not in known:
        found = f"no completions for {shell}" if shell else "no shell runs this program"
        raise UsageError(f"{found}; name one of {', '.join(known)}: sft {option} bash")
    _leave_no_space_behind_equals()
    if option == "--show-completion":
        typer.echo(shared.get_completion_script(prog_name="sft", complete_var="_SFT_COMPLETE", shell=shell))
    else:
        _, path = shared.install(shell, prog_name="sft", complete_var="_SFT_COMPLETE")
        typer.echo(
            f"Completions of {shell} are in {path}. They work in each shell that you open from now on."
        )
