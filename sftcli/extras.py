"""Packages that are not installed with this one, and the command that brings one where it is missed.

The command names packages and not an extra of this one: it can be pasted wherever this one came from, a folder, a wheel or an
index, and does not install this one again.
"""

EXTRAS = {
    "qlora": ("bitsandbytes>=0.45",),
    "8bit": ("bitsandbytes>=0.50",),
    "eval": ("rouge-score>=0.1.2", "sacrebleu>=2.5", "lm-eval>=0.4.9"),
    "track": ("tensorboard>=2.18", "wandb>=0.19", "mlflow-skinny>=2.20"),
}
"""What each extra of ``pyproject.toml`` holds."""


def install_command(extra: str, *packages: str) -> str:
    """Return the command that installs those of ``packages`` that ``extra`` holds, or all of it where it holds none of them."""
    wanted = [part for part in EXTRAS[extra] if part.split(">=")[0] in packages] or EXTRAS[extra]
    return " ".join(["pip install", *(f'"{requirement}"' for requirement in wanted)])
