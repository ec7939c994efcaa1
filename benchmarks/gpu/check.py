"""Run the stages one after the other, each in a process of its own, within a budget of seconds; print what matters last.

    python -m benchmarks.gpu.check [--device cpu] [--only env,correct] [--budget 470] [--out DIR]

Runs from the root of the checkout. Results are in ``results.jsonl`` and ``log.txt`` of ``--out`` ($OUT where that is set, else
``gpu-check-out``), small models and runs in its folder ``work``. Exits with 1 where a verdict is not ok or a stage did not end.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import BinaryIO

_CARRIED = Path("gpu-tokenizer")  # laid there by carry.sh
_CPU_SECONDS = 900.0
_TESTS = ("tests/equivalence", "tests/unit/training", "tests/unit/modeling/test_fused.py")
# stage: the fewest seconds that it is begun with, the most that it gets
LIMITS = {
    "env": (10, 60), "correct": (20, 120), "speed": (30, 160), "trl": (30, 110), "cli": (30, 120), "compiled": (60, 200),
    "decode": (20, 60), "pytest": (40, 150),
}  # fmt: skip


def main() -> int:
    """Run them and print the summary."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument(
        "--budget", type=float, default=470, help="seconds for all stages; a CPU has no limit"
    )
    parser.add_argument("--only", default=",".join(LIMITS), help="stages, by commas")
    parser.add_argument("--out", type=Path, default=os.environ.get("OUT") or "gpu-check-out")
    parser.add_argument("--tokenizer", type=Path, default=_CARRIED if _CARRIED.is_dir() else None)
    args = parser.parse_args()
    out = args.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    results = out / "results.jsonl"
    results.unlink(missing_ok=True)
    begin, has_ended = time.monotonic(), True
    with (out / "log.txt").open("wb") as log:
        for stage in args.only.split(","):
            least, most = LIMITS[stage]
            left = args.budget - (time.monotonic() - begin)
            if args.device == "cpu":
                left = most = _CPU_SECONDS
            if left < least:
                print(f"[{stage}] left out: {left:.0f} s are left", flush=True)
                has_ended = False
                continue
            code = _run(_command(stage, args, out), log, seconds=min(most, left))
            has_ended &= code == 0
            print(f"[{stage}] rc {code} at {time.monotonic() - begin:.0f} s", flush=True)
    lines = results.read_text(encoding="utf-8").splitlines() if results.exists() else []
    print(f"\n==== {time.monotonic() - begin:.0f} s ====")
    return int(_summary([json.loads(line) for line in lines]) > 0 or not has_ended)


def _command(stage: str, args: argparse.Namespace, out: Path) -> list[str]:
    if stage == "pytest":
        words = [
            "pytest",
            "-q",
            "-n",
            "8",
            "-p",
            "no:cacheprovider",
            "-o",
            "filterwarnings=default",
            "--tb=line",
        ]
        return [sys.executable, "-m", *words, *_TESTS]
    words = [
        "benchmarks.gpu.stage",
        stage,
        "--device",
        args.device,
        "--out",
        str(out),
        "--work",
        str(out / "work"),
    ]
    return [sys.executable, "-m", *words, *(("--tokenizer", str(args.tokenizer)) if args.tokenizer else ())]


def _run(command: list[str], log: BinaryIO, *, seconds: float) -> int:
    """Run ``command`` for ``seconds`` at most, with all that it writes in ``log``, and return its exit code."""
    environ = os.environ | {
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    }
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environ, start_new_session=True
    )
    assert process.stdout is not None
    signal.signal(signal.SIGALRM, lambda *_: os.killpg(process.pid, signal.SIGKILL))
    signal.alarm(int(seconds) or 1)
    try:
        for line in process.stdout:
            log.write(line)
            log.flush()
            if line.startswith(b"[") or b"passed" in line or b"FAILED" in line:
                print(line.decode(errors="replace").rstrip()[:400], flush=True)
        return process.wait()
    finally:
        signal.alarm(0)


def _summary(lines: list[dict[str, object]]) -> int:
    """Print verdicts that are not ok and a table of speeds; return how many verdicts are not."""
    bad = [line for line in lines if line.get("verdict") in ("FAIL", "CRASH")]
    print(f"verdicts: {sum(line.get('verdict') == 'ok' for line in lines)} ok, {len(bad)} not")
    for line in bad:
        facts = {key: value for key, value in line.items() if key not in ("verdict", "stage", "name")}
        print(f"  {line['verdict']} [{line['stage']}] {line['name']}: {str(facts)[:300]}")
    if speeds := [line for line in lines if "tokens_per_s" in line]:
        peak = next((line["bfloat16_tflops"] for line in lines if line["name"] == "peak"), None)
        print("| run | tokens/s | ms a step | TFLOP/s | of peak | peak GB | reserved GB |")
        print("|---|--:|--:|--:|--:|--:|--:|")
        for line in speeds:
            of_peak = f"{line['tflops'] / peak:.0%}" if peak and "tflops" in line else ""
            timed, used = (
                [f"{line[key]:.1f}" if key in line else "" for key in keys]
                for keys in (("ms_per_step", "tflops"), ("peak_GB", "reserved_GB"))
            )
            cells = [
                f"{line['stage']} {line['name']}",
                f"{line['tokens_per_s']:,.0f}",
                *timed,
                of_peak,
                *used,
            ]
            print(f"| {' | '.join(cells)} |")
    return len(bad)


if __name__ == "__main__":
    sys.exit(main())
