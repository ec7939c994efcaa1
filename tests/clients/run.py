"""Other programs open what `sft` writes, and answer alike.

    python -m tests.clients.run [--environments DIR] [--work DIR]

Makes an environment for each program (once; llama.cpp is compiled, which takes minutes), trains the default model on
made rows, whole and as an adapter, exports both, and asks every program for the same greedy answers in float32. What is
compared, artefact by artefact: prompts as tokens, answers as tokens, the tokens of odd texts, the loss of a long text. Then
`sft eval` scores the runs and what was exported of them. Prints a table; exits with 1 if anything differs.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import venv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.clients.rows import long_text, made_rows, odd_texts

ENVIRONMENTS: Mapping[str, tuple[str, ...]] = {
    "transformers-4.57": ("torch==2.13.0", "transformers==4.57.6", "peft==0.21.2", "jinja2"),
    "transformers-5": ("torch==2.13.0", "transformers==5.24.0", "peft==0.21.2", "jinja2"),
    "llama.cpp": ("llama-cpp-python==0.3.36", "jinja2", "numpy"),
}
MOST = 64  # tokens of an answer
# What sft eval tells besides: of a run it knows the rows that were trained on, and looks for them in the answers.
NOT_OF_WEIGHTS = {"model", "seconds", "memorized_fraction", "longest_copied_tokens"}
# Nats a token. The long text is read by kernels that sum in another order; llama.cpp rounds what it multiplies to float16.
LOSS_TOLERANCE = {"transformers": 1e-4, "llama.cpp": 5e-3}


@dataclass(frozen=True, slots=True)
class Client:
    """A program that opens an artefact; ``base`` is given to those that load an adapter beside it."""

    name: str
    environment: str
    program: str
    artefact: str
    base: str = ""


FULL = (
    Client("transformers 5", "transformers-5", "transformers", "runs/full/final"),
    Client("transformers 5", "transformers-5", "transformers", "full_hf"),
    Client("transformers 4.57", "transformers-4.57", "transformers", "runs/full/final"),
    Client("transformers 4.57", "transformers-4.57", "transformers", "full_hf"),
    Client("llama.cpp", "llama.cpp", "llama.cpp", "full.f16.gguf"),
)
LORA = (
    Client("peft, transformers 5", "transformers-5", "transformers", "runs/lora/final", base="base"),
    Client("peft, transformers 4.57", "transformers-4.57", "transformers", "runs/lora/final", base="base"),
    Client("transformers 5", "transformers-5", "transformers", "lora_hf"),
    Client("transformers 4.57", "transformers-4.57", "transformers", "lora_hf"),
    Client("llama.cpp", "llama.cpp", "llama.cpp", "lora.f16.gguf"),
)


def main() -> int:
    """Run all of it and return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--environments", type=Path, default=home_of_environments(), help="kept from one call to the next"
    )
    parser.add_argument(
        "--work", type=Path, help="keep runs and exports in this folder, and take what is there"
    )
    given = parser.parse_args()
    environments = given.environments.absolute()
    for name, packages in ENVIRONMENTS.items():
        make_environment(environments / name, packages)
    with tempfile.TemporaryDirectory() as scratch:
        work = (given.work or Path(scratch)).absolute()
        work.mkdir(parents=True, exist_ok=True)
        os.environ |= {"SFT_CACHE_DIR": str(environments / "sft-cache"), "HF_HUB_OFFLINE": "1"}
        make_artefacts(work)
        faults = [
            *compare(work, FULL, environments, run="full"),
            *compare(work, LORA, environments, run="lora"),
        ]
        faults += compare_scores(work)
    print("\n" + ("\n".join(f"DIFFERS: {fault}" for fault in faults) or "nothing differs"))
    return 1 if faults else 0


def home_of_environments() -> Path:
    """Return where environments are kept unless another folder is named."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "sft-clients"


def make_environment(folder: Path, packages: Sequence[str]) -> None:
    """Make the environment, unless it is there with these packages."""
    done = folder / "packages.txt"
    if done.is_file() and done.read_text(encoding="utf-8") == "\n".join(packages):
        return
    say(f"making {folder}: {', '.join(packages)}")
    venv.create(folder, with_pip=True, clear=True)
    subprocess.run([folder / "bin" / "python", "-m", "pip", "install", "--quiet", *packages], check=True)
    done.write_text("\n".join(packages), encoding="utf-8")


def make_artefacts(work: Path) -> None:
    """Train and export, where that is not there yet."""
    train, heldout, prompts = made_rows()
    for name, rows in (
        ("train", train),
        ("heldout", heldout),
        ("prompts", [{"messages": one} for one in prompts]),
    ):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (work / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    if not (work / "base").exists():
        (work / "base").symlink_to(default_model(), target_is_directory=True)
    shared = (
        "--data", "train.jsonl", "--set", 'data.heldout_sources=["heldout.jsonl"]', "--set", "training.batch_size=8",
        "--quiet",
    )  # fmt: skip
    if not (work / "runs/full/final").exists():
        sft(
            work, "train", "--run", "full", "--max-steps", 40, "--set", "training.learning_rate=1e-4", *shared
        )
    if not (work / "runs/lora/final").exists():
        sft(work, "train", "--run", "lora", "--lora", "--max-steps", 40, *shared)
    for run in ("full", "lora"):
        for out, form in ((f"{run}_hf", "hf"), (f"{run}.f16.gguf", "gguf")):
            if not (work / out).exists():
                sft(work, "export", run, "--to", form, "--out", out, "--quiet")
        answers = (f"{run}_answers.jsonl", "--max-new-tokens", MOST, "--precision", "fp32", "--quiet")
        if not (work / answers[0]).exists():
            sft(work, "generate", "-c", run, "--file", "prompts.jsonl", "--out", *answers)


def default_model() -> Path:
    """Return the folder of the model that the runs start from."""
    from sftcli.modeling.locate.default_model import ALIAS
    from sftcli.modeling.locate.locate import locate_model

    return locate_model(ALIAS, revision=None, emit=lambda _event: None).folder


def sft(work: Path, *arguments: object) -> str:
    """Run a command in ``work`` and return what it prints."""
    say("sft " + " ".join(map(str, arguments)))
    command = [sys.executable, "-m", "sftcli", *map(str, arguments)]
    return subprocess.run(command, cwd=work, check=True, stdout=subprocess.PIPE, text=True).stdout


def compare(work: Path, clients: Sequence[Client], environments: Path, *, run: str) -> list[str]:
    """Ask all clients; return what is not as the first of them has it."""
    first = ask(clients[0], work, environments)
    faults: list[str] = []
    rows = [row_of(clients[0], first, first, faults)]
    rows += [row_of(client, ask(client, work, environments), first, faults) for client in clients[1:]]
    own = [json.loads(line)["answer"] for line in (work / f"{run}_answers.jsonl").open(encoding="utf-8")]
    same = sum(one == other for one, other in zip(own, first["texts"], strict=True))
    rows.append((f"runs/{run}", "sft generate", "-", f"{same} of {len(own)}", "-", "-"))
    if same < len(own):
        faults.append(f"sft generate, {run}: {len(own) - same} answers")
    show(("artefact", "program", "prompts", "answers", "odd texts", "loss of a long text"), rows)
    return faults


def ask(client: Client, work: Path, environments: Path) -> dict[str, list]:
    """Return what a client makes of an artefact."""
    say(f"{client.name}: {client.artefact}")
    job = {
        "program": client.program,
        "model": str(work / client.artefact),
        "base": str(work / client.base) if client.base else "",
        "prompts": made_rows()[2],
        "texts": odd_texts(),
        "long_text": long_text(),
        "most": MOST,
    }
    given, made = work / "job.json", work / "result.json"
    given.write_text(json.dumps(job), encoding="utf-8")
    python = environments / client.environment / "bin" / "python"
    subprocess.run([python, Path(__file__).with_name("ask.py"), given, made], check=True)
    return json.loads(made.read_text(encoding="utf-8"))


def row_of(
    client: Client, found: dict[str, list], first: dict[str, list], faults: list[str]
) -> tuple[str, ...]:
    """Return a row of the table, and add what differs to ``faults``."""
    cells = [client.artefact, client.name]
    for key in ("prompts", "answers", "tokens"):
        same = [one == other for one, other in zip(found[key], first[key], strict=True)]
        cells.append(f"{sum(same)} of {len(same)}")
        faults += [
            f"{client.name}, {client.artefact}: {key} {place}{margin_of(key, place, found, first)}"
            for place, is_same in enumerate(same)
            if not is_same
        ]
    cells.append(f"{found['loss']:.5f}")
    if abs(found["loss"] - first["loss"]) > LOSS_TOLERANCE[client.program]:
        faults.append(f"{client.name}, {client.artefact}: loss {found['loss']:.5f} for {first['loss']:.5f}")
    return tuple(cells)


def margin_of(key: str, place: int, found: dict[str, list], first: dict[str, list]) -> str:
    """Return how sure the first client was of the token where an answer starts to differ."""
    if key != "answers":
        return ""
    ours, theirs = first[key][place], found[key][place]
    at = next(
        (index for index, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]), None
    )
    at = min(len(ours), len(theirs)) if at is None else at
    return f", from token {at}, where the margin is {first['margins'][place][at]:.4f}"


def compare_scores(work: Path) -> list[str]:
    """Score the runs and what was exported of them on the same rows; return what differs."""
    rows, faults = [], []
    for run in ("full", "lora"):
        of_run, of_export = (scores(work, model) for model in (run, f"{run}_hf"))
        faults += [
            f"sft eval {run}: {name} {of_run.get(name)}, of the export {of_export.get(name)}"
            for name in sorted(of_run.keys() | of_export.keys())
            if of_run.get(name) != of_export.get(name)
        ]
        of_gguf = scores(work, f"{run}.f16.gguf")
        losses = [f"{found['loss']:.6f}" for found in (of_run, of_export, of_gguf)]
        rows.append((run, *losses, "equal" if of_run == of_export else "DIFFER"))
        if abs(float(of_gguf["loss"]) - float(of_run["loss"])) > LOSS_TOLERANCE["llama.cpp"]:
            faults.append(f"sft eval {run}: loss {losses[0]}, of the GGUF {losses[2]}")
    show(("run", "loss of the run", "of --to hf", "of GGUF f16", "all scores of run and --to hf"), rows)
    return faults


def scores(work: Path, model: str) -> dict[str, object]:
    """Return the numbers of ``sft eval``."""
    text = sft(
        work, "eval", model, "--data", "heldout.jsonl", "--no-base", "--max-rows", 8, "--json", "--quiet"
    )
    found = json.loads(text)["tuned"]
    return {name: value for name, value in found.items() if name not in NOT_OF_WEIGHTS}


def show(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table."""
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    print()
    for row in (head, ["-" * width for width in widths], *rows):
        print(
            "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |",
            flush=True,
        )


def say(text: str) -> None:
    """Tell how far it is."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
