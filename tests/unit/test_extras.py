import tomllib
from pathlib import Path

from sftcli.extras import EXTRAS, install_command

ROOT = Path(__file__).parents[2]


def test_commands_install_what_the_extras_hold():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    held = project["optional-dependencies"]
    assert {extra: list(parts) for extra, parts in EXTRAS.items()} == {extra: held[extra] for extra in EXTRAS}
    assert set(held) == {*EXTRAS, "dev", "docs"}  # of those who change the program


def test_a_command_can_be_pasted_and_names_what_is_missed_only():
    assert install_command("eval", "lm-eval") == 'pip install "lm-eval>=0.4.9"'
    assert install_command("track", "google").count(">=") == 3
    assert install_command("qlora") == 'pip install "bitsandbytes>=0.45"'
