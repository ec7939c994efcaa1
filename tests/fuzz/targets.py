"""What is damaged: a file in a good sample, and commands that read it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A file, and commands that read it. Each case runs in a copy of the sample, which is then the working directory."""

    name: str
    make: Callable[
        [Path], object
    ]  # builds the sample in an empty folder, its working directory; it is shared by all with the same
    file: str  # the file to damage, relative to that folder; of a pattern the first that fits
    commands: tuple[str, ...]  # command lines of ``sft``; each ends with 0 where nothing is damaged

    def path(self, folder: Path) -> Path:
        """Return where the file is in a copy of the sample."""
        found = sorted(folder.glob(self.file))
        assert found, f"the sample of {self.name} has no {self.file}"
        return found[0]
