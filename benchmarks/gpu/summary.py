"""What the check prints last: verdicts that are not ok, a table of speeds, and the bars beside what was measured."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Line = Mapping[str, Any]
BAD = frozenset({"FAIL", "CRASH", "CUT", "LEFT OUT"})
_PER_GIB = 2**30 / 1e9


class Results:
    """Lines of results by stage and name."""

    def __init__(self, lines: Sequence[Line]) -> None:
        self.lines = {(line["stage"], line["name"]): line for line in lines}
        self.all = lines

    def of(self, stage: str, name: str, key: str = "tokens_per_s") -> float:
        """Return a number; KeyError where it was not measured."""
        return float(self.lines[stage, name][key])

    def share(self, name: str) -> float:
        """Return the part of the measured rate of products that training reached."""
        return self.of("speed", name, "tflops") / self.of("env", "peak", "bfloat16_tflops")

    def beside_peer(self, name: str, kind: str) -> float:
        """Return our tokens a second over those of TRL's best line for ``kind``."""
        lines = [line for line in self.all if line["stage"] == "trl" and line["name"].startswith(f"{kind} ")]
        best = max((float(line["tokens_per_s"]) for line in lines if "tokens_per_s" in line), default=None)
        if best is None:
            raise KeyError(kind)
        return self.of("speed", name) / best


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """What is asked of a GPU of the kind of an H100."""

    name: str
    found: Callable[[Results], float]
    least: float = float("-inf")
    most: float = float("inf")


BARS = (
    Bar(name="135M: tokens/s", found=lambda all: all.of("speed", "smol: as it is"), least=150_000),
    Bar(name="1.5B: part of the measured rate of products", found=lambda all: all.share("qwen15: as it is"), least=0.4),
    Bar(name="8B, LoRA: tokens/s", found=lambda all: all.of("speed", "llama8b, LoRA: as it is"), least=11_000),
    Bar(name="8B, LoRA: GiB held", found=lambda all: all.of("speed", "llama8b, LoRA: as it is", "reserved_GB") / _PER_GIB, most=62),
    Bar(name="135M over TRL's best", found=lambda all: all.beside_peer("smol: as it is", "smol"), least=1.0),
    Bar(name="1.5B over TRL's best", found=lambda all: all.beside_peer("qwen15: as it is", "qwen15"), least=1.0),
    Bar(name="8B, LoRA over TRL's best", found=lambda all: all.beside_peer("llama8b, LoRA: as it is", "llama8b"), least=1.0),
    Bar(name="135M answers, 1 row: tokens/s", found=lambda all: all.of("decode", "smol 1 rows, sft"), least=250),
    Bar(name="135M answers, 32 rows: tokens/s", found=lambda all: all.of("decode", "smol 32 rows, sft"), least=8000),
)  # fmt: skip


def print_summary(lines: Sequence[Line], *, is_cuda: bool, has_all: bool) -> int:
    """Print it and return how many verdicts are not ok; bars count where there is a GPU and ``has_all`` was measured."""
    bad = [line for line in lines if line.get("verdict") in BAD]
    if is_cuda:
        bad += _print_bars(Results(lines), has_all=has_all)
    ok, left_out = (sum(line.get("verdict") == verdict for line in lines) for verdict in ("ok", "left out"))
    print(f"verdicts: {ok} ok, {len(bad)} not, {left_out} left out")
    for line in bad:
        facts = {key: value for key, value in line.items() if key not in ("verdict", "stage", "name")}
        print(f"  {line['verdict']} [{line['stage']}] {line['name']}: {str(facts)[:300]}")
    if speeds := [line for line in lines if "tokens_per_s" in line]:
        _print_speeds(speeds, lines)
    return len(bad)


def _print_bars(results: Results, *, has_all: bool) -> list[Line]:
    """Print each bar beside what was found; return those that were missed, or not measured where all should have been."""
    missed: list[Line] = []
    for bar in BARS:
        try:
            found = bar.found(results)
        except KeyError:
            found = None
        is_met = found is not None and bar.least <= found <= bar.most
        asked = f">= {bar.least:g}" if bar.least > float("-inf") else f"<= {bar.most:g}"
        told = "not measured" if found is None else f"{found:.4g}"
        print(f"bar: {'ok' if is_met else '--'} {bar.name}: {told} ({asked})")
        if not is_met and (found is not None or has_all):
            missed.append(
                {"stage": "bar", "name": bar.name, "verdict": "FAIL", "found": told, "asked": asked}
            )
    return missed


def _print_speeds(speeds: Sequence[Line], lines: Sequence[Line]) -> None:
    peak = next((line["bfloat16_tflops"] for line in lines if line["name"] == "peak"), None)
    print("| run | tokens/s | ms a step | TFLOP/s | of peak | peak GB | reserved GB |")
    print("|---|--:|--:|--:|--:|--:|--:|")
    for line in speeds:
        of_peak = f"{line['tflops'] / peak:.0%}" if peak and "tflops" in line else ""
        told = [
            f"{line[key]:.1f}" if key in line else ""
            for key in ("ms_per_step", "tflops", "peak_GB", "reserved_GB")
        ]
        cells = [
            f"{line['stage']} {line['name']}",
            f"{line['tokens_per_s']:,.0f}",
            *told[:2],
            of_peak,
            *told[2:],
        ]
        print(f"| {' | '.join(cells)} |")
