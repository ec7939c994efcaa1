"""Speed of one row's tokens beside llama.cpp, at equal weights and with its 8-bit ones, in turns of one run.

Needs ``llama-cpp-python``, which is compiled where it is installed (about ten minutes on two cores)::

    pip install llama-cpp-python
    OMP_NUM_THREADS=2 python -m benchmarks.peer_llama_cpp

Both continue the same prompt, greedily, with a cache; the time is that from the first token to the last, without the prompt. llama.cpp
runs in a process of its own, so that how its threads wait is its own choice. Weights are written by ``sft export --to gguf``.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TURNS = 5
KINDS = ("f16", "q8_0")


def main() -> None:
    """Print a line for each kind of weights, or answer as the child that has llama.cpp."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m", help="any name that sft takes")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.child is not None:
        answer_turns(flags.child)
    else:
        compare(flags.model, flags.tokens)


def compare(model: str, tokens: int) -> None:
    """Measure both in turns."""
    from benchmarks.generate import prompts_of  # sets how threads wait, as `sft` does
    from sftcli.modeling.locate.locate import locate_model

    place = locate_model(model, revision=None, emit=lambda _event: None).folder
    (prompt,) = prompts_of(place, 1)
    ours = Ours(place)
    with tempfile.TemporaryDirectory() as folder:
        theirs = {kind: Peer(export(model, kind, Path(folder))) for kind in KINDS}
        found: dict[str, list[float]] = {name: [] for name in ("sft", *KINDS)}
        for _ in range(TURNS + 1):
            found["sft"].append(ours.rate(prompt, tokens))
            for kind, peer in theirs.items():
                found[kind].append(peer.rate(prompt, tokens))
        for peer in theirs.values():
            peer.end()
    best = {name: statistics.median(rates[1:]) for name, rates in found.items()}  # the first turn warms up
    print(f"{model}, one row, {tokens} tokens, {ours.threads} threads, median of {TURNS} turns")
    print(f"{'sft, weights of 16 bits':<28}{best['sft']:>8.1f} t/s")
    for kind in KINDS:
        print(
            f"{f'llama.cpp, {kind}':<28}{best[kind]:>8.1f} t/s   sft has {best['sft'] / best[kind]:.2f} of it"
        )


def export(model: str, kind: str, folder: Path) -> Path:
    """Return the GGUF file of ``model``."""
    out = folder / f"{kind}.gguf"
    subprocess.run(
        [
            sys.executable,
            "-m",
            "sftcli",
            "export",
            model,
            "--to",
            "gguf",
            "--dtype",
            kind,
            "--out",
            out,
            "-q",
        ],
        check=True,
    )
    return out


class Ours:
    """This program's decoder, with weights of 16 bits."""

    def __init__(self, place: Path) -> None:
        import torch

        from sftcli.modeling.decoding.decoder import choose_decoder
        from sftcli.modeling.load import load_model
        from sftcli.runtime import choose_device

        self.decoder = choose_decoder(load_model(place, dtype=torch.bfloat16, device=choose_device()))
        self.threads = torch.get_num_threads()

    def rate(self, prompt: list[int], tokens: int) -> float:
        """Return tokens a second."""
        from sftcli.config.schema.run import SamplingSettings
        from sftcli.events import NeverStop
        from sftcli.modeling.decoding.decode import decode

        asked = SamplingSettings(max_new_tokens=tokens, temperature=0)
        times = [
            time.perf_counter()
            for _ in decode(
                self.decoder, [prompt], settings=asked, stop_ids=frozenset(), stop=NeverStop(), max_rows=1
            )
        ]
        return (tokens - 1) / (times[-1] - times[0])


class Peer:
    """llama.cpp in a process of its own."""

    def __init__(self, path: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.peer_llama_cpp", "--child", path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={
                name: value
                for name, value in os.environ.items()
                if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
            },
        )

    def rate(self, prompt: list[int], tokens: int) -> float:
        """Return tokens a second."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps([prompt, tokens]) + "\n")
        self.process.stdin.flush()
        return float(self.process.stdout.readline())

    def end(self) -> None:
        """Let it end."""
        self.process.communicate()


def answer_turns(path: Path) -> None:
    """Answer each line, a prompt as ids and how many tokens, with tokens a second."""
    import numpy as np
    from llama_cpp import Llama, llama_get_logits

    threads = int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
    model = Llama(str(path), n_ctx=1024, n_threads=threads, n_threads_batch=threads, verbose=False)
    for line in sys.stdin:
        prompt, tokens = json.loads(line)
        model.reset()
        model.eval(prompt)
        times = [time.perf_counter()]
        for _ in range(tokens - 1):
            logits = np.ctypeslib.as_array(llama_get_logits(model.ctx), shape=(model.n_vocab(),))
            model.eval([int(logits.argmax())])
            times.append(time.perf_counter())
        print((tokens - 1) / (times[-1] - times[0]), flush=True)


if __name__ == "__main__":
    main()
