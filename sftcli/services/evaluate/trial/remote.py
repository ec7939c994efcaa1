"""The questions of a trial, asked of a running server."""

from collections.abc import Iterator, Sequence

from sftcli.config.schema.run import SamplingSettings
from sftcli.errors import StoppedError
from sftcli.events import Progressed, Session
from sftcli.modeling.decoding.decode import Row
from sftcli.services.evaluate.scoring import Answered
from sftcli.services.evaluate.trial.prompts import ShownPrompt
from sftcli.services.server.dialects import Server, ServerAnswer
from sftcli.services.server.several import ask_several


def ask_server(
    server: Server, prompts: Sequence[ShownPrompt], sampling: SamplingSettings, task: str, session: Session
) -> Answered:
    """Return the answers of ``server``, the likeliest tokens each.

    Raises:
        SftError: As ``Server.answer``.
        StoppedError: A stop was asked for.
    """

    def ask(number: int) -> ServerAnswer:
        return server.answer(prompts[number].messages, sampling, seed=sampling.seed)

    found: dict[int, ServerAnswer] = {}
    for number, answer in ask_several(ask, len(prompts), session.stop, tell=server.events.tell):
        found[number] = answer
        session.emit(Progressed(task=task, done=len(found), total=len(prompts)))
    if len(found) < len(prompts):
        raise StoppedError
    answers = [found[number] for number in range(len(prompts))]
    texts = tuple(answer.text.strip() for answer in answers)
    return Answered(
        rows=tuple(_rows(answers)),
        texts=texts,
        matches=tuple(
            answer.finish == "stop" and text == prompt.question.expected
            for answer, text, prompt in zip(answers, texts, prompts, strict=True)
        ),
    )


def _rows(answers: Sequence[ServerAnswer]) -> Iterator[Row]:
    """Yield how each answer ended; a server tells no ids."""
    for index, answer in enumerate(answers):
        yield Row(index=index, finish="stop" if answer.finish == "stop" else "length")
