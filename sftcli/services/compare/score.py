"""Scores a trained run on the held-out rows, row by row, as ``sft eval`` computes."""

from collections import Counter
from collections.abc import Iterator

from sftcli.data.batches.batch import batches_in_order_of_length
from sftcli.data.batches.progress import with_progress
from sftcli.data.prepared.store import ExampleTable
from sftcli.errors import StoppedError
from sftcli.events import Session, unheard
from sftcli.services.compare.record import RowScores
from sftcli.services.evaluate.request import KEPT_PRECISION
from sftcli.services.evaluate.scoring import SCORING_TOKENS, response_bytes
from sftcli.services.models.choose import choose_model, load_for_inference
from sftcli.services.prepare.prepare import prepare_rows
from sftcli.services.runs.folder import RunFolder, read_settings
from sftcli.training.row_scores import score_rows


def score_run(run: RunFolder, session: Session, *, seconds: float) -> RowScores:
    """Score the final model of ``run`` on its held-out rows; ``seconds`` is what its training took.

    Raises:
        StoppedError: A stop was asked for.
    """
    settings = read_settings(run)
    choice = choose_model(
        str(run.path.absolute()),
        root=run.path.parent,
        emit=unheard,
        trusts_code=settings.model.trust_remote_code,
    )
    prepared = prepare_rows(
        settings,
        model_folder=choice.tokenizer_folder,
        session=Session(unheard, session.stop),
        fallback=run.path / "cache",
    )
    heldout, tokenizer = prepared.dataset.heldout, prepared.tokenizer
    model = load_for_inference(choice, precision=KEPT_PRECISION, emit=unheard)
    batches = batches_in_order_of_length(
        heldout, rows=range(len(heldout)), max_batch_tokens=SCORING_TOKENS, pad_id=tokenizer.pad_id
    )
    batches = with_progress(batches, session.emit, task=f"scoring {run.name}", total=len(heldout))
    found = score_rows(model, (batch.to(model.device) for batch in batches), stop=session.stop)
    if found is None:
        raise StoppedError
    rows = [found[index] for index in range(len(heldout))]
    return RowScores(
        ids=tuple(_ids(heldout)),
        nll=tuple(row.nll for row in rows),
        tokens=tuple(row.tokens for row in rows),
        num_bytes=tuple(response_bytes(heldout[index], tokenizer) for index in range(len(heldout))),
        train_rows=len(prepared.dataset.train),
        seconds=seconds,
    )


def _ids(table: ExampleTable) -> Iterator[str]:
    """Yield the place of each example, numbered where several come from one place."""
    seen = Counter[tuple[str, int]]()
    for origin in table.origins():
        seen[origin] += 1
        path, line = origin
        yield f"{path}:{line}" if seen[origin] == 1 else f"{path}:{line}#{seen[origin]}"
