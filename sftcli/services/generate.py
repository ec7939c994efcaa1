"""Answer a prompt with the template and stop tokens that the model was trained with."""

from dataclasses import dataclass
from pathlib import Path

from sftcli.config.schema import SamplingSettings
from sftcli.data.conversation import Message
from sftcli.data.render import encode_prompt
from sftcli.errors import UsageError
from sftcli.events import EventSink, StopFlag, TextDelta
from sftcli.modeling.sampling import decode
from sftcli.modeling.tokenizer import HFChatTokenizer, load_chat_tokenizer
from sftcli.runtime import monotonic
from sftcli.services.models import choose_model, load_for_inference


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateRequest:
    """One prompt. ``checkpoint`` as in ``choose_model``; ``system`` empty leaves the template's own."""

    prompt: str
    sampling: SamplingSettings
    root: Path
    precision: str
    checkpoint: str | None = None
    tokenizer: str | None = None  # of a .pt file
    system: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """An answer. ``finish`` is "stop" at a stop token, "length" where the token budget ran out."""

    text: str
    model: str
    prompt_tokens: int
    new_tokens: int
    finish: str
    seconds: float


def run_generation(request: GenerateRequest, emit: EventSink, stop: StopFlag) -> Completion:
    """Answer ``request.prompt``; the text is emitted piece by piece as it becomes known.

    Raises:
        UsageError: The prompt is empty.
        NotFoundError: The checkpoint is not there.
    """
    if not request.prompt.strip():
        raise UsageError(
            "the prompt is empty", hint='pass one: sft generate "your prompt", or - to read standard input'
        )
    choice = choose_model(request.checkpoint, tokenizer=request.tokenizer, root=request.root, emit=emit)
    tokenizer = load_chat_tokenizer(choice.folder)
    prompt_ids = encode_prompt(tokenizer, _messages(request))
    model = load_for_inference(choice, precision=request.precision, emit=emit)
    begin = monotonic()
    stream = TextStream(tokenizer, emit)
    (answer,) = decode(
        model,
        [prompt_ids],
        settings=request.sampling,
        stop_ids=tokenizer.stop_ids,
        pad_id=tokenizer.pad_id,
        stop=stop,
        on_token=lambda _row, token: stream.push(token),
    )
    stream.close()
    return Completion(
        text=tokenizer.decode(answer.ids, skip_special=False),
        model=str(choice.folder),
        prompt_tokens=len(prompt_ids),
        new_tokens=len(answer.ids),
        finish="stop" if answer.stopped else "length",
        seconds=monotonic() - begin,
    )


def _messages(request: GenerateRequest) -> list[Message]:
    system = [Message(role="system", content=request.system)] if request.system else []
    return [*system, Message(role="user", content=request.prompt)]


class TextStream:
    """Turns tokens into text as they come, and holds back a character until all of its bytes are there."""

    def __init__(self, tokenizer: HFChatTokenizer, emit: EventSink) -> None:
        self.tokenizer = tokenizer
        self.emit = emit
        self.ids: list[int] = []
        self.shown = 0  # characters emitted

    def push(self, token: int) -> None:
        """Add a token; emit what is certain."""
        self.ids.append(token)
        text = self.tokenizer.decode(self.ids, skip_special=False)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            self._emit_from(text)

    def close(self) -> None:
        """Emit what was held back."""
        self._emit_from(self.tokenizer.decode(self.ids, skip_special=False))

    def _emit_from(self, text: str) -> None:
        if len(text) > self.shown:
            self.emit(TextDelta(text=text[self.shown :]))
            self.shown = len(text)
