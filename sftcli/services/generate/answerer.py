"""Ask a loaded model: messages in, completions out, with the template and stop tokens that it was trained with."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sftcli.config.schema.run import SamplingSettings
from sftcli.data.conversations.messages import Message
from sftcli.data.rendering.render import encode_prompt
from sftcli.errors import SftError
from sftcli.events import EventSink, StopFlag, Warned
from sftcli.modeling.config_values import config_value
from sftcli.modeling.decoding.decode import Answer, decode
from sftcli.modeling.decoding.row_kinds import cache_note
from sftcli.modeling.tokenizer.chat_tokenizer import HFChatTokenizer, load_chat_tokenizer
from sftcli.runtime import monotonic
from sftcli.services.generate.answer_text import AnswerText
from sftcli.services.models.choose import ModelChoice, load_for_inference
from sftcli.services.prepare.pipeline import end_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel

OnText = Callable[[int, str], None]  # (question, a piece of its answer)


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """An answer. ``finish`` is "stop" at a stop token or text, "length" where the budget ran out, "stopped" by the user."""

    text: str
    model: str
    prompt_tokens: int
    new_tokens: int
    finish: str
    seconds: float


OnCompletion = Callable[[int, Completion], None]  # (question, its completion)


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What is asked: the ids of a prompt, and the seed that its sampling adds to the one of the settings."""

    ids: tuple[int, ...]
    seed: tuple[int, ...] = (0,)


class Answerer:
    """A model in memory with its tokenizer."""

    def __init__(self, choice: ModelChoice, model: "PreTrainedModel", tokenizer: HFChatTokenizer) -> None:
        self.choice = choice
        self.model = model
        self.tokenizer = tokenizer

    def question(self, messages: Sequence[Message], *, seed: tuple[int, ...] = (0,)) -> Question:
        """Render ``messages`` as training has them before an answer."""
        return Question(ids=tuple(encode_prompt(self.tokenizer, messages)), seed=seed)

    def answer(
        self,
        questions: Sequence[Question],
        sampling: SamplingSettings,
        stop: StopFlag,
        *,
        on_text: OnText | None = None,
        on_completion: OnCompletion | None = None,
    ) -> list[Completion]:
        """Answer every question, longest prompt first; the result is in the order of ``questions``.

        Answers that ``stop`` cuts are returned with ``finish`` "stopped", but not given to ``on_completion``.
        """
        begin = monotonic()
        order = sorted(range(len(questions)), key=lambda index: -len(questions[index].ids))
        # Text is made while tokens come only where someone reads it: decoding it afterwards costs less.
        texts = [AnswerText(self.tokenizer, sampling.stop) for _ in order] if on_text or sampling.stop else []

        def hear(place: int, token: int) -> None:
            piece = texts[place].push(token)
            if piece and on_text is not None:
                on_text(order[place], piece)

        def finished(place: int, answer: Answer) -> None:
            if on_completion is not None:
                on_completion(order[place], complete(place, answer))

        def complete(place: int, answer: Answer) -> Completion:
            if texts:
                rest = texts[place].close()
                if rest and on_text is not None:
                    on_text(order[place], rest)
                text = texts[place].text
            else:
                text = self.tokenizer.decode(answer.ids, skip_special=False)
            is_cut = not answer.stopped and len(answer.ids) < sampling.max_new_tokens
            return Completion(
                text=text,
                model=str(self.choice.folder),
                prompt_tokens=len(questions[order[place]].ids),
                new_tokens=len(answer.ids),
                finish="stop" if answer.stopped else "stopped" if is_cut else "length",
                seconds=monotonic() - begin,
            )

        answers = decode(
            self.model,
            [questions[index].ids for index in order],
            settings=sampling,
            stop_ids=self.tokenizer.stop_ids,
            stop=stop,
            seeds=[questions[index].seed for index in order],
            on_token=hear if texts else None,
            on_answer=finished,
            is_over=(lambda place, _ids: texts[place].is_over) if sampling.stop else None,
        )
        places = {index: place for place, index in enumerate(order)}
        return [complete(places[index], answers[places[index]]) for index in range(len(questions))]


def open_answerer(
    choice: ModelChoice, *, precision: str, tokenizer_folder: Path | None, emit: EventSink
) -> Answerer:
    """Load a model and its tokenizer, and warn where the two disagree about how an answer ends.

    Raises:
        NotFoundError, UsageError, DataError: There is no tokenizer, template or model, or one is damaged.
    """
    tokenizer = load_chat_tokenizer(tokenizer_folder or choice.tokenizer_folder)
    model = load_for_inference(choice, precision=precision, emit=emit)
    for text in disagreements(choice, model, tokenizer):
        emit(Warned(text=text))
    if told := cache_note(model):
        emit(Warned(text=told))
    return Answerer(choice, model, tokenizer)


def disagreements(choice: ModelChoice, model: "PreTrainedModel", tokenizer: HFChatTokenizer) -> list[str]:
    """Return what does not fit together: template, stop tokens, the model's own, and those of training."""
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
            f"the template puts token {_ids(tail)} behind an answer, which is no stop token "
            f"({_ids(tokenizer.stop_ids)} are); answers may run on"
        )
    trained = _ends_in_training(choice)
    if trained is not None and trained != end_tokens(tokenizer):
        found.append("the template or the stop tokens are not those that the model was trained with")
    return found


def _ids_behind_an_answer(tokenizer: HFChatTokenizer) -> list[int]:
    mark = "qzx"
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": mark}]
    try:
        text = tokenizer.render(messages, tools=None, add_generation_prompt=False)
    except SftError:
        return []  # a template that refuses this says so where it is used
    return tokenizer.encode(text.rpartition(mark)[2].strip())[:1]


def _ends_in_training(choice: ModelChoice) -> object:
    """Return what ``end_tokens`` was in training, or None where that is not known."""
    if choice.run is None or not choice.run.data.is_file():
        return None
    return json.loads(choice.run.data.read_text(encoding="utf-8")).get("ends")


def _ids(ids: "Sequence[int] | set[int] | frozenset[int]") -> str:
    return " or ".join(map(str, sorted(ids)))
