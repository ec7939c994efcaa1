"""28 conversations under chat templates: each trained span against its answer, each text against that of transformers.

    python -m tests.models.tmatrix --templates tests/support/templates --out DIR

A template is a file NAME.jinja; ``tokens.toml`` has the tokens that go with names. For others than our own:
``pip download trl --no-deps && unzip trl-*.whl 'trl/chat_templates/*'``, and ``--templates trl/chat_templates``. 2 to 6 seconds each.

Prints how many ordinary and how many of all rows are trained as they should be, how many texts are those of transformers, the exit
code of `sft prepare` with the ordinary ones, and what is wrong. Exits with 1 if something else than an answer is trained anywhere:
a row that is rejected is none.
"""

import argparse
import json
import os
import re
import shutil
import sys
import time
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer
from transformers import AutoTokenizer, LlamaForCausalLM

from sftcli.config.schema.data import TrainOn
from sftcli.data.conversations.convert import to_conversations
from sftcli.data.conversations.detect import detect_schema
from sftcli.data.conversations.meaning import UnreadError
from sftcli.data.conversations.messages import PlainText, Rejected
from sftcli.data.example import Example
from sftcli.data.reading.record import Origin, RawRecord
from sftcli.data.rendering.render import Renderer
from sftcli.modeling.tokenizer.chat_tokenizer import load_chat_tokenizer
from tests.models.child import call, prepare_children, run_sft
from tests.models.rows import Row, read_rows
from tests.support.smollm2 import lay_tokenizer
from tests.support.tiny_model import tiny_config
from tests.support.tiny_tokenizer import TEMPLATES

MAX_TOKENS = 4096
_DATE = re.compile(r"\d{1,2} \w{3,9} 20\d\d|20\d\d-\d\d-\d\d|\w+ \d{1,2}, 20\d\d")
OPENED = "<think>"  # what a template may write already when it asks for an answer
_ROOM = 128  # tokens that a template may add to the vocabulary


@dataclass
class Tried:
    """What became of a row: why there is no example, or what differs in what is trained."""

    name: str
    kind: str
    rejected: str = ""
    faults: list[str] = field(default_factory=list)
    spaced: list[str] = field(
        default_factory=list
    )  # answers with something around them, or other white space
    is_as_theirs: bool = False

    @property
    def is_good(self) -> bool:
        """Whether the answers are trained."""
        return not self.rejected and not self.faults


def main() -> int:
    """Try each template in a child of its own."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--templates", action="append", type=Path, help="folder; may be given several times")
    parser.add_argument("--out", type=Path, required=True, help="folder of models and results")
    args = parser.parse_args()
    out = args.out.absolute()
    results = out / "results"
    results.mkdir(parents=True, exist_ok=True)
    base, ordinary = _base(out / "base"), _write_ordinary(out / "ordinary.jsonl")
    prepare_children(out)
    has_faults = False
    for template in [
        path for folder in args.templates or [TEMPLATES] for path in sorted(folder.glob("*.jinja"))
    ]:
        if (tokens := tokens_of(template.stem)) is None:
            print(f"{template.stem}: no tokens are known", flush=True)
            continue
        begin, folder = time.monotonic(), out / "models" / template.stem
        make_folder(folder, base, template, tokens)
        tried = [Tried(**row) for row in call(_try_rows, str(folder))]
        done = run_sft(
            "prepare", str(ordinary), "--model", str(folder), "--json", folder=folder, name="prepare"
        )
        kept = [asdict(row) for row in tried]
        (results / f"{template.stem}.json").write_text(json.dumps(kept, indent=1), encoding="utf-8")
        has_faults |= any(row.faults for row in tried)
        print(
            f"{template.stem}: {_told(tried)}, prepare {done.code}, {time.monotonic() - begin:.0f} s",
            flush=True,
        )
    return int(has_faults)


def tokens_of(name: str) -> dict[str, Any] | None:
    """Return the tokens of the model whose name ``name`` begins with."""
    tables = tomllib.loads(Path(__file__).with_name("tokens.toml").read_text(encoding="utf-8"))["tokens"]
    known = {_letters(model): table for table in tables for model in table["models"]}
    fitting = [model for model in known if _letters(name).startswith(model)]
    return known[max(fitting, key=len)] if fitting else None


def _letters(name: str) -> str:
    return "".join(letter for letter in name if letter.isalnum())


def _base(folder: Path) -> Path:
    """Return the folder of a small model, with the tokenizer of the default model."""
    lay_tokenizer(folder)
    config = tiny_config()
    size = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size()
    config.update({"vocab_size": size + _ROOM, "max_position_embeddings": MAX_TOKENS})
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def _write_ordinary(path: Path) -> Path:
    lines = [json.dumps(row.fields, ensure_ascii=False) for row in read_rows() if row.kind == "ordinary"]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def make_folder(folder: Path, base: Path, template: Path, tokens: dict[str, Any]) -> None:
    """Write the ``base`` model with ``template`` and ``tokens`` of its own."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    os.link(base / "model.safetensors", folder / "model.safetensors")
    shutil.copyfile(template, folder / "chat_template.jinja")
    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in tokens["special"]])
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in tokens.get("markup", ())])
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {f"{name}_token": tokens[name] for name in ("bos", "eos", "pad") if name in tokens}
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": MAX_TOKENS}
    ids = {f"{name}_id": tokenizer.token_to_id(text) for name, text in named.items()}
    stop = [tokenizer.token_to_id(text) for text in tokens.get("stop", [tokens["eos"]])]
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    unset = {"bos_token_id": None, "pad_token_id": None}
    for name, content in {
        "tokenizer_config": about | named | {"clean_up_tokenization_spaces": False},
        "config": config | unset | ids,
        "generation_config": {"eos_token_id": stop},
    }.items():
        (folder / f"{name}.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def _try_rows(folder: str) -> list[dict[str, Any]]:
    rows = read_rows()
    records = [
        RawRecord(fields=row.fields, origin=Origin(path="rows", line=index + 1))
        for index, row in enumerate(rows)
    ]
    schema = detect_schema(records)
    tokenizer = load_chat_tokenizer(Path(folder))
    renderer = Renderer(tokenizer, max_tokens=MAX_TOKENS)
    theirs = AutoTokenizer.from_pretrained(folder)
    tried = []
    for row, record in zip(rows, records, strict=True):
        found = Tried(row.name, row.kind)
        example = _example(renderer, record, schema)
        if isinstance(example, str):
            found.rejected = example
        else:
            spans = list(_spans(example, tokenizer.stop_ids))
            _compare(found, row, spans, theirs, tokenizer.stop_ids)
            found.is_as_theirs = _is_as_theirs(row, example, theirs)
        tried.append(asdict(found))
    return tried


def _example(renderer: Renderer, record: RawRecord, schema: Any) -> Example | str:
    try:
        (conversation,) = to_conversations(record, schema, train_on=TrainOn.ALL)
    except UnreadError as error:
        return f"unread: {error}"
    assert not isinstance(conversation, PlainText)
    made = conversation if isinstance(conversation, Rejected) else renderer.render_example(conversation)
    return f"{made.reason}: {made.detail}" if isinstance(made, Rejected) else made


def _spans(example: Example, stop_ids: frozenset[int]) -> Iterator[list[int]]:
    """Yield runs of trained tokens, each up to a stop token: neighbors may have become one."""
    span: list[int] = []
    for token, is_trained in zip(example.input_ids.tolist(), example.loss_mask.tolist(), strict=True):
        if is_trained:
            span.append(token)
        if span and (not is_trained or token in stop_ids):
            yield span
            span = []
    if span:
        yield span


def _compare(
    found: Tried, row: Row, spans: Sequence[list[int]], tokenizer: Any, stop_ids: frozenset[int]
) -> None:
    """Note what of ``spans`` is no answer of ``row``, and what of an answer is not in them."""
    if len(spans) != len(row.answers):
        found.faults.append(f"{len(spans)} spans for {len(row.answers)} answers")
        return
    for span, answer in zip(spans, row.answers, strict=True):
        if span[-1] not in stop_ids:
            found.faults.append("no stop token")
            continue
        text = tokenizer.decode(span[:-1])
        wanted = answer["content"]
        if calls := answer.get("tool_calls"):
            parts = [wanted, *(part for one in calls for part in _parts(one["function"]))]
            found.faults += [f"{part!r} is not in {text!r}" for part in parts if part not in text]
        elif _bare(text) == _bare(wanted) or text.strip().endswith(wanted.strip()):
            found.spaced += [text] * (text != wanted)
        elif _bare(text).endswith(_bare(wanted)) or _bare(text) == _bare(wanted).removeprefix(OPENED):
            found.spaced.append(text)
        else:
            found.faults.append(f"{text!r} for {wanted!r}")
    trained = "\n".join(map(tokenizer.decode, spans))
    others = [message for message in row.fields["messages"] if message["role"] != "assistant"]
    said = [message["content"].strip() for message in others]
    found.faults += [f"{text!r} is trained" for text in said if len(text) > 6 and text in trained]


def _parts(function: dict[str, Any]) -> tuple[str, str]:
    return function["name"], function["arguments"]["city"]


def _bare(text: str) -> str:
    return "".join(text.split())


def _is_as_theirs(row: Row, example: Example, tokenizer: Any) -> bool:
    """Return whether transformers writes the same text, apart from dates and a stop token at its end."""
    fields = json.loads(json.dumps(row.fields))
    try:
        theirs = tokenizer.apply_chat_template(fields["messages"], tools=fields.get("tools"), tokenize=False)
    except Exception:  # noqa: BLE001 - templates raise what they like
        return False
    ours, theirs = (_DATE.sub("DATE", text) for text in (tokenizer.decode(example.input_ids), theirs))
    return ours.startswith(theirs) or theirs.rstrip() == ours.rstrip()


def _told(tried: Sequence[Tried]) -> str:
    ordinary = [row for row in tried if row.kind == "ordinary"]
    counts = ", ".join(
        f"{name} {sum(row.is_good for row in rows)}/{len(rows)}"
        for name, rows in (("ordinary", ordinary), ("all", tried))
    )
    same = f"as transformers {sum(row.is_as_theirs for row in tried if not row.rejected)}"
    faults = [f"{row.name}: {fault}" for row in tried for fault in row.faults]
    rejected = [row.rejected for row in ordinary if row.rejected]
    return f"{counts}, {same}" + "".join(f"; {text[:120]}" for text in (*faults[:2], *rejected[:1]))


if __name__ == "__main__":
    sys.exit(main())
