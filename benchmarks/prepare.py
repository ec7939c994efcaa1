"""Memory and speed of ``sft prepare``, as ratios that are measured in one run on one machine.

    python benchmarks/prepare.py --model FOLDER --data rows.jsonl
    python benchmarks/prepare.py --model FOLDER --data rows.jsonl --peer peer_trl.py --peer-python VENV/bin/python

memory  peak memory of preparing 84,000 different rows over that of the rows of the file            at most 1.3
speed   tokens a second of preparing, with every row proved, over those of ``encode_batch`` alone   at least 0.5
workers seconds of preparing with one worker over those with two, whose stores are equal (--part workers)   at least 1.6
peer    seconds until TRL's trainer is ready over seconds of preparing the same rows                at least 3

The rows are ``{"prompt": str, "completion": str}``. Exit code 1 means that a bar was missed.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROWS = 84_000
MEMORY_BAR, SPEED_BAR, WORKERS_BAR, PEER_BAR = 1.3, 0.5, 1.6, 3.0
ENCODED_ROWS = 1024  # handed to the bare tokenizer at once, as many as `sft prepare` reads at once
FEW_ROWS = 32  # what TRL needs for these is not preparing: loading libraries, model and tokenizer


@dataclass(frozen=True, slots=True)
class Ended:
    """A command that ended well."""

    seconds: float
    peak_bytes: int
    output: str


def main() -> None:
    """Measure, print, and fail where a bar was missed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="folder of a model with its tokenizer")
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--part", choices=("memory", "speed", "workers", "peer"), action="append")
    parser.add_argument("--rows", type=int, default=ROWS, help="rows of the large run")
    parser.add_argument("--peer", type=Path, help="script that prints ready_seconds of TRL's trainer as JSON")
    parser.add_argument("--peer-python", default=sys.executable, help="interpreter that has TRL")
    parser.add_argument("--bare", help=argparse.SUPPRESS)
    parser.add_argument("--workers", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.bare:
        print(json.dumps(compare_with_bare_tokenizer(Path(arguments.bare), arguments.data)))
        return
    if arguments.workers:
        print(json.dumps(prepare_with(arguments.workers, Path(arguments.model), arguments.data)))
        return
    parts = arguments.part or ["memory", "speed", *(["peer"] if arguments.peer else [])]
    passed = []
    with tempfile.TemporaryDirectory() as scratch:
        large = Path(scratch) / "large.jsonl"
        write_distinct(arguments.data, large, arguments.rows)
        if "memory" in parts:
            passed.append(measure_memory(arguments.model, arguments.data, large, arguments.rows, scratch))
        if "speed" in parts:
            passed.append(measure_speed(arguments.model, large, scratch))
        if "workers" in parts:
            passed.append(measure_workers(arguments.model, large, scratch))
        if "peer" in parts:
            passed.append(measure_peer(arguments, scratch))
    sys.exit(0 if all(passed) else 1)


def write_distinct(source: Path, target: Path, rows: int) -> None:
    """Repeat the rows of ``source`` up to ``rows``, each repetition with prompts of its own."""
    lines = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    with target.open("w", encoding="utf-8") as file:
        for number in range(rows):
            times, index = divmod(number, len(lines))
            row = dict(lines[index])
            if times:
                row["prompt"] = f"{times}. {row['prompt']}"
            file.write(json.dumps(row) + "\n")


def measure_memory(model: str, small: Path, large: Path, rows: int, scratch: str) -> bool:
    """Compare the peak memory of two runs of the command."""
    peaks = [prepare(model, path, scratch) for path in (small, large)]
    ratio = peaks[1].peak_bytes / peaks[0].peak_bytes
    shown = ", ".join(f"{peak.peak_bytes / 1e6:.0f} MB in {peak.seconds:.1f} s" for peak in peaks)
    return report("memory", ratio, MEMORY_BAR, ratio <= MEMORY_BAR, f"{small.name} and {rows} rows: {shown}")


def measure_speed(model: str, data: Path, scratch: str) -> bool:
    """Compare preparing with the tokenizer alone, both in one process that is warm."""
    command = [sys.executable, __file__, "--bare", model, "--model", model, "--data", str(data)]
    found = json.loads(run(command, scratch).output)
    detail = (
        f"{found['rows']} rows: prepared and proved in {found['prepare_seconds']:.1f} s,"
        f" tokenized alone in {found['bare_seconds']:.1f} s; in processor time, which other programs change less,"
        f" {found['prepare_cpu']:.1f} s and {found['bare_cpu']:.1f} s"
    )
    ratio = found["bare_seconds"] / found["prepare_seconds"]
    return report("speed", ratio, SPEED_BAR, ratio >= SPEED_BAR, detail)


def measure_workers(model: str, data: Path, scratch: str) -> bool:
    """Compare one worker with two, from the first row on; see that both make the same store."""
    found = []
    for count in (1, 2):
        command = [sys.executable, __file__, "--workers", str(count), "--model", model, "--data", str(data)]
        found.append(json.loads(run(command, scratch).output))
    one, two = found
    detail = "; ".join(
        f"{count}: {each['seconds']:.1f} s, {each['cpu']:.1f} s of processor time here and {each['workers_cpu']:.1f} s in workers"
        for count, each in enumerate(found, 1)
    )
    is_equal = one["store"] == two["store"]
    ratio = one["seconds"] / two["seconds"]
    detail += f"; stores {'equal' if is_equal else 'DIFFERENT'}"
    return report("workers", ratio, WORKERS_BAR, is_equal and ratio >= WORKERS_BAR, detail)


def prepare_with(workers: int, model: Path, data: Path) -> dict[str, object]:
    """Prepare ``data`` in this process with ``workers`` beside it, or with none."""
    from sftcli.config.schema.data import DataSettings
    from sftcli.events import NeverStop, Session
    from sftcli.services.prepare import workers as settings_of_workers
    from sftcli.services.prepare.prepare import prepare_data
    from sftcli.services.prepare.sources import find_sources

    settings_of_workers.ALONE_CHARS = 0
    settings = DataSettings(sources=(str(data),))
    begin, begin_cpu = time.perf_counter(), time.process_time()
    prepared = prepare_data(
        settings,
        find_sources(settings),
        model_folder=model,
        seed=0,
        session=Session(lambda _event, /: None, NeverStop()),
        workers=workers,
    )
    assert not prepared.is_cached
    children = os.times()
    return {
        "seconds": time.perf_counter() - begin,
        "cpu": time.process_time() - begin_cpu,
        "workers_cpu": children.children_user + children.children_system,
        "store": prepared.dataset.fingerprint,
    }


def compare_with_bare_tokenizer(model: Path, data: Path) -> dict[str, object]:
    """Prepare ``data``, then tokenize the text of the same rows with the bare tokenizer."""
    from tokenizers import Tokenizer

    from sftcli.modeling.tokenizer.chat_tokenizer import load_chat_tokenizer

    prepared = prepare_with(0, model, data)
    template, bare = load_chat_tokenizer(model), Tokenizer.from_file(str(model / "tokenizer.json"))
    rows, seconds, cpu = 0, 0.0, 0.0
    with data.open(encoding="utf-8") as file:
        while lines := [line for _, line in zip(range(ENCODED_ROWS), file, strict=False)]:
            texts = [text_of(json.loads(line), template) for line in lines]
            begin, begin_cpu = time.perf_counter(), time.process_time()
            bare.encode_batch(texts)
            seconds, cpu = seconds + time.perf_counter() - begin, cpu + time.process_time() - begin_cpu
            rows += len(texts)
    return {
        "rows": rows,
        "prepare_seconds": prepared["seconds"],
        "prepare_cpu": prepared["cpu"],
        "bare_seconds": seconds,
        "bare_cpu": cpu,
    }


def text_of(row: dict[str, str], template) -> str:
    """Return the text of a row as the template has it."""
    turns = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]
    return template.render(turns, tools=None, add_generation_prompt=False)


def measure_peer(arguments: argparse.Namespace, scratch: str) -> bool:
    """Compare with the time until TRL's trainer is ready, from which loading the model is taken off."""
    few = Path(scratch) / "few.jsonl"
    write_distinct(arguments.data, few, FEW_ROWS)
    ready = []
    for data in (few, arguments.data.resolve()):
        command = [arguments.peer_python, str(arguments.peer.resolve()), "--model", arguments.model]
        command += ["--data", str(data), "--steps", "3", "--batch-size", "1", "--mode", "pad"]
        ready.append(json.loads(run(command, scratch).output.splitlines()[-1])["ready_seconds"])
    ours = [prepare(arguments.model, data, scratch).seconds for data in (few, arguments.data.resolve())]
    whole = ready[1] / ours[1]
    net = (ready[1] - ready[0]) / (ours[1] - ours[0])
    detail = (
        f"TRL is ready after {ready[1]:.1f} s, {ready[0]:.1f} s of it without rows; sft prepare takes {ours[1]:.1f} s,"
        f" {ours[0]:.1f} s of it without rows; ratio of the rest {net:.1f}"
    )
    return report("peer", min(whole, net), PEER_BAR, min(whole, net) >= PEER_BAR, detail)


def prepare(model: str, data: Path, scratch: str) -> Ended:
    """Run ``sft prepare`` with an empty cache."""
    return run(
        [sys.executable, "-m", "sftcli", "prepare", str(data.resolve()), "--model", model, "--quiet"], scratch
    )


def run(command: list[str], scratch: str) -> Ended:
    """Run a command with caches of its own; return its output, its time and its peak memory."""
    with tempfile.TemporaryDirectory(dir=scratch) as caches:
        own = {"SFT_CACHE_DIR": f"{caches}/sft", "HF_DATASETS_CACHE": f"{caches}/datasets"}
        environment = {**os.environ, **own}
        with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
            begin = time.perf_counter()
            child = subprocess.Popen(command, stdout=output, stderr=errors, env=environment, cwd=caches)
            _, status, usage = os.wait4(child.pid, 0)
            seconds = time.perf_counter() - begin
            child.returncode = os.waitstatus_to_exitcode(status)
            output.seek(0)
            errors.seek(0)
            if child.returncode:
                sys.exit(f"{' '.join(command)} ended with {child.returncode}:\n{errors.read().decode()}")
            scale = 1 if sys.platform == "darwin" else 1024
            return Ended(seconds, usage.ru_maxrss * scale, output.read().decode())


def report(name: str, ratio: float, bar: float, is_good: bool, detail: str) -> bool:
    """Print one line; hand on whether the bar was met."""
    print(f"{name:8}{ratio:6.2f}  bar {bar}  {'met' if is_good else 'MISSED'}  ({detail})", flush=True)
    return is_good


if __name__ == "__main__":
    main()
