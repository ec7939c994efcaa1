"""Damage foreign files at random, and read them as commands do, without the commands: a hundred times as many cases.

    python -m tests.fuzz.readers --count 10000 --seed 0

A case fails that raises anything but an error of this program, or that takes longer than ``--seconds``. A child reads a batch of them;
where it dies, that is told, and another one goes on behind the case.
"""

import argparse
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from random import Random

from sftcli.errors import SftError
from tests.fuzz import runner
from tests.fuzz.damage import damaged
from tests.fuzz.targets import Target

_BATCH = 25


def _model(folder: Path) -> None:
    import torch

    from sftcli.modeling.architecture import require_causal
    from sftcli.modeling.formats.sizes import embedding_bytes, parameters_bytes
    from sftcli.modeling.load import load_layout, load_model

    embedding_bytes(folder)
    parameters_bytes(folder)
    model = load_model(folder, dtype=torch.float32, device=torch.device("cpu"))
    require_causal(model)
    load_layout(folder)


def _tokenizer(folder: Path, template: str | None = None) -> None:
    from sftcli.modeling.tokenizer.chat_tokenizer import load_chat_tokenizer

    tokenizer = load_chat_tokenizer(folder, template=template)
    messages = [{"role": "user", "content": "What is 1?"}, {"role": "assistant", "content": "It is 2."}]
    text = tokenizer.render(messages, tools=None, add_generation_prompt=False)
    for reading in ("template", "answer", "text"):
        ids = tokenizer.encode(text, reading=reading)
        tokenizer.decode_many([ids])
    tokenizer.encode_many(["It is 2."], reading="text", continued=True)
    tokenizer.normalize(text)
    _ = tokenizer.switches, tokenizer.max_chars_per_token


def _whole(folder: Path) -> None:
    _model(folder)
    _tokenizer(folder)


def _adapter(folder: Path) -> None:
    import torch

    from sftcli.modeling.adapter.adapter import merge_adapter
    from sftcli.modeling.adapter.folder import read_base, read_shape

    read_base(folder)
    read_shape(folder)
    merge_adapter(folder, base=Path("model"), dtype=torch.float32)


def _gguf(file: Path) -> None:
    from sftcli.modeling.formats.gguf.gguf_import import converted_gguf

    folder, _ = converted_gguf(file, prefix="gguf", emit=lambda _: None)
    _whole(folder)


def _pt(file: Path) -> None:
    from sftcli.modeling.formats.pt_import import converted_pt

    folder, _ = converted_pt(file, tokenizer="model", emit=lambda _: None)
    _whole(folder)


def _rows(file: Path) -> None:
    from sftcli.data.reading.records import fingerprint_source, read_records
    from sftcli.data.reading.source import parse_source

    source = parse_source(str(file))
    known = fingerprint_source(source)
    for _ in read_records(source, seed=0, known=known):
        pass


def _fixes(file: Path) -> None:
    from sftcli.data.conversations.fixes import read_fixes

    _ = read_fixes(str(file)).content


def _settings(file: Path) -> None:
    from sftcli.config.resolve import resolve

    resolve(preset=None, config_file=file, overrides=(), environ={})


_READERS: dict[str, Callable[[Path], None]] = {
    "model/config.json": lambda file: _whole(file.parent),
    "model/model.safetensors": lambda file: _model(file.parent),
    "parts/model.safetensors.index.json": lambda file: _model(file.parent),
    "parts/model-00002-of-00002.safetensors": lambda file: _model(file.parent),
    "model/generation_config.json": lambda file: _whole(file.parent),
    "model/tokenizer.json": lambda file: _tokenizer(file.parent),
    "model/tokenizer_config.json": lambda file: _tokenizer(file.parent),
    "model/special_tokens_map.json": lambda file: _tokenizer(file.parent),
    "model/chat_template.jinja": lambda file: _tokenizer(file.parent),
    "own.jinja": lambda file: _tokenizer(Path("model"), str(file)),
    "adapter/adapter_config.json": lambda file: _adapter(file.parent),
    "adapter/adapter_model.safetensors": lambda file: _adapter(file.parent),
    "GGUF": _gguf,
    "pt": _pt,
    "fixes.jsonl": _fixes,
    **dict.fromkeys(("set.toml", "set.yaml", "set.json"), _settings),
}


def main() -> None:
    """Run the cases, and exit with 1 if one has failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="one target")
    parser.add_argument("--seconds", type=int, default=30, help="limit of a case")
    parser.add_argument("--max-seconds", type=float, default=1e9, help="begin no more cases after this")
    options = parser.parse_args()
    runner.load()
    from tests.fuzz.foreign import FOREIGN

    targets = [target for target in FOREIGN if options.only in (None, target.name)]
    begin, counts, faults = time.monotonic(), Counter[str](), Counter[str]()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as root:
        running = runner.Runner(Path(root), Path(root))
        running.build(targets)
        for number, start in enumerate(range(options.seed, options.seed + options.count, _BATCH)):
            if time.monotonic() - begin > options.max_seconds:
                break
            target = targets[number % len(targets)]
            seeds = range(start, min(start + _BATCH, options.seed + options.count))
            for seed, damage, fault in _ends(target, running.samples[target.make], seeds, options.seconds):
                counts[target.name] += 1
                if fault:
                    faults[f"{target.name}: {fault}"] += 1
                    sys.stdout.write(f"{target.name} seed {seed}, {damage}: {fault}\n")
                    sys.stdout.flush()
    sys.stdout.write("".join(f"{name:40} {count:6}\n" for name, count in sorted(counts.items())))
    sys.stdout.write(
        f"{counts.total()} cases in {time.monotonic() - begin:.0f} s; {faults.total()} faults of {len(faults)} kinds\n"
    )
    sys.exit(1 if faults else 0)


def _ends(target: Target, sample: Path, seeds: Sequence[int], seconds: int) -> Iterator[tuple[int, str, str]]:
    """Yield the seed of each case, its damage and its fault; "" for none."""
    log, folder = sample.with_name("log"), sample.with_name("case")
    while seeds:
        log.unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(sample, folder)

        def work(seeds: Sequence[int] = seeds) -> None:
            _read(target, seeds, folder, log, seconds)

        code = os.waitstatus_to_exitcode(os.waitpid(runner._fork(work, sample.with_name("output")), 0)[1])
        lines = log.read_text().splitlines() if log.exists() else []
        for seed, line in zip(seeds, lines, strict=False):
            damage, _, fault = line.partition(" -> ")
            yield seed, damage, fault
        seeds = seeds[len(lines) :]
        if code and seeds:
            yield seeds[0], "not told", signal.Signals(-code).name if code < 0 else f"exit {code}"
            seeds = seeds[1:]


def _read(target: Target, seeds: Sequence[int], folder: Path, log: Path, seconds: int) -> None:
    runner._settle(folder)
    runner._limit()
    path = target.path(folder)
    whole = path.read_bytes()
    with log.open("a", encoding="utf-8") as out:
        for seed in seeds:
            signal.alarm(seconds)
            damage, content = damaged(whole, path.suffix, Random(f"{target.name} {seed}"))
            path.unlink(missing_ok=True)
            if content is not None:
                path.write_bytes(content)
            out.write(f"{damage} -> {_fault(target.name, path.relative_to(folder))}\n")
            out.flush()
    signal.alarm(0)


def _fault(name: str, path: Path) -> str:
    try:
        _READERS.get(name, _rows)(path)
    except SftError:
        return ""
    except BaseException as error:  # noqa: BLE001 - a panic of Rust is one
        places = traceback.extract_tb(error.__traceback__)
        ours = next((place for place in reversed(places) if "/sftcli/" in place.filename), places[-1])
        where = f"{ours.filename.rpartition('/sftcli/')[2]}:{ours.lineno}"
        return f"{type(error).__name__} at {where}: {str(error)[:160]!a}"
    return ""


if __name__ == "__main__":
    main()
