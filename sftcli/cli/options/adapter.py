"""The options that choose an adapter. Imports nothing but Typer, as ``options`` does."""

from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated

import typer

PANEL = "Adapter"


class AdapterChoice(StrEnum):
    """Adapters as people call them."""

    NONE = "none"
    LORA = "lora"
    DORA = "dora"
    RSLORA = "rslora"
    QLORA = "qlora"


Lora = Annotated[
    bool,
    typer.Option("--lora", help="Train a LoRA adapter in place of the whole model.", rich_help_panel=PANEL),
]
Adapter = Annotated[
    AdapterChoice | None,
    typer.Option(
        "--adapter",
        help="Train an adapter of this kind; `qlora` keeps the model below it in 4 bits, on CUDA.",
        rich_help_panel=PANEL,
        show_default=False,
    ),
]
Rank = Annotated[
    int | None,
    typer.Option(
        "--rank", metavar="N", min=1, help="Inner width of the adapter's matrices.", rich_help_panel=PANEL
    ),
]


def adapter_flags(
    *, lora: bool, adapter: AdapterChoice | None, rank: int | None
) -> Mapping[str, tuple[str, object]]:
    """Return the flags as settings; see ``request.resolve_flags``."""
    flag = "--lora" if adapter is None else f"--adapter {adapter}"
    chosen = AdapterChoice.LORA if lora and adapter is None else adapter
    kind = AdapterChoice.LORA if chosen in (AdapterChoice.RSLORA, AdapterChoice.QLORA) else chosen
    return {
        "adapter.kind": (flag, None if kind is None else kind.value),
        "adapter.rslora": (flag, True if chosen is AdapterChoice.RSLORA else None),
        "adapter.quantize": (flag, "4bit" if chosen is AdapterChoice.QLORA else None),
        "adapter.rank": ("--rank", rank),
    }
