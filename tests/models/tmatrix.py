"""28 conversations under chat templates: each trained span against its answer, each text against that of transformers.

    python -m tests.models.tmatrix --out DIR [--templates FOLDER] [--only NAME]

Without ``--templates`` those of ``trl`` are tried (installed, else the wheel is downloaded), and the small ones beside this file, which have
one habit each. A template is a file NAME.jinja; ``tokens.toml`` has the tokens that go with names; NAME_training.jinja is its twin, whose
``{% generation %}`` is another mask of the same conversation. 2 to 6 seconds each.

Prints a line a template: how many ordinary and how many of all rows are trained as they should be; how many of the others are when the
help of their refusal is followed; how many are kept with ``--thinking keep`` and ``drop``, and with ``--train-on each``; how many texts are
those of transformers; the exit code of `sft prepare` with the ordinary ones; how the masks of the twin differ, by kind; and what is refused, by
reason. Exits with 1 if anything else than an answer is trained anywhere, if following a help keeps nothing, or if the mask of a twin
differs in a way that has no explanation. A row that is rejected is no fault by itself.
"""

import argparse
import json
import os
import re
import shutil
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer
from transformers import AutoTokenizer, LlamaForCausalLM

from sftcli.config.schema.data import Thinking, TrainOn
from sftcli.data.conversations.convert import to_conversations
from sftcli.data.conversations.detect import detect_schema
from sftcli.data.conversations.messages import Rejected
from sftcli.data.example import Example
from sftcli.data.reading.record import Origin, RawRecord
from sftcli.data.rendering.render import Renderer
from sftcli.data.rendering.segments import first_difference
from sftcli.modeling.tokenizer.chat_tokenizer import load_chat_tokenizer
from tests.models.child import call, prepare_children, run_sft
from tests.models.rows import Row, read_rows
from tests.models.tokens import HABITS, tokens_of
from tests.models.trl_templates import find_trl_templates, pairs_of
from tests.models.twins import Kind, explain, spans_of, twin_spans
from tests.support.followed import options_in
from tests.support.smollm2 import lay_tokenizer
from tests.support.tiny_model import tiny_config
from tests.support.tiny_tokenizer import TEMPLATES

MAX_TOKENS = 4096
_DATE = re.compile(r"\d{1,2} \w{3,9} 20\d\d|20\d\d-\d\d-\d\d|\w+ \d{1,2}, 20\d\d")
OPENED = "<think>"  # what a template may write already when it asks for an answer
_ROOM = 128  # tokens that a template may add to the vocabulary


@dataclass
class Tried:
    """What became of a row: why there is no example, or what differs in what is trained; ``helped`` is what its help led to."""

    name: str
    kind: str
    rejected: str = ""
    help: str = ""
    helped: bool = False
    faults: list[str] = field(default_factory=list)
    spaced: list[str] = field(
        default_factory=list
    )  # answers with something around them, or other white space
    is_as_theirs: bool = False
    twin: list[str] = field(default_factory=list)  # kinds of difference
    kept_with: list[str] = field(default_factory=list)  # other options that keep it

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
    parser.add_argument("--only", action="append", help="name of a template; may be given several times")
    parser.add_argument("--out", type=Path, required=True, help="folder of models and results")
    args = parser.parse_args()
    out = args.out.absolute()
    results = out / "results"
    results.mkdir(parents=True, exist_ok=True)
    base, ordinary = _base(out / "base"), _write_ordinary(out / "ordinary.jsonl")
    prepare_children(out)
    has_faults = False
    for template, twin in _templates(
        args.templates or [find_trl_templates(out), TEMPLATES, HABITS], args.only
    ):
        if (tokens := tokens_of(template.stem)) is None:
            print(f"{template.stem}: no tokens are known", flush=True)
            has_faults = True
            continue
        folder = out / "models" / template.stem
        make_folder(folder, base, template, tokens)
        tried = [Tried(**row) for row in call(_try_rows, str(folder), str(twin or ""))]
        done = run_sft(
            "prepare", str(ordinary), "--model", str(folder), "--json", folder=folder, name="prepare"
        )
        kept = [asdict(row) for row in tried]
        (results / f"{template.stem}.json").write_text(json.dumps(kept, indent=1), encoding="utf-8")
        has_faults |= any(row.faults for row in tried)
        print(f"{template.stem}: {_told(tried)}, prepare {done.code}{_more_told(tried)}", flush=True)
    return int(has_faults)


def _templates(folders: Sequence[Path], only: Sequence[str] | None) -> Iterator[tuple[Path, Path | None]]:
    for folder in folders:
        for template, twin in pairs_of(folder).items():
            if not only or template.stem in only:
                yield template, twin


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
    swallowing = tokens.get("swallowing", ())
    tokenizer.add_special_tokens(
        [AddedToken(text, normalized=False, rstrip=text in swallowing) for text in tokens["special"]]
    )
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


def _try_rows(folder: str, twin: str) -> list[dict[str, Any]]:
    rows = read_rows()
    theirs = AutoTokenizer.from_pretrained(folder)
    trial = Trial(Path(folder), rows)
    twin_source = Path(twin).read_text(encoding="utf-8") if twin else ""
    return [asdict(_try_row(trial, number, theirs, twin_source)) for number in range(len(rows))]


def _try_row(trial: "Trial", number: int, theirs: Any, twin: str) -> Tried:
    row = trial.rows[number]
    found = Tried(row.name, row.kind)
    made = trial.made(number)
    if isinstance(made, Rejected):
        found.rejected, found.help = f"{made.reason}: {made.detail}", made.remedy
        if options := options_in(made.remedy):
            found.helped = not isinstance(trial.made(number, **options), Rejected)
            found.faults += [] if found.helped else [f"no row is kept with {made.remedy}"]
    else:
        stop_ids = trial.tokenizer.stop_ids
        _compare(found, row, trial.spans(made), theirs, stop_ids)
        found.is_as_theirs = len(made) == 1 and _is_as_theirs(row, made[0], theirs)
        if twin:
            found.twin = sorted(_against_twin(row, made, theirs, twin, stop_ids))
            found.faults += [kind for kind in found.twin if kind.startswith("unexplained")]
    for name, options in OTHERS.items():
        other = trial.made(number, **options)
        if not isinstance(other, Rejected):
            found.kept_with.append(name)
            faults = Tried(row.name, row.kind)
            _compare(
                faults,
                row,
                trial.spans(other),
                theirs,
                trial.tokenizer.stop_ids,
                says_thought="train" in name,
            )
            text = "\n".join(theirs.decode(one.input_ids) for one in other)
            thought = "four." if row.kind in ("think", "field") else ""
            if thought and name == "--thinking drop" and thought in text:
                faults.faults.append(f"{thought!r} is left")
            found.faults += [f"{name}: {fault}" for fault in faults.faults]
    return found


# Ways to train the rows that are tried beside the default one.
OTHERS: dict[str, dict[str, Any]] = {
    "--thinking keep": {"thinking": Thinking.KEEP},
    "--thinking drop": {"thinking": Thinking.DROP},
    "--train-on each": {"train_on": TrainOn.EACH},
}


class Trial:
    """Rows under the template of a model's folder."""

    def __init__(self, folder: Path, rows: Sequence[Row]) -> None:
        self.rows = rows
        self.tokenizer = load_chat_tokenizer(folder)
        self._folder = folder
        self._records = [
            RawRecord(fields=row.fields, origin=Origin(path="rows", line=index + 1))
            for index, row in enumerate(rows)
        ]
        self._schema = detect_schema(self._records)

    def made(
        self,
        number: int,
        *,
        variables: Mapping[str, Any] | None = None,
        train_on: TrainOn = TrainOn.ALL,
        thinking: Thinking = Thinking.TRAIN,
    ) -> list[Example] | Rejected:
        """Return the examples of a row, or why there are none."""
        tokenizer = load_chat_tokenizer(self._folder, variables=variables) if variables else self.tokenizer
        (row,) = to_conversations(
            self._records[number],
            self._schema,
            train_on=TrainOn.ALL if train_on is TrainOn.EACH else train_on,
        )
        renderer = Renderer(tokenizer, max_tokens=MAX_TOKENS, train_on=train_on, thinking=thinking)
        results = renderer.render_batch([row]).results
        rejected = [result for result in results if isinstance(result, Rejected)]
        return rejected[0] if rejected else [result for result in results if isinstance(result, Example)]

    def spans(self, examples: Sequence[Example]) -> list[list[int]]:
        """Return the trained spans of the examples of a row, in order."""
        return [
            span
            for example in examples
            for span in spans_of(
                example.input_ids.tolist(), example.loss_mask.tolist(), self.tokenizer.stop_ids
            )
        ]


def _against_twin(
    row: Row, examples: Sequence[Example], theirs: Any, twin: str, stop_ids: frozenset[int]
) -> set[str]:
    """Return how the trained texts differ from those of the twin, which is given of a row in parts the part of each answer."""
    messages, tools = row.fields["messages"], row.fields.get("tools")
    answers = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
    ends = [len(messages)] if len(examples) == 1 else [place + 1 for place in answers]
    stops = [theirs.decode([token]) for token in stop_ids]
    kinds = set[str]()
    for example, end in zip(examples, ends, strict=True):
        spans = twin_spans(theirs, twin, messages[:end], tools, stop_ids)
        if spans is None:
            kinds.add(Kind.REFUSED)
            continue
        ours = [
            theirs.decode(span)
            for span in spans_of(example.input_ids.tolist(), example.loss_mask.tolist(), stop_ids)
        ]
        kinds |= explain(ours, spans, stops, asks=_asking(theirs), only_last=len(examples) > 1)
    return kinds


def _compare(
    found: Tried,
    row: Row,
    spans: Sequence[list[int]],
    tokenizer: Any,
    stop_ids: frozenset[int],
    *,
    says_thought: bool = True,
) -> None:
    """Note what of ``spans`` is no answer of ``row``, and what of an answer is not in them."""
    if len(spans) != len(row.answers):
        found.faults.append(f"{len(spans)} spans for {len(row.answers)} answers")
        return
    for span, answer in zip(spans, row.answers, strict=True):
        if span[-1] not in stop_ids:
            found.faults.append("no stop token")
            continue
        text = tokenizer.decode(_without_end(span, answer["content"], tokenizer))
        wanted = answer["content"] if says_thought else answer["content"].split("</think>")[-1]
        if calls := answer.get("tool_calls"):
            parts = [wanted, *(part for one in calls for part in _parts(one["function"]))]
            found.faults += [f"{part!r} is not in {text!r}" for part in parts if part not in text]
        elif _bare(text) == _bare(wanted) or text.strip().endswith(wanted.strip()):
            found.spaced += [text] * (text != wanted)
        elif _bare(text).endswith(_bare(wanted)) or _bare(text) == _bare(wanted).removeprefix(OPENED):
            found.spaced.append(text)
        elif says_thought and all(part in text for part in _thought_and_answer(wanted)):
            found.spaced.append(text)  # between tags of the template's own
        else:
            found.faults.append(f"{text!r} for {wanted!r}")
    trained = "\n".join(map(tokenizer.decode, spans))
    others = [message for message in row.fields["messages"] if message["role"] != "assistant"]
    said = [message["content"].strip() for message in others]
    found.faults += [f"{text!r} is trained" for text in said if len(text) > 6 and text in trained]


def _asking(tokenizer: Any) -> str:
    """Return what the template writes behind a question to ask for the answer."""
    question = [{"role": "user", "content": "Hi"}]
    shown, asks = (
        tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=asks)
        for asks in (False, True)
    )
    return str(asks[first_difference(shown, asks) :])


def _without_end(span: Sequence[int], answer: str, tokenizer: Any) -> Sequence[int]:
    """Return ``span`` without its stop token and other control tokens in front of that, which are none of ``answer``."""
    controls = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    end = len(span) - 1
    while end and span[end - 1] in controls and not answer.endswith(tokenizer.decode([span[end - 1]])):
        end -= 1
    return span[:end]


def _thought_and_answer(content: str) -> list[str]:
    """Return both parts of a content with a thought; else an empty text, which is in no other."""
    thought, closing, answer = content.partition("</think>")
    return [thought.replace(OPENED, "").strip(), answer.strip()] if closing else ["\0"]


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
    return f"{counts}, {same}" + "".join(f"; {text[:200]}" for text in (*faults[:3], *rejected[:1]))


def _more_told(tried: Sequence[Tried]) -> str:
    refused = Counter(row.rejected.split(":")[0] for row in tried if row.rejected)
    helped = sum(row.helped for row in tried)
    others = [f"{name.split()[1]} {sum(name in row.kept_with for row in tried)}" for name in OTHERS]
    kinds = Counter(
        kind if not kind.startswith("unexplained") else "UNEXPLAINED" for row in tried for kind in row.twin
    )
    parts = [f"{helped} more with the help" if helped else "", ", ".join(others)]
    parts += [
        "refused " + ", ".join(f"{reason} {count}" for reason, count in refused.items()) if refused else ""
    ]
    parts += ["twin " + ", ".join(f"{kind} {count}" for kind, count in kinds.most_common()) if kinds else ""]
    return "".join(f"; {part}" for part in parts if part)


if __name__ == "__main__":
    sys.exit(main())
