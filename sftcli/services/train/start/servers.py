"""What the program that is to serve a model refuses, said before the training: a row a refusal.

vLLM refuses adapters when it loads them; llama.cpp, and Ollama with it, has a form of its own for adapters
(``modeling/adapter/gguf_adapter.py``) and for models (``modeling/formats/gguf``).
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sftcli.config.schema.adapter import AdapterKind
from sftcli.config.schema.run import Server
from sftcli.config.schema.settings import Settings
from sftcli.errors import Location, UsageError
from sftcli.events import EventSink, Warned
from sftcli.services.report.vllm_ranks import DEFAULT_RANK, RANKS, room_for

KEY = "run.served_by"
_ALL = frozenset(Server)
_OF_LLAMA_CPP = frozenset({Server.LLAMA_CPP, Server.OLLAMA})


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """An adapter that ``servers`` do not take: the words for it, the setting it comes from, and what to do instead."""

    what: str
    key: str
    way: str
    holds: Callable[[Settings], bool]
    servers: frozenset[Server] = _ALL


REFUSALS = (
    Refusal(
        what="adapters with the magnitudes of DoRA",
        key="adapter.kind",
        way="train LoRA: --adapter lora",
        holds=lambda settings: settings.adapter.kind is AdapterKind.DORA,
    ),
    Refusal(
        what="adapters with rows of new tokens",
        key="model.new_tokens",
        way="leave model.new_tokens out",
        holds=lambda settings: bool(settings.model.new_tokens),
    ),
    Refusal(
        what="adapters on experts that are stored in one tensor",
        key="adapter.experts",
        way="leave adapter.experts out",
        holds=lambda settings: settings.adapter.experts,
    ),
    Refusal(
        what=f"adapters of a rank above {RANKS[-1]}",
        key="adapter.rank",
        way=f"set --rank {RANKS[-1]} or less",
        holds=lambda settings: settings.adapter.rank > RANKS[-1],
        servers=frozenset({Server.VLLM}),
    ),
)

_MERGED = {
    Server.VLLM: "sft export --to hf",
    Server.LLAMA_CPP: "sft export --to gguf",
    Server.OLLAMA: "sft export --to ollama",
}


def require_served(settings: Settings) -> None:
    """Make sure that the server which ``settings`` name takes what they train, as far as they tell.

    Raises:
        UsageError: It refuses it.
    """
    server = settings.run.served_by
    if server is None or not settings.adapter.is_on:
        return
    for row in REFUSALS:
        if server in row.servers and row.holds(settings):
            raise UsageError(
                f"{server} takes no {row.what}, and {KEY} is {server}",
                hint=f"{row.way}; or merge the adapter when it is trained, {_MERGED[server]}, and leave --for out",
                location=Location(key=row.key),
            )


def require_served_model(settings: Settings, folder: Path, emit: EventSink) -> None:
    """Make sure that the server has the model in ``folder``; tell what it has to be started with.

    Raises:
        UsageError: It has no such model, or takes no such tokenizer.
        DataError: A file is damaged.
    """
    server, rank = settings.run.served_by, settings.adapter.rank
    if server is Server.VLLM:
        _require_vllm_class(folder)
        if settings.adapter.is_on and (room := room_for(rank)):
            emit(
                Warned(
                    text=f"vLLM takes adapters up to rank {DEFAULT_RANK} unless it is told otherwise, and this one has {rank}: "
                    f"start it with --max-lora-rank {room}"
                )
            )
    elif server in _OF_LLAMA_CPP:
        from sftcli.modeling.formats.gguf.gguf_families import check_family
        from sftcli.modeling.formats.gguf.gguf_tokenizer import check_tokenizer
        from sftcli.modeling.load import load_layout

        check_family(load_layout(folder))
        check_tokenizer(folder)


def _require_vllm_class(folder: Path) -> None:
    from sftcli.services.report.usage import is_of_vllm, kind_of

    if not is_of_vllm(kind := kind_of(folder)):
        raise UsageError(
            f"vllm has no model class {kind or 'of that kind'}, and {KEY} is vllm",
            hint="train another model, or leave --for out",
            location=Location(key=KEY),
        )
