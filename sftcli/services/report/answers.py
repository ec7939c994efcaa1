"""What held-out prompts were answered in the course of a training, for a page on which one can step through it."""

from collections.abc import Sequence
from dataclasses import dataclass

from sftcli.events import GivenAnswer, HeldoutAnswers, HeldoutDone
from sftcli.services.report.samples import Answer, compare_texts, split_prompts

MOST_STEPS = 20  # evenly spread, the first and the last one among them


@dataclass(frozen=True, slots=True, kw_only=True)
class AnsweredPrompt:
    """A held-out prompt with an answer for each of the steps; None where an evaluation has none to it."""

    row: str
    prompt: str
    expected: str
    answers: tuple[Answer | None, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswersByStep:
    """The same prompts answered after several steps, each step with how many answers were right."""

    steps: tuple[int, ...]
    words: tuple[str, ...]
    shared: str  # what all prompts share
    prompts: tuple[AnsweredPrompt, ...]


def answers_by_step(heldout: Sequence[HeldoutDone]) -> AnswersByStep | None:
    """Return the answers of these evaluations; None where there are none."""
    found = [(event.step, event.given) for event in heldout if event.given and event.given.given]
    if not found:
        return None
    last = len(found) - 1
    chosen = (
        found if last < MOST_STEPS else [found[round(i * last / (MOST_STEPS - 1))] for i in range(MOST_STEPS)]
    )
    rows = chosen[-1][1].given
    prompts = split_prompts([one.prompt for one in rows])
    return AnswersByStep(
        steps=tuple(step for step, _ in chosen),
        words=tuple(given.in_words() for _, given in chosen),
        shared=prompts.shared,
        prompts=tuple(
            AnsweredPrompt(
                row=one.row,
                prompt=prompt,
                expected=one.expected,
                answers=tuple(_answer(step, given, one.row) for step, given in chosen),
            )
            for one, prompt in zip(rows, prompts.own, strict=True)
        ),
    )


def _answer(step: int, given: HeldoutAnswers, row: str) -> Answer | None:
    found: GivenAnswer | None = next((one for one in given.given if one.row == row), None)
    if found is None:
        return None
    return Answer(
        who=f"after step {step:,}",
        is_right=found.score == 1,
        is_cut=found.is_cut,
        pieces=compare_texts(found.expected, found.text) if found.text else (),
    )
