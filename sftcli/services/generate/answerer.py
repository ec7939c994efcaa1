"""Generate with a loaded model: messages in, text and completions out, with the template and stop tokens of its training."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sftcli.config.schema.run import SamplingSettings
from sftcli.data.conversations.messages import Message
from sftcli.data.prepared.about import Ends
from sftcli.data.rendering.encode import encode_prompt
from sftcli.errors import DataError, SftError
from sftcli.events import EventSink, NeverStop, StopFlag, TextDelta, Warned
from sftcli.figures import counted
from sftcli.modeling.config_values import config_value, positions_of_model
from sftcli.modeling.decoding.decode import decode
from sftcli.modeling.decoding.decoder import Decoder, choose_decoder
from sftcli.modeling.pass_memory import require_row_memory
from sftcli.modeling.tokenizer.chat_tokenizer import HFChatTokenizer, load_chat_tokenizer
from sftcli.runtime import monotonic
from sftcli.services.models.choose import ModelChoice, load_for_inference
from sftcli.services.prepare.pipeline import end_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from sftcli.services.generate.remote import ServerAnswerer

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_CONTEXT_TOKENS = 6  # decoders look at few tokens before a token


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """An answer. ``finish`` is "stop" at a stop token or text, "length" where the budget ran out, "stopped" by the user.

    ``logprob`` and ``confidence`` are None where a server does not tell them, and counts of tokens then 0.
    """

    text: str
    model: str
    prompt_tokens: int
    new_tokens: int
    finish: str
    # Sum over the new tokens and the stop token, as the model gives it without temperature and filters.
    logprob: float | None
    confidence: float | None  # geometric mean of their probabilities, 0 to 1
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A prompt: its ids, and the seed that its sampling adds to that of the settings; for a server its ``messages``, and no ids."""

    ids: tuple[int, ...]
    seed: tuple[int, ...] = (0,)
    messages: tuple[Message, ...] = ()


class AnswerText:
    """The text of one answer.

    ``push`` costs the same however long the answer is. Characters whose bytes are not all there, and the beginning of what
    may become a stop text, are held back until it is clear what they are.

    Args:
        tokenizer: Decodes.
        stops: Texts that end the answer; the first of them and all behind it is left out.
    """

    def __init__(self, tokenizer: HFChatTokenizer, stops: Sequence[str] = ()) -> None:
        self.tokenizer = tokenizer
        self.stops = tuple(stops)
        self.text = ""
        self.is_over = False
        self._ids: list[int] = []
        self._context, self._read = (
            0,
            0,
        )  # tokens from `_context` are decoded; those before `_read` are in `text`
        self._given = 0  # characters handed out

    def push(self, token: int) -> str:
        """Add a token; return the text that has become final."""
        self._ids.append(token)
        if self.is_over:
            return ""
        known = self._decode(self._ids[self._context : self._read])
        whole = self._decode(self._ids[self._context :])
        if whole.endswith(_REPLACEMENT) or len(whole) <= len(known):
            return ""
        self.text += whole[len(known) :]
        self._read = len(self._ids)
        self._context = max(self._context, self._read - _CONTEXT_TOKENS)
        self._cut()
        return self._give(len(self.text) - self._held())

    def close(self) -> str:
        """End the answer; return the rest of its text. ``text`` is then complete."""
        if not self.is_over:
            self.text = self._decode(self._ids)
            self._cut()
        return self._give(len(self.text))

    def _decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids, skip_special=False)

    def _cut(self) -> None:
        found = [place for stop in self.stops if (place := self.text.find(stop)) >= 0]
        if found:
            self.text, self.is_over = self.text[: min(found)], True

    def _held(self) -> int:
        """Return how many characters at the end may be the beginning of a stop text."""
        if self.is_over:
            return 0
        return max(
            (
                size
                for stop in self.stops
                for size in range(1, min(len(stop), len(self.text)) + 1)
                if self.text.endswith(stop[:size])
            ),
            default=0,
        )

    def _give(self, end: int) -> str:
        piece = self.text[self._given : end]
        self._given = max(self._given, end)
        return piece


class Answerer:
    """A model in memory with its decoder and tokenizer."""

    def __init__(self, choice: ModelChoice, decoder: Decoder, tokenizer: HFChatTokenizer) -> None:
        self.choice = choice
        self.decoder = decoder
        self.tokenizer = tokenizer

    @property
    def positions(self) -> int:
        """How many tokens a prompt and its answer may have; 0 without a limit."""
        return positions_of_model(self.decoder.model)

    def require_memory(self, question: Question, *, row: str) -> None:
        """Make sure that the machine has the memory to read a prompt, which messages call ``row``.

        Raises:
            ResourceError: It has not.
        """

        def take(tokens: int) -> None:
            one = SamplingSettings(max_new_tokens=1)
            for _ in decode(
                self.decoder, [question.ids[:tokens]], settings=one, stop_ids=frozenset(), stop=NeverStop()
            ):
                pass

        require_row_memory(
            self.decoder.model,
            take,
            len(question.ids),
            row=row,
            doing="reading it",
            hint=lambda most: f"{most:,} tokens fit; or free memory, or choose a smaller model",
        )

    def question(self, messages: Sequence[Message], *, seed: tuple[int, ...] = (0,)) -> Question:
        """Render ``messages`` as training has them before an answer."""
        return Question(ids=tuple(encode_prompt(self.tokenizer, messages)), seed=seed)

    def answer(
        self,
        questions: Sequence[Question],
        sampling: SamplingSettings,
        stop: StopFlag,
        *,
        emit: EventSink | None = None,
    ) -> Iterator[tuple[int, Completion]]:
        """Yield the number of each question with its completion as it ends, longest prompt first.

        Text is handed to ``emit`` as it becomes certain, for one question at a time. Answers that ``stop`` cuts, or that
        were never begun, come last, with ``finish`` "stopped".
        """
        begin = monotonic()
        order = sorted(range(len(questions)), key=lambda index: -len(questions[index].ids))
        # Text is made while tokens come only where someone reads it: decoding it afterwards costs less.
        is_read = emit is not None or bool(sampling.stop)
        texts = [AnswerText(self.tokenizer, sampling.stop) for _ in order] if is_read else []
        for row in decode(
            self.decoder,
            [questions[index].ids for index in order],
            settings=sampling,
            stop_ids=self.tokenizer.stop_ids,
            stop=stop,
            seeds=[questions[index].seed for index in order],
        ):
            if is_read:
                text = texts[row.index]
                piece = "" if row.token is None else text.push(row.token)
                if text.is_over:
                    row.end()
                piece += text.close() if row.finish else ""
                if piece and emit is not None:
                    emit(TextDelta(text=piece))
            if row.finish:
                question = order[row.index]
                yield (
                    question,
                    Completion(
                        text=texts[row.index].text if is_read else self._text(row.ids),
                        model=str(self.choice.folder),
                        prompt_tokens=len(questions[question].ids),
                        new_tokens=len(row.ids),
                        finish=row.finish,
                        logprob=round(row.logprob, 4),  # the digits behind depend on the rows beside it
                        confidence=row.confidence,
                        seconds=monotonic() - begin,
                    ),
                )

    def _text(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids, skip_special=False)


def open_answerer(
    choice: ModelChoice, *, precision: str, tokenizer_folder: Path | None, emit: EventSink
) -> Answerer:
    """Load a model and its tokenizer, and warn where the two disagree about how an answer ends.

    Raises:
        NotFoundError, UsageError, DataError: There is no tokenizer, template or model, or one is damaged.
    """
    tokenizer = load_chat_tokenizer(tokenizer_folder or choice.tokenizer_folder)
    model = load_for_inference(choice, precision=precision, emit=emit)
    decoder = choose_decoder(model)
    for text in disagreements(choice, model, tokenizer):
        emit(Warned(text=text))
    if decoder.note:
        emit(Warned(text=decoder.note))
    return Answerer(choice, decoder, tokenizer)


def disagreements(choice: ModelChoice, model: "PreTrainedModel", tokenizer: HFChatTokenizer) -> list[str]:
    """Return the disagreements between template, stop tokens, the model's own, and those of training."""
    found = []
    known = config_value(model, "eos_token_id")
    ends = set(known if isinstance(known, list) else [] if known is None else [known])
    if ends and not ends & tokenizer.stop_ids:
        found.append(
            f"the model's config ends texts with token {_ids(ends)}, the tokenizer with {_ids(tokenizer.stop_ids)}; "
            "generation stops at the tokenizer's"
        )
    tail = _ids_behind_an_answer(tokenizer)
    if tail and not set(tail) & tokenizer.stop_ids:
        found.append(
            f"the template puts token {_ids(tail)} after an answer, which is not a stop token "
            f"({_ids(tokenizer.stop_ids)} are); answers may run on"
        )
    try:
        trained = _ends_in_training(choice)
    except DataError as error:
        found.append(
            f"{error.message}; so it is not known which template and stop tokens the model was trained with"
        )
    else:
        if trained is not None and trained != end_tokens(tokenizer):
            found.append("the template or the stop tokens differ from those the model was trained with")
    return found


def tell_room(
    lengths: Sequence[int], answerer: "Answerer | ServerAnswerer", wanted: int, emit: EventSink
) -> None:
    """Tell where the positions of the model end answers to prompts of these ``lengths`` before ``wanted`` new tokens."""
    positions = answerer.positions
    room = [positions - length + 1 for length in lengths]  # the last token of an answer is not read
    if positions and (short := [tokens for tokens in room if tokens < wanted]):
        where = "" if len(room) == 1 else f"behind {len(short):,} of {len(room):,} prompts "
        emit(
            Warned(
                text=f"{where}there is room for {counted(min(short), 'new token')}, not {wanted:,}: the longest prompt has "
                f"{counted(max(lengths), 'token')}, and the model was made for {positions:,} positions"
            )
        )


def _ids_behind_an_answer(tokenizer: HFChatTokenizer) -> list[int]:
    mark = "qzx"
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": mark}]
    try:
        text = tokenizer.render(messages, tools=None, add_generation_prompt=False)
    except SftError:
        return []  # a template that refuses this says so where it is used
    return tokenizer.encode(text.rpartition(mark)[2].strip())[:1]


def _ends_in_training(choice: ModelChoice) -> Ends | None:
    """Return what ``end_tokens`` was in training, or None where that is not known."""
    rows = None if choice.run is None else choice.run.rows()
    return None if rows is None else rows.ends


def _ids(ids: "Sequence[int] | set[int] | frozenset[int]") -> str:
    return " or ".join(map(str, sorted(ids)))
