"""The version of this program. Apart, because the package itself offers what stands on top of everything else."""

__version__ = "0.1.0"
