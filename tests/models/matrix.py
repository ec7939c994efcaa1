"""Every family through training, packing, LoRA, merging, answers, resuming and checkpoints.

    python -m tests.models.matrix llama glm4_moe --out DIR

Without names all of ``families.py`` are tried, 20 to 60 seconds each. A family that has a result in ``DIR/results`` is left out.
Prints a table of all results in the end, where what is not as it should be stands in ``**``; exits with 1 if anything of the
families that are named does.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tests.models.child import Command, Done, call, prepare_children, run_sft, start_sft
from tests.models.families import EXPECTED, FAMILIES, TOWERS, build_family
from tests.models.plain import answer_plainly, logits_apart, tensors_apart, train_plainly
from tests.support.forked import end_forked, start_forked

EXPERT_COLUMNS = ("expert LoRA", "expert answers", "expert peft")
COLUMNS = (
    "train", "packing", "left alone", "auto = off", "= transformers", "LoRA", "merged answers", "peft opens", *EXPERT_COLUMNS,
    "answers", "checkpoint", "names", "verify", "stopped", "bf16", "GGUF", "eval",
)  # fmt: skip
# These are also stopped by a signal, trained in bfloat16, exported as GGUF and scored.
WHOLE = {
    "llama", "qwen3", "gemma3_text", "qwen3_moe", "phi3", "qwen3_5_text", "gpt2", "lfm2", "granitemoehybrid", "deepseek_v3",
}  # fmt: skip
PROMPTS = ("Say in 5 words what the baker does with a map. (99)", "Hello there")
BATCH_SIZE = 12
RATE = "training.learning_rate=1e-3"
LORA_RATE = "training.learning_rate=2e-2"
HELDOUT = "data.heldout_fraction=0.1"
SETTINGS = (
    HELDOUT, f"training.batch_size={BATCH_SIZE}", "training.micro_batch_size=8", "training.max_steps=3",
    "training.warmup_steps=0", "checkpoint.keep_last=3",
)  # fmt: skip
OFTEN = "checkpoint.every_steps=2"
FP32 = "training.precision=fp32"
LOSS_LIMIT = 1e-4  # nats, and as a part of a gradient norm
LOGITS_LIMIT = 1e-4
REFUSED = 2  # what a model cannot do here
REFUSALS = (2, 65, 78)
ANSWER_TOKENS = 12
_WHO = (
    "the river", "a small boat", "our teacher", "the red lamp", "my neighbor", "an old clock", "the baker", "two foxes",
    "the pilot", "a quiet town",
)  # fmt: skip
_DOES = ("crosses", "finds", "repairs", "remembers", "sells", "paints", "counts", "hides", "follows", "lifts")
_WHAT = (
    "the bridge", "seven apples", "a letter", "the garden wall", "three coins", "the winter coat", "a map",
    "the kitchen door", "some honey", "the last train",
)  # fmt: skip

Cells = dict[str, str]


def main() -> int:
    """Try the families and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("families", nargs="*", metavar="FAMILY")
    parser.add_argument("--out", type=Path, required=True, help="folder of models, runs and results")
    parser.add_argument("--keep", action="store_true", help="keep what the runs wrote")
    parser.add_argument(
        "--brief", action="store_true", help="leave out what few of the families are asked of"
    )
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="families at a time")
    args = parser.parse_args()
    out, names = args.out.absolute(), args.families or [*FAMILIES, *TOWERS]
    if unknown := set(names) - FAMILIES.keys() - TOWERS.keys():
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    results = out / "results"
    results.mkdir(parents=True, exist_ok=True)
    prepare_children(out)
    shutil.rmtree(out / "prepared", ignore_errors=True)
    rows = write_rows(out / "rows.jsonl")
    prepare_rows(rows, out)
    todo = [name for name in names if not (results / f"{name}.json").exists()]
    work = partial(try_families, out=out, rows=rows, keep=args.keep, brief=args.brief)
    children = [start_forked(partial(work, todo[place :: args.jobs])) for place in range(args.jobs)]
    for child in children:
        end_forked(child)
    print_table(results)
    faults = [fault for name in names for fault in faults_of(name, results / f"{name}.json")]
    print("\n".join(faults))
    return int(bool(faults))


def faults_of(name: str, result: Path) -> list[str]:
    """Return what is not as it should be of a family: wrong, or refused where nobody expects it."""
    if not result.exists():
        return [f"{name}: nothing was found"]
    cells: Cells = json.loads(result.read_text(encoding="utf-8"))
    return [
        f"{name}: {column}: {cell}"
        for column, cell in cells.items()
        if "**" in cell or (cell.startswith("refused: ") and column not in EXPECTED.get(name, ()))
    ]


def try_families(names: Sequence[str], *, out: Path, rows: Path, keep: bool, brief: bool) -> None:
    """Try each of ``names``, and write what was found to ``out / "results"``."""
    for name in names:
        begin = time.monotonic()
        build_once(name, out)
        cells = Trial(name, out, rows, brief=brief).run()
        (out / "results" / f"{name}.json").write_text(json.dumps(cells, indent=1), encoding="utf-8")
        print(f"{name}: {time.monotonic() - begin:.0f} s", flush=True)
        if not keep:
            shutil.rmtree(out / "work" / name)


def prepare_rows(rows: Path, out: Path) -> None:
    """Write the rows as tokens, the same for all families, as all have one tokenizer."""
    model = build_once("llama", out)
    words = ("--model", str(model), "--set", HELDOUT, "--out", str(out / "prepared"))
    done = run_sft("prepare", str(rows), *words, folder=out, name="prepare")
    if done.code:
        raise RuntimeError(done.last)


def build_once(name: str, out: Path) -> Path:
    """Return the folder of a family's model under ``out``, built in a child where it is missing."""
    folder = out / "models" / name
    if not (folder / "generation_config.json").exists():
        try:
            call(_build, name, folder)
        except RuntimeError as error:
            print(f"{name} cannot be built: {error}", flush=True)
    return folder


def _build(name: str, folder: Path) -> None:
    build_family(name, folder)


class Trial:
    """One family; ``cells`` are what was found."""

    def __init__(self, name: str, out: Path, rows: Path, *, brief: bool) -> None:
        self.name = name
        self.brief = brief
        self.out = out
        self.rows = rows
        self.model = out / "models" / name
        self.work = out / "work" / name
        self.runs = self.work / "runs"
        self.cells: Cells = {}
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir(parents=True)
        (self.work / "prompts.txt").write_text("\n".join(PROMPTS) + "\n", encoding="utf-8")

    def run(self) -> Cells:
        """Try all, as long as it trains."""
        done = self.train("auto", RATE, FP32, OFTEN)
        self.cells["train"] = told(done)
        if done.code == 0:
            parts = [self.compare, self.try_adapter, self.try_answers]
            parts += [] if self.brief else [self.try_resuming]
            for part in (*parts, *((self.try_the_rest,) if self.name in WHOLE and not self.brief else ())):
                try:
                    part()
                except Exception:  # noqa: BLE001 - the other parts and families are tried all the same
                    self.cells[part.__name__] = f"**{traceback.format_exc().splitlines()[-1][:120]}**"
        return self.cells

    def sft(self, name: str, *words: str) -> Done:
        environ = {"SFT_TRAINING__PRECISION": "fp32"} if words[0] == "generate" else {}
        return run_sft(*words, folder=self.work, name=name, environ=environ)

    def words(self, run: str, *settings: str) -> list[str]:
        words = ["train", "--model", str(self.model), "--data", str(self.rows), "--run", run]
        return words + [word for setting in (*SETTINGS, *settings) for word in ("--set", setting)]

    def train(self, run: str, *settings: str, flags: Sequence[str] = ()) -> Done:
        return self.sft(run, *self.words(run, *settings), *flags)

    def compare(self) -> None:
        """Compare losses and gradients with those of rows alone, here and in transformers."""
        auto = numbers_of(self.runs / "auto")
        is_packed = any("rows are packed" in note for note in auto["notes"])
        self.cells["packing"] = "packed" if is_packed else "not packed"
        if not is_packed and not self.brief:
            forced = self.train("on", RATE, FP32, flags=("--packing", "on"))
            self.cells["packing"] = "not packed; on: " + (
                "refused" if forced.code == REFUSED else told(forced)
            )
        alone = [
            note.split(":")[0] for note in auto["notes"] if "using the transformers implementation" in note
        ]
        self.cells["left alone"] = "; ".join(alone)
        if not self.brief:
            done = self.train("off", RATE, FP32, flags=("--packing", "off"))
            self.cells["auto = off"] = (
                limited(worst(auto, numbers_of(self.runs / "off"), "loss"), LOSS_LIMIT)
                if done.code == 0
                else told(done)
            )
        plain = call(
            train_plainly, str(self.model), str(self.out / "prepared"), BATCH_SIZE, auto["learning_rate"]
        )
        loss = max(worst(auto, plain, "loss"), worst(auto, plain, "heldout"))
        norms = zip(auto["grad_norm"], plain["grad_norm"], strict=True)
        norm = max(abs(one - other) / other for one, other in norms)
        self.cells["= transformers"] = f"{limited(loss, LOSS_LIMIT)} / {limited(norm, LOSS_LIMIT)}"

    def try_adapter(self) -> None:
        """Train LoRA, and on experts too where there are some."""
        self._adapter("lora", "LoRA", "merged answers", "peft opens")
        log = self.runs / "lora" / "events.jsonl"
        if not self.brief and log.exists() and "adapter.experts=true" in log.read_text(encoding="utf-8"):
            self._adapter("experts", *EXPERT_COLUMNS, "adapter.experts=true")

    def _adapter(self, run: str, trained: str, answers: str, opened: str, *settings: str) -> None:
        """Train an adapter, merge it, and compare its answers and logits with those of the merged model."""
        done = self.train(run, LORA_RATE, FP32, OFTEN, *settings, flags=("--lora",))
        self.cells[trained] = told(done)
        if done.code:
            return
        merged = self.work / f"merged-{run}"
        done = self.sft(f"merge-{run}", "export", run, "--to", "hf", "--out", str(merged))
        if done.code:
            self.cells[answers] = told(done)
            return
        self._compare_answers(answers, run, merged)
        apart = call(logits_apart, str(self.runs / run / "final"), str(merged))
        self.cells[opened] = limited(apart, LOGITS_LIMIT)

    def try_answers(self) -> None:
        """Compare answers of what was trained, open a checkpoint, and look at the names of tensors."""
        final = self.runs / "auto" / "final"
        self._compare_answers("answers", "auto", final)
        done, _ = self._answers(str(self.runs / "auto" / "checkpoints" / "step-00000003"), "checkpoint")
        self.cells["checkpoint"] = told(done)
        apart = call(_apart, str(self.model), str(final), True)
        self.cells["names"] = f"**{', '.join(apart)[:120]}**" if apart else "same"

    def _compare_answers(self, column: str, of: str, folder: Path) -> None:
        done, answers = self._answers(of, column.replace(" ", "-"))
        if done.code == 0:
            same = answers == call(answer_plainly, str(folder), PROMPTS, ANSWER_TOKENS)
            self.cells[column] = "same" if same else "**differ**"
        else:
            self.cells[column] = told(done)

    def _answers(self, of: str, name: str) -> tuple[Done, list[str]]:
        out = self.work / f"{name}.jsonl"
        words = ("--file", "prompts.txt", "--out", out.name, "-c", of, "--max-new-tokens", str(ANSWER_TOKENS))
        done = self.sft(name, "generate", *words)
        lines = out.read_text(encoding="utf-8").splitlines() if done.code == 0 else []
        return done, [json.loads(line)["answer"] for line in lines]

    def try_resuming(self) -> None:
        """Take the second half again, bit for bit."""
        self.cells["verify"] = told(self.sft("verify", "resume", "auto", "--verify"))

    def try_the_rest(self) -> None:
        """Stop a run and go on, train in bfloat16, verify an adapter, export as GGUF, score."""
        self.cells["stopped"] = self._stopped()
        self.cells["bf16"] = told(self.train("bf16", RATE, "training.precision=bf16"))
        self.cells["verify"] += ", LoRA " + told(self.sft("verify-lora", "resume", "lora", "--verify"))
        done = self.sft("gguf", "export", "auto", "--to", "gguf", "--out", "model.gguf")
        self.cells["GGUF"] = "refused" if done.code == REFUSED else told(done)
        words = ("eval", "auto", "--max-rows", "2", "--no-base", "--json")
        self.cells["eval"] = told(self.sft("eval", *words))

    def _stopped(self) -> str:
        command = start_sft(self.words("cut", RATE, FP32, OFTEN), folder=self.work, name="cut")
        _stop_after_a_step(command, self.runs / "cut" / "events.jsonl")
        if (done := command.end()).code not in (0, 128 + signal.SIGTERM):
            return told(done)
        if (done := self.sft("resume", "resume", "cut")).code:
            return told(done)
        apart = call(_apart, *(str(self.runs / run / "final") for run in ("auto", "cut")), False)
        return f"**{len(apart)} tensors differ**" if apart else "same"


def _stop_after_a_step(command: Command, log: Path) -> None:
    while not (log.exists() and '"StepDone"' in log.read_text(encoding="utf-8")):
        if os.waitid(os.P_PID, command.child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return  # it ended before
        time.sleep(0.02)
    os.kill(command.child, signal.SIGTERM)


def _apart(one: str, other: str, names_only: bool) -> list[str]:
    return tensors_apart(Path(one), Path(other), names_only=names_only)


def told(done: Done) -> str:
    """Return what a command came to, in a word where it is good, else with the reason."""
    if done.code == 0:
        return "ok"
    if done.code in REFUSALS and done.last.startswith("error: "):
        return f"refused: {done.last.removeprefix('error: ')}"
    return f"**{done.code}: {done.last[:100]}**"


def limited(value: float, limit: float) -> str:
    """Return ``value`` as a cell."""
    return f"{value:.0e}" if value <= limit else f"**{value:.0e}**"


def numbers_of(run: Path) -> dict[str, list[Any]]:
    """Return what the log of ``run`` says of steps and held-out losses, and its notes."""
    lines = (run / "events.jsonl").read_text(encoding="utf-8").splitlines()
    events = [json.loads(line) for line in lines]
    steps = [event for event in events if event["event"] == "StepDone"]
    found = {key: [step[key] for step in steps] for key in ("loss", "grad_norm", "learning_rate")}
    found["heldout"] = [event["loss"] for event in events if event["event"] == "HeldoutDone"]
    found["notes"] = [event["text"] for event in events if event["event"] in ("Notice", "Warned")]
    return found


def worst(one: dict[str, list[float]], other: dict[str, list[float]], key: str) -> float:
    """Return the largest difference."""
    return max(abs(left - right) for left, right in zip(one[key], other[key], strict=True))


def write_rows(path: Path) -> Path:
    """Write 40 conversations of 30 to 86 tokens, some with a system text, some of two turns."""
    generator = random.Random(7)
    with path.open("w", encoding="utf-8") as file:
        for index in range(40):
            who, does, what = map(generator.choice, (_WHO, _DOES, _WHAT))
            more = " again and again until the evening comes" if index % 3 == 0 else ""
            ask = f"Say in {generator.randint(3, 9)} words what {who} does with {what}. ({index})"
            turns = [("user", ask), ("assistant", f"{who.capitalize()} {does} {what}{more}.")]
            if index % 4 == 1:
                turns = [("system", "Answer briefly."), *turns]
            if index % 5 == 2:
                turns += [("user", "And then?"), ("assistant", f"Then {who} rests.")]
            messages = [{"role": role, "content": content} for role, content in turns]
            file.write(json.dumps({"messages": messages}) + "\n")
    return path


def print_table(results: Path) -> None:
    """Print a row a family."""
    print(f"| family | {' | '.join(COLUMNS)} |\n|---|{'---|' * len(COLUMNS)}")
    for path in sorted(results.glob("*.json")):
        cells = json.loads(path.read_text(encoding="utf-8"))
        others = [cells[key] for key in cells.keys() - set(COLUMNS)]
        print(
            f"| {path.stem} | {' | '.join(cells.get(column, '') for column in COLUMNS)} | {' '.join(others)}"
        )


if __name__ == "__main__":
    sys.exit(main())
