"""Makes the pictures of the README from a real training: the live view as SVG, the page of the run as PNG.

    python docs/pictures.py

It needs tmux and chromium, and takes a few minutes. What a person would see is what is drawn: the training runs in a
terminal of its own, and the terminal is asked for its screen.
"""

import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from sftcli.cache import cache_folder

IMAGES = Path(__file__).parent / "images"
COLUMNS, ROWS = 96, 24
SOCKET = "sft-pictures"
TRAIN = "train --run quick --max-steps 16 --eval-every 5"  # all of it: it stands in the picture
WANTED = re.compile(r"1[2-5]/16")  # late enough for a curve, before the end
MAX_SECONDS = 1800


def tmux(*arguments: str) -> str:
    """Run tmux on a server of its own and return what it says."""
    done = subprocess.run(
        ["tmux", "-L", SOCKET, "-f", os.devnull, *arguments], capture_output=True, text=True, check=True
    )
    return done.stdout


def capture_training(folder: Path) -> str:
    """Train in ``folder`` and return the screen with its escapes from the middle of it; wait for the end."""
    from rich.text import Text

    program = f"{sys.executable} -m sftcli {TRAIN}; touch over; sleep 600"
    size = ["-x", str(COLUMNS), "-y", str(ROWS)]
    variables = {name: os.environ[name] for name in ("SFT_CACHE_DIR", "PYTHONPATH") if name in os.environ}
    named = [word for name, value in variables.items() for word in ("-e", f"{name}={value}")]
    tmux(
        "new-session",
        "-d",
        "-s",
        "train",
        *size,
        "-c",
        str(folder),
        *named,
        "env -u CI sh -c '" + program + "'",
    )
    screen, end = "", time.monotonic() + MAX_SECONDS
    try:
        while not (folder / "over").exists():
            if time.monotonic() > end:
                raise SystemExit(f"the training did not end within {MAX_SECONDS} s")
            shown = tmux("capture-pane", "-e", "-p", "-t", "train")
            if WANTED.search(Text.from_ansi(shown).plain):
                screen = shown
            time.sleep(0.5)
    finally:
        tmux("kill-server")
    return screen


def draw(screen: str, path: Path) -> None:
    """Write a screen as SVG, without what tells of this machine."""
    from rich.console import Console
    from rich.text import Text

    text = screen.rstrip().replace(str(cache_folder()), "~/.cache/sft")
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True)
    console.print(Text.from_ansi(f"$ sft {TRAIN}\n{text}"), soft_wrap=True)
    drawn = console.export_svg(title="sft train", unique_id="sft")
    without_fonts = re.sub(
        r"@font-face \{.*?\}\s*", "", drawn, flags=re.DOTALL
    )  # they would come from the network
    path.write_text(without_fonts, encoding="utf-8")


def photograph(page: Path, path: Path) -> None:
    """Write the top of an HTML page as PNG."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        raise SystemExit("the picture of the report needs chromium")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1000,1100"]
    subprocess.run([browser, *flags, f"--screenshot={path}", page.as_uri()], check=True, capture_output=True)


def main() -> None:
    """Train once and make both pictures."""
    IMAGES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        screen = capture_training(folder)
        if not screen:
            raise SystemExit("the training was over before it could be seen")
        draw(screen, IMAGES / "live.svg")
        photograph(folder / "runs" / "quick" / "report.html", IMAGES / "report.png")


if __name__ == "__main__":
    main()
