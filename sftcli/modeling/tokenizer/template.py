"""Chat templates: untrusted Jinja programs that turn messages into text.

A template comes from a model's folder or a file, so it runs in Jinja's sandbox, without files, environment or imports,
and with limits on loops, time and output. What a well-behaved template gives is what transformers gives, byte for byte.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from time import monotonic

from sftcli.errors import DataError, SftError, UsageError
from sftcli.foreign import foreign_file
from sftcli.modeling.tokenizer.sandbox import MAX_SECONDS, Budget, TemplateEnvironment, budget

MAX_SOURCE_CHARS = 1_000_000  # the longest ones of models have 30,000
MIN_OUTPUT_CHARS = 1_000_000
OUTPUT_PER_INPUT = 20


class TemplateRefusedError(DataError):
    """The template raised on a conversation: its own message, or the fault inside it."""

    kind = "template-refused"


class ChatTemplate:
    """A compiled template.

    Args:
        source: Jinja text.
        name: For messages: a built-in name, a file name, or the tokenizer's own.

    Raises:
        DataError: The source is not Jinja, or too long.
    """

    def __init__(self, source: str, *, name: str) -> None:
        if len(source) > MAX_SOURCE_CHARS:
            raise DataError(
                f"the chat template {name} has {len(source)} characters; the limit is {MAX_SOURCE_CHARS}",
                hint="choose another with --template",
            )
        self.source = source
        self.name = name
        with foreign_file(
            Path(name),
            "is not valid Jinja",
            name=f"the chat template {name}",
            hint="choose another with --template",
        ):
            try:
                self._template = TemplateEnvironment().from_string(source)
            except MemoryError as error:  # of Python's parser
                raise RecursionError from error
            # Jinja's own mapping is a chain of two, which every rendering would walk through anew.
            self._template.globals = dict(self._template.globals)

    @property
    def prints_date(self) -> bool:
        """Whether the template asks for the date, which is always ``FIXED_DATE`` here."""
        return "strftime_now" in self.source

    def render(
        self,
        messages: Sequence[Mapping[str, object]],
        *,
        tools: Sequence[object] | None,
        add_generation_prompt: bool,
        variables: Mapping[str, object],
    ) -> str:
        """Return the text of ``messages``, followed by the generation prompt if requested.

        Args:
            messages: With ``role`` and ``content``; plain JSON values only.
            tools: Plain JSON values, or None.
            add_generation_prompt: Whether the template should open an answer.
            variables: What else the template can see: special tokens by name.

        Raises:
            TemplateRefusedError: The template raised, or went over a limit.
        """
        values = [value for message in messages for value in message.values() if isinstance(value, str)]
        size = sum(map(len, values))
        limits = Budget(
            output_chars=MIN_OUTPUT_CHARS + OUTPUT_PER_INPUT * size,
            deadline=monotonic() + MAX_SECONDS,
        )
        token = budget.set(limits)
        try:
            text = self._template.render(
                **variables,
                messages=messages,
                tools=tools,
                documents=None,
                add_generation_prompt=add_generation_prompt,
            )
            if not _is_text(text) and _is_text(repr(variables)) and all(map(_is_text, values)):
                raise TemplateRefusedError(
                    "it writes half of a surrogate pair"
                )  # that of a row is told as the row's
        except SftError:
            raise
        except Exception as error:  # a program of others raises what it likes
            message = str(error) or type(error).__name__
            raise TemplateRefusedError(message) from error
        finally:
            budget.reset(token)
        return text


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def read_template(text: str, *, builtins: Mapping[str, str], read: Callable[[str], str]) -> ChatTemplate:
    """Return the built-in template named ``text``, or the one in the file of that name.

    Raises:
        UsageError: It is neither.
    """
    if text in builtins:
        return ChatTemplate(builtins[text], name=text)
    try:
        source = read(text)
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"no chat template {text!r}: neither built in nor a readable file",
            hint=f"built in are {', '.join(sorted(builtins))}; a file holds Jinja text",
        ) from error
    return ChatTemplate(source, name=text)
