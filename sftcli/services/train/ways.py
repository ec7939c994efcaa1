"""What other ways of training would need: from what one was measured to need, and what the others hold more or less of."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from sftcli.config.schema.adapter import Quantize
from sftcli.config.schema.settings import Settings
from sftcli.config.schema.training import OPTIMIZERS, Checkpointing, OptimizerName

_FLOAT = 4
_FOUR_BITS = 0.55  # bytes a weight, with scales


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """A way of training with the rows and micro-batches of the plan.

    ``settings`` are those that ask for it. ``fits`` is None where the memory is not known. All but the one that
    ``is_measured`` are predictions.
    """

    name: str
    settings: Sequence[str]
    checkpointing: bool
    peak_bytes: int
    fits: bool | None
    is_measured: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Numbers of a model and bytes of a pass, of which the needs follow; ``itemsize`` is that of products."""

    trained: int  # weights that train without an adapter
    total: int  # weights of the model
    embeddings: int  # that stay as they are where others are packed in 4 bits
    adapter: int  # weights of an adapter
    itemsize: int
    is_bf16: bool
    pass_bytes: int  # activations of the longest pass without checkpointing; 0 where they are not known
    inputs_bytes: int  # with it; 0 where the model does not know it
    copies: bool  # whether a copy of what trains and of its state is in the same memory while it is saved


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """What decides over the need of a way."""

    optimizer: OptimizerName
    has_adapter: bool = False
    in_four_bits: bool = False
    releases: bool = False
    checkpointing: Checkpointing = Checkpointing.OFF

    def bytes(self, sizes: Sizes) -> float:
        """Return what it holds, all else left out."""
        facts = OPTIMIZERS[self.optimizer]
        numbers = sizes.adapter if self.has_adapter else sizes.trained
        rounded = sizes.itemsize if sizes.itemsize < _FLOAT else 0
        if facts.splits_masters and sizes.is_bf16 and not self.has_adapter:
            rounded = 0  # a part of the masters
        state = _FLOAT * facts.state_share * numbers
        held = (_FLOAT + rounded) * numbers + self._frozen(sizes) + state
        held += 0 if self.releases else _FLOAT * numbers
        held += _FLOAT * numbers + state if sizes.copies else 0
        return held + (sizes.inputs_bytes if self.checkpointing.is_on else sizes.pass_bytes)

    def _frozen(self, sizes: Sizes) -> float:
        frozen = sizes.total if self.has_adapter else sizes.total - sizes.trained
        if not self.in_four_bits:
            return sizes.itemsize * frozen
        kept = min(sizes.embeddings, frozen)
        return _FOUR_BITS * (frozen - kept) + sizes.itemsize * kept

    @property
    def name(self) -> str:
        """What it is called in a table; checkpointing is a column there."""
        if self.has_adapter:
            return "adapter, 4-bit model" if self.in_four_bits else "adapter"
        return f"{self.optimizer}, released" if self.releases else str(self.optimizer)

    @property
    def settings(self) -> list[str]:
        """The settings that ask for it."""
        found = [f"training.optimizer={self.optimizer}"]
        if self.has_adapter:
            found.append("adapter.kind=lora")
        if self.in_four_bits:
            found.append("adapter.quantize=4bit")
        if self.releases:
            found.append("training.release_gradients=true")
        if self.checkpointing.is_on:
            found.append(f"training.gradient_checkpointing={self.checkpointing}")
        return found


def ways_beside(
    settings: Settings, sizes: Sizes, *, peak: int, memory: int, has_cuda: bool, has_one_pass: bool
) -> list[Way]:
    """Return the way of ``settings``, which was measured to need ``peak``, and others, each without checkpointing and with it.

    Args:
        settings: Those that were measured.
        sizes: Of the model and of its longest pass.
        peak: In bytes.
        memory: That there is; 0 where it is not known.
        has_cuda: Whether ways that need CUDA can be taken.
        has_one_pass: Whether steps are one micro-batch, as those must be whose gradients are freed in the pass.
    """
    chosen = _kind_of(settings)
    kinds = list(_kinds(settings, has_cuda=has_cuda, has_one_pass=has_one_pass))
    if not any(_is_beside(kind, chosen) for kind in kinds):
        kinds.insert(0, replace(chosen, checkpointing=Checkpointing.OFF))
    found = []
    for kind in kinds:
        for how in _checkpointings(chosen, sizes):
            one = replace(kind, checkpointing=how)
            need = round(peak + one.bytes(sizes) - chosen.bytes(sizes))
            found.append(
                Way(
                    name=one.name,
                    settings=one.settings,
                    checkpointing=how.is_on,
                    peak_bytes=need,
                    fits=need <= memory if memory else None,
                    is_measured=one == chosen,
                )
            )
    return found


def _kind_of(settings: Settings) -> Kind:
    training = settings.training
    return Kind(
        optimizer=training.optimizer,
        has_adapter=settings.adapter.is_on,
        in_four_bits=settings.adapter.quantize is not Quantize.NONE,
        releases=training.release_gradients,
        checkpointing=training.gradient_checkpointing,
    )


def _kinds(settings: Settings, *, has_cuda: bool, has_one_pass: bool) -> Iterator[Kind]:
    for optimizer, facts in OPTIMIZERS.items():
        if facts.needs_cuda and not has_cuda:
            continue
        yield Kind(optimizer=optimizer)
        if facts.splits_masters and has_one_pass:
            yield Kind(optimizer=optimizer, releases=True)
    optimizer = settings.training.optimizer if settings.adapter.is_on else OptimizerName.ADAMW
    yield Kind(optimizer=optimizer, has_adapter=True)
    if has_cuda:
        yield Kind(optimizer=optimizer, has_adapter=True, in_four_bits=True)


def _is_beside(kind: Kind, chosen: Kind) -> bool:
    """Return whether both are alike but for checkpointing."""
    return replace(kind, checkpointing=chosen.checkpointing) == chosen


def _checkpointings(chosen: Kind, sizes: Sizes) -> list[Checkpointing]:
    """Return the ways of checkpointing that can be told: of a pass that was measured with one, the other is not known."""
    if chosen.checkpointing.is_on:
        return [chosen.checkpointing]
    return [Checkpointing.OFF, *([Checkpointing.LAYERS] if sizes.inputs_bytes else [])]
