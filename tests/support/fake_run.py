"""Events as a training run emits them, without a run. As a program it shows them through a real session."""

import math
import os
import sys
from collections.abc import Iterator

from sftcli.events import (
    CheckpointSaved,
    DataPrepared,
    Ending,
    Event,
    FitEnded,
    FitStarted,
    GivenAnswer,
    HeldoutAnswers,
    HeldoutDone,
    Judged,
    MemoryEased,
    ModelLoaded,
    ModelSaved,
    Notice,
    Progressed,
    RunStarted,
    StepDone,
    TextDelta,
    Warned,
)

HOSTILE = "\x1b]52;c;aGk=\x07\x1b[31m[/] [bold]red\x9b2J\r\u202e \N{SNOWMAN}"


def step_done(
    step: int, *, loss: float | None = None, seconds: float = 0.5, applied: bool = True
) -> StepDone:
    return StepDone(
        step=step,
        loss=0.5 + 1.5 * math.exp(-step / 20) if loss is None else loss,
        grad_norm=1.9,
        learning_rate=2e-4,
        applied=applied,
        epoch=step * 32 / 1000,
        response_tokens=256,
        tokens=1024,
        padding_tokens=128,
        seconds=seconds,
        peak_memory_bytes=2_100_000_000,
        utilization=0.31,
    )


def answers_at(step: int) -> dict[str, object]:
    """Return what the event of an evaluation has of two held-out prompts that were answered."""
    right = min(2, step // 20)
    given = [
        GivenAnswer(
            row=f"rows.jsonl:{index + 1}",
            prompt=f"Ticket {index}",
            expected="shipping" if index else "billing",
            text=""
            if not step
            else f"refund {HOSTILE}"
            if index >= right
            else "shipping"
            if index
            else "billing",
            score=float(index < right),
        )
        for index in range(2)
    ]
    return HeldoutAnswers(
        measure="label", rows=2, right=right, score=right / 2, given=tuple(given)
    ).as_fields()


def run_events(last_step: int = 60) -> Iterator[Event]:
    """Yield one event of every kind, in the order of a run."""
    yield RunStarted(run="quick-1", path="runs/quick-1")
    yield Notice(text="loading smollm2-135m")
    for done in (0, 500, 1000):
        yield Progressed(task="rendering", done=done, total=1000)
    yield DataPrepared(
        source="rows.jsonl",
        schema="prompt, response",
        rows=1000,
        kept=980,
        rejected={"too long": 12, "empty response": 8},
        train_examples=960,
        heldout_examples=20,
        train_tokens=48_000,
        response_tokens=12_000,
        cached=False,
    )
    yield ModelLoaded(
        name="smollm2-135m",
        parameters=134_515_008,
        trainable=134_515_008,
        device="cpu",
        precision="fp32",
        peak_flops=2.1e11,
    )
    yield HeldoutDone(step=0, loss=2.31, response_tokens=400, seconds=4.0, answers=answers_at(0))
    yield FitStarted(step=0, last_step=last_step)
    for step in range(1, last_step + 1):
        bad = step == 7
        if step == 5:
            yield MemoryEased(
                step=5,
                micro_batch_size=4,
                micro_batch_tokens=0,
                micro_batches=8,
                gradient_checkpointing=False,
                text="step 5 ran out of memory: micro-batches of 4 rows from here on, 8 in this step; the global batch stays",
            )
        yield step_done(step, loss=math.nan if bad else None, applied=not bad)
        if bad:
            yield Warned(text=f"step 7 was skipped: {HOSTILE}")
        if step == 45:
            yield Judged(
                step=45,
                kind="spike",
                reason="loss jumped to 9.1 from about 0.7; rows rows.jsonl:3, rows.jsonl:9",
                advice="check these rows; if it happens again, lower the learning rate",
            )
        if step % 20 == 0:
            yield HeldoutDone(
                step=step,
                loss=0.6 + 1.7 * math.exp(-step / 20),
                response_tokens=400,
                seconds=4.0,
                answers=answers_at(step),
            )
        if step % 50 == 0 or step == last_step:
            yield CheckpointSaved(step=step, path=f"runs/quick-1/checkpoints/step-{step:06d}", seconds=0.5)
    yield FitEnded(step=last_step, ending=Ending.FINISHED)
    yield ModelSaved(path="runs/quick-1/final")


def main(arguments: list[str]) -> int:
    """Show a run through ``session``; with ``wait`` go on until a stop is asked for, with ``text`` write an answer."""
    from sftcli.cli.options.shared import Output
    from sftcli.cli.results.answers import with_text
    from sftcli.cli.session.session import session
    from sftcli.errors import StoppedError

    with session(Output(json="--json" in arguments, quiet="-q" in arguments), every_steps=10) as current:
        emit, stop = current.emit, current.stop
        if "text" in arguments:
            emit = with_text(emit)
            while not stop.requested():
                emit(TextDelta(text=f"an answer {HOSTILE}\n"))
                if "forever" not in arguments:
                    return 0
        if "wait" in arguments:
            emit(FitStarted(step=0, last_step=1000))
            os.write(1, b"ready\n")
            step = 0
            while not stop.requested() or "deaf" in arguments:
                step = min(999, step + 1)
                emit(step_done(step))
            if "prepare" in arguments:
                raise StoppedError
            emit(FitEnded(step=step, ending=Ending.STOPPED))
            return stop.exit_code
        for event in run_events():
            emit(event)
    return 0


if __name__ == "__main__":
    from sftcli.cli.errors.show import guarded

    sys.exit(guarded(lambda: main(sys.argv[1:]), command="sft train", json="--json" in sys.argv))
