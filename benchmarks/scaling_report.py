"""What one model needs on some numbers of GPUs, line by line: ``python -m benchmarks.scaling --model 70B``. All of it is predicted."""

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.scaling import Machine, Shape, head_bytes, step_seconds
from sftcli.services.train.start.parallelism import ROOM
from sftcli.training.distributed.traffic import Traffic

RANK = 32  # of the adapter
READ = WRITE = 5e9  # bytes/s of a shared drive, by all processes together: an assumption


@dataclass(frozen=True, kw_only=True)
class Way:
    """A training of a model on so many GPUs, its weights sharded among all of them."""

    shape: Shape
    gpus: int
    rows: int
    tokens: int
    is_adapter: bool = False

    @property
    def name(self) -> str:
        return f"{self.gpus} GPUs, {f'adapter of rank {RANK}' if self.is_adapter else 'all weights'}"

    @property
    def micro_batches(self) -> int:
        return -(-self.rows // self.gpus)

    @property
    def trained(self) -> int:
        """Numbers that are trained: all, or two matrices beside each matrix of a layer."""
        if not self.is_adapter:
            return self.shape.numbers
        sides = sum(sum(weight.shape) for weight in self.shape.layer if len(weight.shape) == 2)
        return self.shape.layers * RANK * sides

    @property
    def each_micro_batch(self) -> bool:
        """Whether gradients are exchanged after each, as they are where no process has room for the whole of them."""
        parts = (12 * self.trained + 4 * self.shape.numbers) / self.gpus
        return parts + 4 * self.trained > ROOM * Machine().memory

    def memory(self) -> list[tuple[str, float]]:
        """Return the terms of a GPU's memory, in bytes."""
        shape, part = self.shape, 1 / self.gpus
        gradients = part if self.each_micro_batch else 1
        one = sum(weight.padded(1) for weight in shape.layer)
        root = sum(weight.padded(1) for weight in shape.root)
        base = [("frozen weights, bfloat16: 2 P / N", 2 * shape.numbers * part)] if self.is_adapter else []
        return [
            *base,
            ("float32 masters: 4 T / N", 4 * self.trained * part),
            ("moments of AdamW: 8 T / N", 8 * self.trained * part),
            ("gradients, float32: 4 T / N, or 4 T where they fit whole", 4 * self.trained * gradients),
            ("two gathered layers, embeddings and head: 2 bytes a number", 2 * (2 * one + root)),
            ("inputs of the layers of a micro-batch", 2 * shape.layers * self.tokens * shape.width),
            ("activations inside one layer", 34 * self.tokens * shape.width),
            ("logits and their gradient, a chunk", head_bytes(shape, self.tokens)),
        ]

    def host(self) -> list[tuple[str, float]]:
        """Return what goes through the memory and the drive of hosts, in bytes."""
        shape, kept = self.shape, 2 if self.is_adapter else 4  # bytes of a number that is read
        one = sum(weight.padded(1) for weight in shape.layer)
        root = sum(weight.padded(1) for weight in shape.root)
        tensor = 4 * min(self.trained, max(weight.padded(1) for weight in shape.root))
        return [
            (
                "loading, memory of a process: its shard, 4 P / N, frozen 2 P / N",
                kept * shape.numbers / self.gpus,
            ),
            (
                "loading, before that: embeddings, head, a layer and its gradients, float32",
                4 * (root + 2 * one),
            ),
            ("loading, read by all: 2 P", 2 * shape.numbers),
            (
                "saving, memory of a process: its part and one tensor, 12 T / N + 4 M",
                12 * self.trained / self.gpus + tensor,
            ),
            ("a checkpoint on the drive: 12 T", 12 * self.trained),
            ("`final/` on the drive", 4 * self.trained if self.is_adapter else 2 * shape.numbers),
        ]

    def traffic(self) -> list[tuple[str, float]]:
        """Return the bytes that a GPU sends in a step."""
        whole = self._traffic()
        share = (self.gpus - 1) / self.gpus
        return [
            ("weights, gathered for every micro-batch", whole.gathered * share),
            ("gradients", whole.scattered * share),
        ]

    def _traffic(self) -> Traffic:
        each = self.each_micro_batch
        found = self.shape.traffic(self.gpus, self.gpus, self.micro_batches, 2, each_micro_batch=each)
        gradients = 4 * self.trained * (self.micro_batches if each else 1)
        return Traffic(gathered=found.gathered, scattered=gradients)

    def seconds(self, machine: Machine) -> list[tuple[str, float]]:
        """Return the terms of time."""
        compute, _ = step_seconds(
            self.shape,
            self.gpus,
            self.gpus,
            self.micro_batches,
            self.tokens,
            each_micro_batch=True,
            machine=machine,
        )
        compute *= 6 / 8 if self.is_adapter else 1  # nothing frozen has gradients
        exchange = sum(size for _, size in self.traffic()) / machine.bandwidth(self.gpus)
        exchange += self.micro_batches * 3 * self.shape.layers * machine.latency * self.gpus.bit_length()
        step = max(compute, exchange)
        loading, saving = 2 * self.shape.numbers, 12 * self.trained
        return [
            ("compute of a step", compute),
            ("exchange of a step, hidden behind compute as far as it is shorter", exchange),
            ("a step", step),
            (f"loading, at {READ / 1e9:.0f} GB/s of the drive", loading / READ),
            (
                f"a checkpoint, written and read back at {WRITE / 1e9:.0f} GB/s",
                saving / WRITE + saving / READ,
            ),
        ]


def report(shape: Shape, rows: int, tokens: int) -> None:
    """Print what ``shape`` needs on 8 and 64 GPUs."""
    machine = Machine()
    ways = [
        Way(shape=shape, gpus=gpus, rows=rows, tokens=tokens, is_adapter=adapter)
        for gpus, adapter in ((8, False), (64, False), (8, True))
    ]
    print(
        f"{shape.name}: P = {shape.numbers / 1e9:.1f}e9 numbers, T trained ones, M in the largest tensor; {rows} rows of {tokens} tokens a step, "
        f"one a micro-batch; fsdp over N H100 of {machine.memory / 1e9:.0f} GB; predicted, nothing measured\n"
    )
    print(f"| | {' | '.join(way.name for way in ways)} |\n|---|{'---|' * len(ways)}")
    memory = [way.memory() for way in ways]
    _lines(memory, 1e9, "GB of a GPU")
    totals = [sum(size for _, size in terms) for terms in memory]
    _line("**GB of a GPU**", [f"**{total / 1e9:.1f}**" for total in totals])
    _line("fits", ["yes" if total < machine.memory else "no" for total in totals])
    _lines([way.host() for way in ways], 1e9, "GB")
    _lines([way.traffic() for way in ways], 1e9, "GB sent by a GPU in a step")
    seconds = [way.seconds(machine) for way in ways]
    _lines(seconds, 1, "s")
    steps = [dict(terms)["a step"] for terms in seconds]
    _line("tokens/s of all GPUs", [f"{rows * tokens / step:,.0f}" for step in steps])


def _lines(columns: Sequence[Sequence[tuple[str, float]]], unit: float, word: str) -> None:
    names = list(dict.fromkeys(name for column in reversed(columns) for name, _ in column))
    for name in names:
        found = [dict(column).get(name) for column in columns]
        _line(f"{word}: {name}", ["" if one is None else f"{one / unit:,.1f}" for one in found])


def _line(name: str, cells: Sequence[str]) -> None:
    print(f"| {name} | {' | '.join(cells)} |")
