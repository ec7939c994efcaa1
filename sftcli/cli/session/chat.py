"""The interactive session of ``sft generate --chat``: lines in, answers out."""

import sys
from typing import TYPE_CHECKING

import typer

from sftcli.cli.options import shared as options
from sftcli.cli.results.answers import with_text
from sftcli.cli.session.session import session
from sftcli.cli.session.signals import CommandStopped, SignalStop
from sftcli.cli.terminal import tables
from sftcli.cli.terminal.text import as_utf8
from sftcli.errors import DataError, SftError
from sftcli.paths import as_path

if TYPE_CHECKING:
    from collections.abc import Callable

    from sftcli.services.generate.chat import Chat
    from sftcli.services.generate.request import GenerateRequest

DEFAULT_SAVE = "chat.jsonl"
HELP = (
    "/reset forgets the conversation, /system TEXT sets the system message, /save FILE appends it to a file of rows "
    f"({DEFAULT_SAVE}), /quit ends"
)


def chat(request: "GenerateRequest", output: options.Output) -> None:
    """Talk with a model until /quit or the end of input. Ctrl-C cuts an answer short; at an empty prompt it ends the session."""
    with session(output) as current:
        with current.loading():
            from sftcli.services.generate.chat import Chat
            from sftcli.services.generate.prompt import open_answerers

        (answerer,) = open_answerers(request, current.emit, current.stop)
    talk = Chat(answerer=answerer, sampling=request.sampling, system=request.system)
    if not output.quiet:
        tables.show_text(HELP, tables.err(output.color), wrap=True)
    while (line := _read_line()) is not None:
        text = line.strip()
        if text in {"/quit", "/exit"}:
            return
        if text.startswith("/"):
            _command(text, talk, output)
        elif text:
            _turn(text, talk, output)


def _read_line() -> str | None:
    """Return the next line, or None at the end of input."""
    if sys.stdin is None:  # closed by the caller
        return None
    if not sys.stdin.isatty():
        return _as_text(sys.stdin.readline()) or None
    try:
        import readline  # gives input() its line editing
    except ImportError:  # Windows edits lines by itself
        return _typed(lambda: "", lambda _: None)
    return _typed(
        readline.get_line_buffer, lambda text: readline.set_startup_hook(lambda: readline.insert_text(text))
    )


def _typed(typed: "Callable[[], str]", type_first: "Callable[[str], None]") -> str | None:
    """Return a line that was typed. Ctrl-C lets a half-typed one stay, once, and ends the session otherwise."""
    kept = ""
    while True:
        type_first(kept)
        try:
            return _as_text(input("you> "))
        except EOFError:
            sys.stderr.write("\n")  # the next prompt of the shell would stand behind ours
            return None
        except KeyboardInterrupt as error:
            text = typed()
            if not text or text == kept:
                sys.stderr.write("\n")
                raise CommandStopped("the chat is over", 130) from error
            sys.stderr.write("\nthe line stays; Ctrl-C again leaves the chat\n")
            kept = text
        finally:
            type_first("")


def _as_text(line: str) -> str:
    try:
        return as_utf8(line)
    except UnicodeError:
        raise DataError("a line on standard input is not UTF-8", hint="send lines as UTF-8") from None


def _command(text: str, talk: "Chat", output: options.Output) -> None:
    """Do what a line that starts with a slash says."""
    name, _, rest = text.partition(" ")
    err = tables.err(output.color)
    match name:
        case "/reset":
            talk.reset()
            tables.show_text("the conversation is forgotten", err)
        case "/system":
            if not rest.strip():
                tables.show_text("/system needs a text; /reset forgets the conversation", err)
                return
            talk.system = rest.strip()
            talk.reset()
            tables.show_text("system message set; the conversation starts again", err)
        case "/save":
            if not talk.turns:
                tables.show_text("there is nothing to save yet", err)
                return
            try:
                path = as_path(rest.strip() or DEFAULT_SAVE)
                talk.save(path)
                tables.show_text(f"saved to {path}", err)
            except SftError as error:
                tables.show_text(f"{error.message}; {error.hint}", err)
        case _:
            tables.show_text(f"no command {name}: {HELP}", err, wrap=True)


def _turn(text: str, talk: "Chat", output: options.Output) -> None:
    """Ask and show the answer as it comes."""
    with session(output) as current:
        try:
            completion = talk.ask(text, with_text(current.emit), current.stop)
        except SftError as error:
            tables.show_text(f"{error.message} {error.hint}", tables.err(output.color))
            return
    tables.show_text("", tables.out(output.color))
    if completion.finish != "stop" and not output.quiet:
        tables.show_text(f"(cut after {completion.new_tokens} tokens)", tables.err(output.color))
    _end_if_told(current.stop)


def _end_if_told(stop: SignalStop) -> None:
    """End the session for every signal but Ctrl-C, which only cuts an answer."""
    if stop.requested() and stop.exit_code != 130:
        raise typer.Exit(stop.exit_code)
