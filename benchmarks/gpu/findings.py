"""What a stage of the check is told, and what it finds: printed, and kept as lines of JSON."""

import gc
import json
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True, kw_only=True)
class Check:
    """One stage: where it computes, and where its results, its models and its runs go."""

    stage: str
    device: torch.device
    out: Path
    work: Path
    tokenizer: Path | None  # a folder; None for that of the default model

    @property
    def is_small(self) -> bool:
        """Whether sizes are for trying the check itself, on a CPU."""
        return self.device.type == "cpu"

    def say(self, name: str, **facts: object) -> None:
        """Print a result and keep it."""
        line = {"stage": self.stage, "name": name, "verdict": "measured"} | facts
        told = "  ".join(f"{key}={_short(value)}" for key, value in facts.items())
        print(f"[{self.stage}] {name}: {told}", flush=True)
        with (self.out / "results.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, default=str) + "\n")

    def leave_out(self, name: str, why: str, **facts: object) -> None:
        """Say that a result cannot be had here."""
        self.say(name, verdict="left out", why=why, **facts)

    def judge(self, name: str, ok: bool, **facts: object) -> None:
        """Say a result with its verdict."""
        self.say(name, verdict="ok" if ok else "FAIL", **facts)

    @contextmanager
    def guarded(self, name: str) -> Iterator[None]:
        """Go on with what follows where something raises an error, and say so."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 - whatever a device comes up with
            traceback.print_exc(limit=-8)
            self.say(name, verdict="CRASH", error=f"{type(error).__name__}: {error}"[:300])
        finally:
            free()

    def wait(self) -> None:
        """Wait until nothing is left to do on the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def free() -> None:
    """Give back what is not used any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _short(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_short, value)) + "]"
    return str(value)
