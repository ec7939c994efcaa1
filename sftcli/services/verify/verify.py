"""Ask a running server and the model itself the same held-out conversations, and say what differs."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from sftcli.errors import StoppedError
from sftcli.events import Progressed, Session
from sftcli.figures import counted
from sftcli.modeling.config_values import positions_of
from sftcli.modeling.decoding.decoder import choose_decoder
from sftcli.services.evaluate.scoring import ScoringJob, answer_questions, most_answer_tokens
from sftcli.services.evaluate.trial.pool import question_turns
from sftcli.services.evaluate.trial.prompts import Asked
from sftcli.services.evaluate.trial.trial import find_questions, rows_with_messages, without_tools
from sftcli.services.models.choose import choose_model, load_for_inference
from sftcli.services.processes.peers import Peers
from sftcli.services.runs.folder import read_settings
from sftcli.services.server.dialects import Server, ServerAnswer, ServerPrompt, open_server
from sftcli.services.server.several import ask_several
from sftcli.services.verify.answers import OFF, WORDS_OTHER, AnswerComparer, Compared, tie_of
from sftcli.services.verify.prompts import LENGTH_OTHER, SYSTEM_ADDED, Difference, PromptComparer
from sftcli.services.verify.request import VerifyRequest

_OFF_TEXT = (
    "log-probabilities are {off:.2f} nats a token off on average over {tokens} tokens: weights that are rounded too "
    "coarsely, or those of another model"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """Something that differs: in how many of the conversations asked, and in the first of them how."""

    about: str  # prompts, answers or numbers
    what: str
    rows: int
    asked: int
    detail: str = ""
    origin: str = ""

    def __str__(self) -> str:
        """Return it as a sentence."""
        if self.about == "numbers":
            return self.what
        return f"{self.rows} of {self.asked} {self.about} differ: {self.what}"


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyReport:
    """What was compared. ``prompts`` is how: by ids, by text, by their number (counts), or not at all (none)."""

    model: str
    server: str
    asked: int
    prompts: str
    findings: tuple[Finding, ...]
    ties: int  # answers that part where rounding decides between two tokens; no difference
    compared_tokens: int  # whose log-probabilities were compared
    mean_logprob_difference: float | None  # absolute, nats a token

    @property
    def is_same(self) -> bool:
        """Whether nothing differs."""
        return not self.findings

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain values."""
        return asdict(self)


def run_verification(request: VerifyRequest, session: Session) -> VerifyReport:
    """Ask both, and compare prompts by their ids or text where the server tells them, answers, and log-probabilities.

    Raises:
        DataError: No held-out row can be asked.
        SftError: As ``open_server``.
        StoppedError: A stop was asked for.
    """
    server = open_server(
        request.server, session.emit, session.stop
    )  # a wrong URL is told before minutes of work
    choice = choose_model(
        request.checkpoint, root=request.root, emit=session.emit, base_model=request.base_model
    )
    assert choice.run is not None
    settings = read_settings(choice.run)
    prepared = rows_with_messages(settings, choice, session)
    positions = positions_of(choice.weights_folder)
    found = find_questions(prepared, settings, request.rows, positions, session.emit)
    asked = without_tools(found, session.emit)
    job = ScoringJob(
        heldout=prepared.dataset.heldout,
        questions=[one.question for one in asked],
        tokenizer=prepared.tokenizer,
        sampling=settings.sampling,
        training=None,
        batch_rows=None,
        peers=Peers(),
    )
    model = load_for_inference(choice, precision=request.precision, emit=session.emit)
    own = answer_questions(
        job, choose_decoder(model), f"answering ({choice.name})", session.emit, session.stop
    )
    replies = _ask_server(server, asked, job, session)
    comparer, system = PromptComparer(prepared.tokenizer), server.system()
    prompts = [
        _compare_prompt(comparer, server, system, one, reply, answer)
        for one, (reply, answer) in zip(asked, replies, strict=True)
    ]
    answers = AnswerComparer(model, prepared.tokenizer)
    compared = [
        answers.compare(one.question.prompt_ids, row, answer)
        for one, row, (_, answer) in zip(asked, own.rows, replies, strict=True)
    ]
    return _report(choice.run.name, server, asked, [reply for reply, _ in replies], prompts, compared)


_Reply = tuple[ServerPrompt | None, ServerAnswer]


def _ask_server(server: Server, asked: Sequence[Asked], job: ScoringJob, session: Session) -> list[_Reply]:
    greedy = job.sampling.model_copy(
        update={
            "temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "stop": (),
            "max_new_tokens": most_answer_tokens(job.questions),
        }
    )  # fmt: skip
    server.require(greedy)

    def ask(number: int) -> _Reply:
        turns = question_turns(asked[number].row)
        return server.prompt(turns), server.answer(turns, greedy, seed=0)

    found: dict[int, _Reply] = {}
    for number, reply in ask_several(ask, len(asked), session.stop, tell=server.events.tell):
        found[number] = reply
        session.emit(Progressed(task=f"asking {server.name}", done=len(found), total=len(asked)))
    if len(found) < len(asked):
        raise StoppedError
    return [found[number] for number in range(len(asked))]


def _compare_prompt(
    comparer: PromptComparer,
    server: Server,
    system: str,
    one: Asked,
    reply: ServerPrompt | None,
    answer: ServerAnswer,
) -> Difference | None:
    turns, ours = question_turns(one.row), one.question.prompt_ids
    if reply is not None:
        return comparer.compare(turns, ours, reply)
    if system and turns[0].role != "system" and system != comparer.own_system(turns, ours):
        return Difference(what=SYSTEM_ADDED, detail=repr(system))
    if server.counts_prompts and answer.prompt_tokens is not None and answer.prompt_tokens != len(ours):
        more = answer.prompt_tokens - len(ours)
        detail = f"{counted(abs(more), 'token')} {'more' if more > 0 else 'fewer'} than ours"
        return Difference(what=LENGTH_OTHER, detail=detail)
    return None


def _report(
    name: str,
    server: Server,
    asked: Sequence[Asked],
    replies: Sequence[ServerPrompt | None],
    prompts: Sequence[Difference | None],
    compared: Sequence[Compared],
) -> VerifyReport:
    origins = [one.question.origin for one in asked]
    findings = _grouped(
        "prompts", origins, [("", "") if one is None else (one.what, one.detail) for one in prompts]
    )
    off = [
        abs(value)
        for one, prompt in zip(compared, prompts, strict=True)
        if prompt is None
        for value in one.off
    ]
    tie = tie_of(off)
    # An answer in other words to another prompt says nothing more: the prompt is the cause.
    is_caused = [
        one.what == WORDS_OTHER and (prompt is not None or one.gap <= tie)
        for one, prompt in zip(compared, prompts, strict=True)
    ]
    findings += _grouped(
        "answers",
        origins,
        [
            ("", "") if caused else (one.what, one.detail)
            for one, caused in zip(compared, is_caused, strict=True)
        ],
    )
    mean = fmean(off) if off else None
    if mean is not None and mean > OFF:
        findings.append(
            Finding(
                about="numbers",
                what=_OFF_TEXT.format(off=mean, tokens=len(off)),
                rows=len(asked),
                asked=len(asked),
            )
        )
    return VerifyReport(
        model=name,
        server=server.name,
        asked=len(asked),
        prompts=_how(replies[0], server),
        findings=tuple(findings),
        ties=sum(prompt is None and one.gap <= tie for one, prompt in zip(compared, prompts, strict=True)),
        compared_tokens=len(off),
        mean_logprob_difference=mean,
    )


def _how(reply: ServerPrompt | None, server: Server) -> str:
    """Return how prompts are compared, in a word; ``reply`` is what the server tells of one."""
    if reply is not None:
        return "text" if reply.ids is None else "ids"
    return "counts" if server.counts_prompts else "none"


def _grouped(about: str, origins: Sequence[str], found: Iterable[tuple[str, str]]) -> list[Finding]:
    """Return a finding for each thing that differs, the most frequent first."""
    groups: dict[str, list[tuple[str, str]]] = {}
    for origin, (what, detail) in zip(origins, found, strict=True):
        if what:
            groups.setdefault(what, []).append((origin, detail))
    ordered = sorted(groups.items(), key=lambda group: -len(group[1]))
    return [
        Finding(
            about=about, what=what, rows=len(rows), asked=len(origins), origin=rows[0][0], detail=rows[0][1]
        )
        for what, rows in ordered
    ]
