"""The runs of a comparison: the settings of each, checked by name before torch is loaded."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sftcli.config.auto import AUTO_KEYS, Decided, is_open, value_of, with_values
from sftcli.config.layers import Override
from sftcli.config.resolve import Resolved
from sftcli.config.schema.settings import Settings
from sftcli.errors import Location, OutputError, UsageError
from sftcli.services.compare.axis import FLAG, Axis, parse_axis
from sftcli.services.compare.record import is_comparison
from sftcli.services.runs.folder import require_free
from sftcli.services.train.start.early import check_asked

DEFAULT_STEPS = 100  # of each run, where nobody says how long they are


@dataclass(frozen=True, slots=True, kw_only=True)
class CompareRequest:
    """What was typed. ``resolve`` makes the settings of the command with some more, which win."""

    asked: str
    seeds: int
    resolve: Callable[[Sequence[Override]], Resolved]


@dataclass(frozen=True, slots=True, kw_only=True)
class Child:
    """One run: its name below the comparison's folder, its place on the axis, and which of the seeds it has."""

    name: str
    place: int
    seed: int
    resolved: Resolved


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """What is compared: the settings of the command, and for each value those of its runs."""

    axis: Axis
    seeds: int
    base: Resolved
    by_value: tuple[Resolved, ...]

    @property
    def count(self) -> int:
        """Number of runs."""
        return self.seeds * len(self.by_value)

    @property
    def reference(self) -> Settings:
        """The settings from which is decided what nobody chose: those of the first value where models are compared."""
        is_of_model = self.axis.key.startswith("model.")
        return (self.by_value[0] if is_of_model else self.base).settings

    @property
    def folder(self) -> Path | None:
        """Where it is kept; None where it has no name yet."""
        run = self.base.settings.run
        return None if run.name is None else Path(run.root) / run.name

    def agreed(self, decided: Decided, steps: int) -> Mapping[str, object]:
        """Return what is the same in all runs and nobody chose, by key."""
        found: dict[str, object] = {
            key: value_of(decided.settings, key)
            for key in AUTO_KEYS
            if is_open(self.reference, key) and key != self.axis.key
        }
        if self.axis.key.startswith("model."):
            found.pop("training.learning_rate", None)  # it follows from the size of each
        if "training.batch_size" in found:
            found["training.micro_batch_size"] = decided.settings.training.micro_batch_size
        return found | {"training.max_steps": steps}

    def children(self, folder: Path, agreed: Mapping[str, object]) -> list[Child]:
        """Return the runs in their order: all values with one seed, then with the next."""
        return [
            self._child(folder, agreed, place, seed)
            for seed in range(self.seeds)
            for place in range(len(self.by_value))
        ]

    @staticmethod
    def _shared_by(settings: Settings) -> frozenset[str]:
        """Return the keys that a run takes from what all agree on: those that nothing in its own settings has decided."""
        shared = {key for key in AUTO_KEYS if is_open(settings, key)} | {"training.max_steps"}
        return frozenset(
            shared | ({"training.micro_batch_size"} if "training.batch_size" in shared else set())
        )

    def _child(self, folder: Path, agreed: Mapping[str, object], place: int, seed: int) -> Child:
        resolved, base = self.by_value[place], self.base.settings
        slug = f"{place + 1}-{self.axis.values[place].slug}".strip("-.")
        name = f"{slug}-seed-{base.training.seed + seed}" if self.seeds > 1 else slug
        values = {
            **{key: value for key, value in agreed.items() if key in self._shared_by(resolved.settings)},
            "run.root": str(folder),
            "run.name": name,
            "training.seed": base.training.seed + seed,
            "data.split_seed": base.rows_seed,
            "data.share_seed": base.data.share_seed + seed,
        }
        if resolved.settings.training.answers_if_cheap:  # losses are compared, and nobody looks at the runs
            values["training.eval_answers"] = 0
        if self.axis.key == "data.share_seed":
            del values["data.share_seed"]
        settings = with_values(resolved.settings, values)
        micro, batch = settings.training.micro_batch_size, settings.training.rows_per_step
        settings = with_values(settings, {"training.micro_batch_size": min(micro, batch)})
        origins = {**resolved.origins, **dict.fromkeys(values, FLAG)}
        return Child(
            name=name, place=place, seed=seed, resolved=replace(resolved, settings=settings, origins=origins)
        )


def find_comparison(request: CompareRequest) -> Comparison:
    """Read what is compared and make the settings of each value. Needs no torch.

    Raises:
        UsageError: It cannot be compared, or a value is none that its key accepts.
    """
    base = request.resolve(())
    settings = base.settings
    axis = parse_axis(request.asked, settings)
    for is_wrong, text, hint in (
        (settings.training.processes > 1, "trains in one process", "leave out --processes"),
        (
            settings.training.early_stopping_evals > 0,
            "trains all runs for the same number of steps",
            "leave out training.early_stopping_evals",
        ),
        (
            not settings.data.heldout_sources and settings.data.heldout_fraction == 0,
            "needs held-out rows",
            "set data.heldout_fraction, or name rows with --heldout",
        ),
    ):
        if is_wrong:
            raise UsageError(f"{FLAG} {text}", hint=hint, location=Location(key=FLAG))
    by_value = tuple(
        request.resolve((Override(key=axis.key, value=_plain(value.setting), origin=FLAG),))
        for value in axis.values
    )
    return Comparison(axis=axis, seeds=request.seeds, base=base, by_value=by_value)


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


def check_comparison(comparison: Comparison, *, auto: bool, plans: bool) -> None:
    """Check by name what the runs need, and where they go.

    Raises:
        UsageError, NotFoundError, ConsentError, DataError, ResourceError: As ``check_asked``.
        OutputError: The folder exists and is not to be gone on with, or cannot be made.
    """
    for resolved in comparison.by_value:
        check_asked(resolved.settings)
    if plans:
        return
    folder = comparison.folder
    if auto and folder is None:
        raise UsageError("--resume auto needs to know which comparison", hint="name it: --run NAME")
    if folder is not None and is_comparison(folder):
        if not auto:
            raise OutputError(
                f"{folder} exists already",
                hint="go on with it: the same command and --resume auto; or choose another name with --run",
            )
        return
    require_free(comparison.base.settings.run)
