"""Answers of a running server, in the manner of ``Answerer``: the server has the model, its template and its stop tokens."""

import hashlib
from collections.abc import Iterator, Sequence

from sftcli.config.schema.run import SamplingSettings
from sftcli.data.conversations.messages import Message
from sftcli.events import EventSink, StopFlag, TextDelta
from sftcli.runtime import monotonic
from sftcli.services.generate.answerer import Completion, Question
from sftcli.services.server.connection import RefusedError
from sftcli.services.server.dialects import Server, ServerAnswer
from sftcli.services.server.several import ask_several

_SEED_BITS = 31  # that every server takes


class ServerAnswerer:
    """A server as one that answers questions. A prompt that is too long is refused by the server, by its number."""

    positions = 0  # not known here

    def __init__(self, server: Server) -> None:
        self.server = server

    def require_memory(self, question: Question, *, row: str) -> None:
        """See ``Answerer``; the server has its own."""

    def question(self, messages: Sequence[Message], *, seed: tuple[int, ...] = (0,)) -> Question:
        """Return ``messages`` as they are sent."""
        return Question(ids=(), seed=seed, messages=tuple(messages))

    def answer(
        self,
        questions: Sequence[Question],
        sampling: SamplingSettings,
        stop: StopFlag,
        *,
        emit: EventSink | None = None,
    ) -> Iterator[tuple[int, Completion]]:
        """Yield the number of each question with its completion as it comes, in the order of ``questions`` as far as they are asked.

        Those that ``stop`` cuts come last, with ``finish`` "stopped".

        Raises:
            SftError: As ``Server.answer``; a ``RefusedError`` has the number of the question.
        """
        self.server.connection.stop = stop  # that of a turn of a chat is another one each time
        self.server.require(sampling)
        begin = monotonic()

        def ask(number: int) -> ServerAnswer:
            question = questions[number]
            try:
                return self.server.answer(question.messages, sampling, _seed(sampling.seed, question.seed))
            except RefusedError as error:
                error.question = number
                raise

        waiting = set(range(len(questions)))
        for number, answer in ask_several(ask, len(questions), stop, tell=self.server.events.tell):
            waiting.discard(number)
            if emit is not None:
                emit(TextDelta(text=answer.text))
            yield number, self._completion(answer, begin)
        for number in sorted(waiting):
            yield number, self.nothing("stopped")

    def nothing(self, finish: str) -> Completion:
        """Return an answer that there is not; ``finish`` says why."""
        return Completion(
            text="", model=self.server.name, prompt_tokens=0, new_tokens=0, finish=finish, logprob=None,
            confidence=None, seconds=0.0,
        )  # fmt: skip

    def _completion(self, answer: ServerAnswer, begin: float) -> Completion:
        return Completion(
            text=answer.text,
            model=self.server.name,
            prompt_tokens=answer.prompt_tokens or 0,
            new_tokens=len(answer.tokens or ()) if answer.new_tokens is None else answer.new_tokens,
            finish=answer.finish,
            logprob=None if answer.logprob is None else round(answer.logprob, 4),
            confidence=answer.confidence,
            seconds=monotonic() - begin,
        )


def _seed(first: int, more: Sequence[int]) -> int:
    """Return the seed of one request, which no other request of the command has."""
    digest = hashlib.sha256(",".join(map(str, (first, *more))).encode()).digest()
    return int.from_bytes(digest[:4], "big") >> (32 - _SEED_BITS)
