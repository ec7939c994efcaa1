"""What a command leaves on the screen when it is done: results on stdout, remarks and next commands on stderr."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from sftcli.cli.options import shared as options
from sftcli.cli.results.confidence import confidence_table, confidence_text
from sftcli.cli.terminal import tables
from sftcli.cli.terminal.text import loss_text
from sftcli.figures import count, counted, duration, percent, share_of, short_count, size, whole_duration

if TYPE_CHECKING:
    from rich.console import Console

    from sftcli.config.resolve import Row
    from sftcli.services.diagnosis.verdict import Verdict
    from sftcli.services.doctor import Finding
    from sftcli.services.evaluate.against import Against
    from sftcli.services.evaluate.evaluate import EvalReport
    from sftcli.services.evaluate.tasks import TasksReport
    from sftcli.services.evaluate.texts import TextReport
    from sftcli.services.report.score import Score
    from sftcli.services.runs.folder import RunFolder
    from sftcli.services.train.plan import Plan
    from sftcli.services.train.resume import VerifyOutcome
    from sftcli.services.train.run import Spent, TrainOutcome
    from sftcli.services.train.ways import Way

SHOWN_MISSES = 3
MOST_PROMPT = 200  # characters of the end of a prompt that are shown with its answer


def show_settings(rows: Iterable["Row"], output: options.Output) -> None:
    """Print settings with their origins."""
    listed = [(row.key, row.value, row.origin) for row in rows]
    if output.json:
        tables.show_result_json(
            {"settings": {key: {"value": value, "from": where} for key, value, where in listed}}
        )
    else:
        tables.out(output.color).print(tables.settings_table(listed))


def show_pairs(pairs: Mapping[str, str], output: options.Output) -> None:
    """Print names and values."""
    if output.json:
        tables.show_result_json(pairs)
    else:
        tables.out(output.color).print(tables.key_value_table(list(pairs.items())))


def show_findings(found: Sequence["Finding"], output: options.Output) -> None:
    """Print what was tried and how it came out, and what fails by name."""
    failing = [finding.name for finding in found if finding.state == "fails"]
    if output.json:
        findings = {finding.name: {"state": finding.state, "text": finding.text} for finding in found}
        tables.show_result_json({"findings": findings, "failing": failing})
        return
    pairs = [(finding.name, f"{finding.state}: {finding.text}") for finding in found]
    tables.out(output.color).print(tables.key_value_table(pairs))
    if failing:
        tables.show_text(f"fails: {', '.join(failing)}", tables.err(output.color))


def show_training(outcome: "TrainOutcome", output: options.Output) -> None:
    """Print how a run ended: the path of the final model on stdout, losses and next commands on stderr."""
    from sftcli.services.runs.folder import RunFolder

    if not output.quiet:
        err, run = tables.err(output.color), RunFolder(Path(outcome.path))
        for text in _measured_texts(outcome):
            tables.show_text(text, err, wrap=True)
        spent = "" if outcome.spent is None else f"; {_spent_text(outcome.spent)}"
        tables.show_text(f"{duration(outcome.seconds)} in all, from loading to saving{spent}", err)
        if outcome.verdict is not None and (outcome.verdict.kind != "unknown" or outcome.heldout_rows):
            tables.show_text(_verdict_text(outcome.verdict), err, wrap=True)
        if reason := outcome.ending.reason:
            tables.show_text(f"ended early, at step {outcome.step} of {outcome.last_step}: {reason}", err)
        if outcome.final is None:
            tables.show_text(f"stopped at step {outcome.step} of {outcome.last_step}", err)
            if outcome.step:
                tables.show_text(f"resume with: sft resume {run.argument}", err)
        else:
            from sftcli.services.runs.summary import can_be_scored

            score = f", or sft eval {run.argument}" if can_be_scored(run) else ""
            if run.report.is_file():
                tables.show_text(f"report: {run.report}", err)
            tables.show_text(f"next: {generate_command(run)}{score}", err)
    if outcome.final is not None:
        tables.show_text(outcome.final, tables.out(output.color))


def _measured_texts(outcome: "TrainOutcome") -> Iterator[str]:
    """Yield what held-out rows say, and those of earlier runs."""
    if outcome.first_heldout_loss is not None and outcome.last_heldout_loss is not None:
        yield _heldout_text(outcome)
    if outcome.first_score is not None and outcome.last_score is not None:
        before, after = percent(outcome.first_score), percent(outcome.last_score)
        yield f"held-out answers, {outcome.measure}: {before} right before, {after} after"
    for kept in outcome.earlier:
        yield kept.in_words()


def _spent_text(spent: "Spent") -> str:
    """Say what a training took of its time, and what that cost."""
    parts = []
    if spent.of_seconds is not None:
        share = percent(spent.seconds / spent.of_seconds)
        parts.append(f"{share} of {whole_duration(spent.of_seconds)} used")
    if spent.price is not None:
        parts.append(f"price {price_text(spent.price)}")
    return ", ".join(parts)


def price_text(price: float) -> str:
    """Return a price with two decimals, a small one with two digits that count."""
    return f"{price:.2f}" if price >= 0.1 or not price else f"{price:.2g}"


def _heldout_text(outcome: "TrainOutcome") -> str:
    from sftcli.services.runs.summary import not_since

    assert outcome.first_heldout_loss is not None
    assert outcome.last_heldout_loss is not None
    before, last = (
        loss_text(loss, outcome.heldout_rows)
        for loss in (outcome.first_heldout_loss, outcome.last_heldout_loss)
    )
    if outcome.final is not None or outcome.last_heldout_step == outcome.step:
        return f"held-out loss {before} before, {last} after"
    return f"held-out loss {not_since(before, last, outcome.last_heldout_step)}"


def generate_command(run: "RunFolder") -> str:
    """Return the shortest command that asks the final model of ``run``: a bare one takes the newest finished run."""
    from sftcli.errors import NotFoundError
    from sftcli.services.runs.folder import DEFAULT_ROOT, newest_run

    with suppress(NotFoundError):
        if newest_run(DEFAULT_ROOT, finished=True).path.absolute() == run.path.absolute():
            return 'sft generate "your prompt"'
    return f'sft generate "your prompt" --checkpoint {run.argument}'


def show_plan(plan: "Plan", output: options.Output) -> None:
    """Print what a training would need."""
    if output.json:
        tables.show_result_json(asdict(plan))
        return
    tables.out(output.color).print(tables.key_value_table(list(_plan_rows(plan))))
    tables.out(output.color).print()
    tables.out(output.color).print(ways_table(plan.ways))
    if 0 < plan.total_memory_bytes < plan.peak_bytes and not output.quiet:
        limit = "training.micro_batch_tokens" if plan.micro_batch_tokens else "training.micro_batch_size"
        tables.show_text(
            f"this does not fit in memory: lower {limit} (the updates stay the same), set "
            "training.gradient_checkpointing=true, or choose a way that fits",
            tables.err(output.color),
            wrap=True,
        )
    elif not output.quiet:
        tables.show_text(
            "the way that is set is measured, the others are predicted from it",
            tables.err(output.color),
            wrap=True,
        )


def ways_table(ways: "Sequence[Way]") -> tables.Grid:
    """Return the ways of a plan, what each needs and whether it fits, without checkpointing and with it."""
    columns = sorted({way.checkpointing for way in ways})
    names = dict.fromkeys(way.name for way in ways)
    found = {(way.name, way.checkpointing): way for way in ways}
    return tables.Grid(
        header=("way", *("checkpointed" if on else "memory" for on in columns)),
        rows=[[tables.Cell(text=name), *(_need(found[name, on]) for on in columns)] for name in names],
    )


def _need(way: "Way") -> tables.Cell:
    words = {True: " fits", False: " no", None: ""}[way.fits]
    text = f"{size(way.peak_bytes)}{words}" + (", as set" if way.is_measured else "")
    return tables.Cell(text=text, style="" if way.fits is not False else "dim")


def _plan_rows(plan: "Plan") -> Iterator[tuple[str, object]]:
    trained = "" if plan.trainable == plan.parameters else f", {short_count(plan.trainable)} trained"
    rows, tokens = plan.longest_micro_batch
    yield "model", f"{plan.model}: {short_count(plan.parameters)} parameters{trained}"
    yield "machine", f"{plan.device}, {plan.precision}"
    replayed = f" ({count(plan.replayed_examples)} replayed)" if plan.replayed_examples else ""
    yield "rows", f"{count(plan.train_examples)} to train{replayed}, {count(plan.heldout_examples)} held out"
    most = f"{count(plan.micro_batch_tokens)} tokens" if plan.micro_batch_tokens else plan.micro_batch_size
    yield "steps", f"{count(plan.steps)} of {plan.batch_size} rows, at most {most} at once"
    laid_out = "packed into" if plan.micro_batch_tokens else "padded to"
    scanned = f"of {count(plan.scanned_steps)} steps"
    yield "longest pass", f"{rows} rows {laid_out} {count(tokens)} tokens, {scanned}"
    yield "weights", size(plan.weights_bytes)
    yield "gradients", size(plan.gradients_bytes)
    yield "optimizer", size(plan.optimizer_bytes)
    yield "activations", size(plan.activations_bytes)
    yield "head, loss", size(plan.head_bytes)
    if plan.program_bytes:
        yield "program", size(plan.program_bytes)
    if plan.other_bytes:
        yield "other", size(plan.other_bytes)
    if plan.checkpoint_copy_bytes:
        yield "copy to save", size(plan.checkpoint_copy_bytes)
    yield "peak", f"{size(plan.peak_bytes)} of {size(plan.total_memory_bytes)}"
    yield "checkpoint", f"{size(plan.checkpoint_bytes)} on disk, each"
    yield "a step", duration(plan.step_seconds)
    if plan.evaluations:
        yield "evaluations", f"{plan.evaluations}, {duration(plan.evaluation_seconds)} each"
    yield "start, saving", f"{duration(plan.start_seconds)}, {duration(plan.save_seconds)} each"
    if plan.budget is None:
        yield "in all", f"about {whole_duration(plan.seconds)}"
    else:
        given, key = whole_duration(plan.budget.seconds), plan.budget.decided_by
        yield "in all", f"about {whole_duration(plan.seconds)} of {given}; {key} ends it"
    if plan.price is not None:
        yield "price", price_text(plan.price)


def show_verified(outcome: "VerifyOutcome", output: options.Output) -> None:
    """Print what a replay has proved."""
    if output.json:
        tables.show_result_json(asdict(outcome))
    else:
        text = (
            f"{outcome.run}: steps {outcome.first + 1} to {outcome.second} replayed; "
            f"all {count(outcome.tensors)} tensors are equal bit for bit"
        )
        tables.show_text(text, tables.out(output.color))


def show_scores(report: "EvalReport", output: options.Output) -> None:
    """Print the scores of base and tuned side by side, and a few rows that the tuned model got wrong."""
    from sftcli.services.report.measures import differences_of

    base, tuned = report.base, report.tuned
    out, err = tables.out(output.color), tables.err(output.color)
    names = (base.model if base else "base", tuned.model)
    out.print(tables.measures_table(report.compared(), names=names))
    if report.confidence.choices:
        out.print(confidence_table(report.confidence))
    if output.quiet:
        return
    tables.show_text(
        f"{counted(report.rows, 'held-out row' if report.is_heldout else 'named row')}, {count(tuned.response_tokens)} response "
        "tokens; "
        f"{_matches(tuned)} answered exactly right" + (f", {_matches(base)} by {base.model}" if base else ""),
        err,
        wrap=True,
    )
    tables.show_text(_trained_text(report), err, wrap=True)
    for score in (tuned, base):
        if score is not None and score.cut:
            tables.show_text(_cut_text(score), err, wrap=True)
    for text in differences_of(*report.differences):
        tables.show_text(text, err, wrap=True)
    tables.show_text(confidence_text(report), err, wrap=True)
    if report.verdict is not None:
        tables.show_text(_verdict_text(report.verdict), err, wrap=True)
    _show_misses(report, err)
    if report.page is not None:
        tables.show_text(f"report: {report.page}", err)


def _show_misses(report: "EvalReport", err: "Console") -> None:
    """Print a few wrong answers under their prompts, without what all prompts share."""
    from sftcli.services.report.samples import split_prompts

    shown = report.misses[:SHOWN_MISSES]
    if shown:
        tables.show_text(
            f"wrong answers, {len(shown)} of {count(report.tuned.answered - report.tuned.matched)}:", err
        )
    others = [sample.prompt for sample in report.samples]
    prompts = split_prompts([*(miss.prompt for miss in shown), *others]).own
    for miss, prompt in zip(shown, prompts, strict=False):
        cut = " (cut)" if miss.cut else ""
        asked = " ".join(prompt.split())
        asked = asked if len(asked) <= MOST_PROMPT else f"... {asked[-MOST_PROMPT:]}"
        lines = (
            miss.origin,
            f"prompt   {asked}",
            f"expected {miss.expected}",
            f"answered {miss.answer}{cut}",
        )
        tables.show_text("\n  ".join(lines), err)


def _trained_text(report: "EvalReport") -> str:
    if report.trained_on is None:
        return "how many of these rows were trained on is unknown"
    is_doubtful = report.trained_on.same_prompt and not report.is_heldout
    return f"{'warning: ' if is_doubtful else ''}{report.trained_on}"


def _cut_text(score: "Score") -> str:
    """Say of how many answers the end is missing, for all that is measured of them is measured up to there."""
    return (
        f"cut at {count(score.most_answer_tokens)} tokens, a few more than the longest expected answer: "
        f"{share_of(score.cut, score.answered)} answers of {score.model}"
    )


def _verdict_text(verdict: "Verdict") -> str:
    advice = f": {verdict.advice}" if verdict.advice else ""
    return f"verdict: {verdict.kind} ({verdict.reason}){advice}"


def show_against(against: "Against", output: options.Output) -> None:
    """Print what became of the answers of an earlier evaluation, and the first rows that became wrong."""
    err = tables.err(output.color)
    for moved in against.answers:
        tables.show_text(f"against {against.path}: {moved}", err, wrap=True)
        for origin in moved.became_wrong[:SHOWN_MISSES]:
            tables.show_text(f"  became wrong: {origin}", err)


def show_tasks(report: "TasksReport", output: options.Output) -> None:
    """Print the numbers of tasks, base and tuned side by side; standard errors stand in the JSON alone."""
    rows = [
        tables.Pair(
            metric=f"{task}/{metric}",
            first=report.base_tasks.get(task, {}).get(metric),
            second=value,
            lower_is_better="perplexity" in metric,
            rows=report.task_rows.get(task, 0),
        )
        for task, values in report.tasks.items()
        for metric, value in values.items()
        if "_stderr" not in metric
    ]
    names = (report.base_model or "base", report.model)
    tables.out(output.color).print(tables.comparison_table(rows, names=names))


def show_texts(report: "TextReport", output: options.Output) -> None:
    """Print how well base and tuned predict the texts, side by side."""
    base, tuned = report.base, report.tuned
    pairs = [
        tables.Pair(
            metric=label,
            first=None if base is None else getattr(base, name),
            second=getattr(tuned, name),
            lower_is_better=True,
        )
        for label, name in (
            ("nats per token", "loss"),
            ("perplexity", "perplexity"),
            ("bits per byte", "bits_per_byte"),
        )
    ]
    names = (base.model if base else "base", tuned.model)
    tables.out(output.color).print(tables.comparison_table(pairs, names=names))
    if not output.quiet:
        text = (
            f"{counted(report.documents, 'document')}, {size(report.text_bytes)}, {count(tuned.tokens)} predicted tokens, in "
            f"windows of at most {count(tuned.window_tokens)}"
        )
        tables.show_text(text, tables.err(output.color), wrap=True)


def _matches(score: "Score") -> str:
    return share_of(score.matched, score.answered)
