"""Perplexity of plain text: every token of a document but its first is predicted once, beside the base model.

A document that is longer than the model's positions is read in windows of that many tokens, each half a window behind the one
before. A token is predicted in the first window that holds it, so it has all that stands before it, or at least half a window.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import torch

from sftcli.data.batches.batch import collate
from sftcli.data.example import Example
from sftcli.data.reading.record import Origin, RawRecord
from sftcli.data.reading.records import read_records
from sftcli.data.reading.source import parse_source
from sftcli.errors import DataError, Location, MismatchError, StoppedError
from sftcli.events import Progressed, Session
from sftcli.modeling.config_values import POSITIONS, config_value
from sftcli.modeling.tokenizer.files import read_tokenizer_files
from sftcli.services.evaluate.evaluate import base_to_compare, model_of
from sftcli.services.evaluate.request import EvalRequest
from sftcli.services.models.choose import ModelChoice, load_for_inference
from sftcli.training.loss import response_nll_sum

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NO_POSITIONS = 4096  # tokens of a window where a model says nothing of positions


@dataclass(frozen=True, slots=True, kw_only=True)
class TextScore:
    """How well a model predicts the texts. ``loss`` is in nats per predicted token; ``tokens`` are these, in its own tokenizer."""

    model: str
    tokens: int
    loss: float
    perplexity: float
    bits_per_byte: float
    window_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TextReport:
    """Scores of the tuned model and of the base, over the same documents of so many UTF-8 bytes."""

    documents: int
    text_bytes: int
    tuned: TextScore
    base: TextScore | None

    def numbers(self) -> dict[str, float]:
        """Return the numbers of the tuned model."""
        return {name: value for name, value in asdict(self.tuned).items() if not isinstance(value, str)}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Document:
    text: str
    origin: Origin


def run_texts(request: EvalRequest, session: Session) -> TextReport:
    """Score the model of ``request``, and its base, on ``request.texts``.

    Raises:
        DataError: A row has no text, or there is none to predict.
        MismatchError: A model has no embedding for a token of its tokenizer.
        StoppedError: A stop was asked for.
    """
    choice = model_of(request, session.emit)
    base = base_to_compare(choice, request, session.emit)
    documents = [_document(record) for name in request.texts for record in _records(name)]
    if not documents:
        raise DataError(f"there is no text in {', '.join(request.texts)}")
    models = [choice] if base is None else [base, choice]
    scores = [
        _score(one, documents, request.precision, f"{place} of {len(models)}: scoring ({one.name})", session)
        for place, one in enumerate(models, start=1)
    ]
    return TextReport(
        documents=len(documents),
        text_bytes=sum(len(document.text.encode()) for document in documents),
        tuned=scores[-1],
        base=None if base is None else scores[0],
    )


def windows(length: int, size: int) -> Iterator[tuple[int, int, int]]:
    """Yield begin and end of each window over a document of ``length`` tokens, and the first token that is predicted in it."""
    end, first = min(size, length), 1
    while first < length:
        yield max(0, end - size), end, first
        first, end = end, min(end + max(1, size // 2), length)


def _records(name: str) -> Iterator[RawRecord]:
    return read_records(parse_source(name), seed=0)


def _document(record: RawRecord) -> _Document:
    text = record.fields.get("text")
    if not isinstance(text, str):
        raise DataError(
            f'{record.origin}: there is no "text"',
            hint='--text takes plain text files, and rows such as {"text": "..."}',
            location=Location(file=record.origin.path, line=record.origin.line),
        )
    return _Document(text=text, origin=record.origin)


def _score(
    choice: ModelChoice, documents: Sequence[_Document], precision: str, task: str, session: Session
) -> TextScore:
    model = load_for_inference(choice, precision=precision, emit=session.emit)
    tokens = _token_ids(choice.tokenizer_folder, documents)
    _require_embeddings(model, tokens, choice.name)
    size = next((int(value) for name in POSITIONS if (value := config_value(model, name))), NO_POSITIONS)
    total = sum(max(0, len(ids) - 1) for ids in tokens)
    if not total:
        raise DataError("the texts have no token behind the first, so there is nothing to predict")
    nll, done = [], 0
    session.emit(Progressed(task=task, done=0, total=total, unit="tokens"))
    for document, ids in zip(documents, tokens, strict=True):
        for begin, end, first in windows(len(ids), size):
            if session.stop.requested():
                raise StoppedError
            nll.append(_nll(model, ids[begin:end], first - begin, document.origin))
            done += end - first
            session.emit(Progressed(task=task, done=done, total=total, unit="tokens"))
    loss = math.fsum(nll) / total
    return TextScore(
        model=choice.name,
        tokens=total,
        loss=loss,
        perplexity=math.exp(min(loss, 700.0)),
        bits_per_byte=math.fsum(nll) / math.log(2) / sum(len(one.text.encode()) for one in documents),
        window_tokens=size,
    )


def _token_ids(folder: Path, documents: Sequence[_Document]) -> list[np.ndarray]:
    """Return the tokens of each document: those that the tokenizer adds by itself, and names of control tokens as text."""
    tokenizer = read_tokenizer_files(folder).tokenizer
    tokenizer.encode_special_tokens = True
    encoded = tokenizer.encode_batch_fast([document.text for document in documents], add_special_tokens=True)
    return [np.array(one.ids, dtype=np.int32) for one in encoded]


def _require_embeddings(model: "PreTrainedModel", tokens: Sequence[np.ndarray], name: str) -> None:
    rows = cast("torch.nn.Embedding", model.get_input_embeddings()).num_embeddings
    highest = max(int(ids.max()) for ids in tokens if len(ids))
    if highest >= rows:
        raise MismatchError(
            f"the texts have token {highest:,}, and the embeddings of {name} have {rows:,} rows",
            hint="use the model's own tokenizer",
        )


def _nll(model: "PreTrainedModel", ids: np.ndarray, first: int, origin: Origin) -> float:
    """Return the sum of nats over the tokens of a window from ``first`` on."""
    example = Example(input_ids=ids, loss_mask=np.arange(len(ids)) >= first, origin=origin, kind="text")
    batch = collate([example], example_ids=[0], pad_id=0).to(model.device)
    with torch.inference_mode():
        return float(response_nll_sum(model, batch))
