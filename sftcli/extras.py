"""Packages that are not installed with this one, and the command that brings one where it is missed.

The command names packages and not an extra of this one: it can be pasted wherever this one came from, a folder, a wheel or an
index, and does not install this one again.
"""

from importlib.util import find_spec

from sftcli.errors import Location, UsageError

EXTRAS = {
    "qlora": ("bitsandbytes>=0.45",),
    "8bit": ("bitsandbytes>=0.50",),
    "eval": ("rouge-score>=0.1.2", "sacrebleu>=2.5", "lm-eval>=0.4.9", "jsonschema>=4.18"),
    "gpu": ("liger-kernel>=0.8",),
    "hybrid": ("flash-linear-attention>=0.6", "causal-conv1d>=1.7", "mamba-ssm>=2.3"),
    "track": ("tensorboard>=2.18", "wandb>=0.19", "mlflow-skinny>=2.20"),
}
"""What each extra of ``pyproject.toml`` holds."""


def install_command(extra: str, *packages: str) -> str:
    """Return the command that installs those of ``packages`` that ``extra`` holds, or all of it where it holds none of them."""
    wanted = [part for part in EXTRAS[extra] if part.split(">=")[0] in packages] or EXTRAS[extra]
    return " ".join(["pip install", *(f'"{requirement}"' for requirement in wanted)])


def require_package(
    module: str, *, extra: str, needed_by: str, package: str = "", otherwise: str = "", key: str | None = None
) -> None:
    """Make sure that ``module`` can be imported, without importing it: to be called before anything slow.

    Args:
        module: Name of a top-level module.
        extra: The extra that holds it.
        needed_by: What the user asked for, as the beginning of a sentence.
        package: What brings the module, where it has another name.
        otherwise: What to do without it.
        key: The setting that asks for it.

    Raises:
        UsageError: It is not installed.
    """
    if find_spec(module) is None:
        way = f"install it: {install_command(extra, package or module)}"
        raise UsageError(
            f"{needed_by} needs {package or module}, which is not installed",
            hint=f"{way}, or {otherwise}" if otherwise else way,
            location=Location(key=key),
        )
