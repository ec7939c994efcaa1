"""Answer one prompt with the newest run's model or any other, once or several times, alone or with its base."""

from collections.abc import Iterable, Iterator, Sequence

from sftcli.data.conversations.messages import Message
from sftcli.events import EventSink, Session, StopFlag
from sftcli.modeling.decoding.decode import require_positions
from sftcli.services.generate.answerer import Answerer, Completion, Question, open_answerer, tell_room
from sftcli.services.generate.remote import ServerAnswerer
from sftcli.services.generate.request import GenerateRequest, require_prompt, unknown_base
from sftcli.services.models.choose import ModelChoice, base_of, choose_model
from sftcli.services.server.dialects import Server, open_server


def run_generation(request: GenerateRequest, emit: EventSink, stop: StopFlag) -> list[Completion]:
    """Answer ``request.prompt``: every sample of the base, if it is asked, then every sample of the model.

    The text of a single answer is emitted piece by piece as it becomes known.

    Raises:
        UsageError: The prompt is empty.
        DataError: It is longer than the positions of the model.
        NotFoundError: The checkpoint is not there.
    """
    require_prompt(request)
    completions = []
    for answerer in open_answerers(request, emit, stop):
        messages = messages_of(request.prompt, system=request.system)
        questions = [answerer.question(messages, seed=(sample,)) for sample in range(request.samples)]
        _require_room(questions[:1], answerer, request, emit)
        read_by = emit if request.is_single else None
        answers = dict(answerer.answer(questions, request.sampling, stop, emit=read_by))
        completions += [answers[sample] for sample in range(request.samples)]
    return completions


def run_prompts(
    request: GenerateRequest, prompts: Sequence[Sequence[Message]], session: Session
) -> list[Completion]:
    """Answer several prompts with the model of ``request``; the text of a single one is emitted as it becomes known.

    Raises:
        DataError: One is longer than the positions of the model.
        NotFoundError: The checkpoint is not there.
    """
    if not prompts:
        return []
    (answerer,) = open_answerers(request, session.emit, session.stop)
    questions = [answerer.question(messages) for messages in prompts]
    _require_room(questions, answerer, request, session.emit)
    read_by = session.emit if len(questions) == 1 else None
    answers = dict(answerer.answer(questions, request.sampling, session.stop, emit=read_by))
    return [answers[number] for number in range(len(questions))]


def _require_room(
    questions: Sequence[Question],
    answerer: Answerer | ServerAnswerer,
    request: GenerateRequest,
    emit: EventSink,
) -> None:
    """See that the model has room for each question, and tell where it has less for an answer than was asked for."""
    lengths = [len(question.ids) for question in questions]
    require_positions(lengths, answerer.positions)
    answerer.require_memory(max(questions, key=lambda question: len(question.ids)), row="the prompt")
    tell_room(lengths, answerer, request.sampling.max_new_tokens, emit)


def messages_of(prompt: str, *, system: str) -> list[Message]:
    """Return the messages of a one-turn prompt."""
    opening = [Message(role="system", content=system)] if system else []
    return [*opening, Message(role="user", content=prompt)]


def open_answerers(
    request: GenerateRequest, emit: EventSink, stop: StopFlag
) -> Iterator[Answerer | ServerAnswerer]:
    """Load each model of a request when it is its turn: the base first, if it is asked. ``stop`` ends waiting for a server."""
    yield from open_choices(model_choices(request, emit, stop), request, emit)


def open_choices(
    choices: Iterable[ModelChoice | Server], request: GenerateRequest, emit: EventSink
) -> Iterator[Answerer | ServerAnswerer]:
    """Load each of ``choices``, the models of a request, when it is its turn."""
    for choice in choices:
        yield (
            ServerAnswerer(choice)
            if isinstance(choice, Server)
            else open_answerer(
                choice, precision=request.precision, tokenizer_folder=request.tokenizer_folder, emit=emit
            )
        )


def model_choices(
    request: GenerateRequest, emit: EventSink, stop: StopFlag
) -> Sequence[ModelChoice | Server]:
    """Return the models of a request, the tuned one last; or the server that is asked.

    Raises:
        UsageError: The base is asked too, and no run made this model.
        SftError: As ``open_server``.
    """
    if request.server is not None:
        return [open_server(request.server, emit, stop)]
    choice = choose_model(
        request.checkpoint,
        tokenizer=request.tokenizer if request.is_pt else None,
        root=request.root,
        emit=emit,
        trusts_code=request.trusts_code,
        base_model=request.base_model,
    )
    if not request.with_base:
        return [choice]
    base = base_of(choice, emit, trusts_code=request.trusts_code, named=request.base_model)
    if base is None:
        raise unknown_base(choice.name)
    return [base, choice]
