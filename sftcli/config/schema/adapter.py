"""The settings of an adapter: a few weights that are trained beside a model that stays as it is."""

from enum import StrEnum
from typing import Self

from pydantic import Field, model_validator

from sftcli.config.schema.section import Section, Text

AUTO_TARGETS = "auto"
ADAPTER_LEARNING_RATE = 2e-4
"""Peak learning rate of adapters where nobody chose one: they start at zero and need more than whole models do."""


class AdapterKind(StrEnum):
    """What is trained beside the model."""

    NONE = "none"
    LORA = "lora"
    DORA = "dora"


class Quantize(StrEnum):
    """How the model below an adapter is kept in memory. All but ``none`` need bitsandbytes and a CUDA device."""

    NONE = "none"
    FOUR_BIT = "4bit"

    @property
    def described(self) -> str:
        """The form as a person says it, such as ``4-bit``."""
        return self.value.replace("bit", "-bit")


class AdapterSettings(Section):
    """Whether to train an adapter instead of the full model, and its shape."""

    kind: AdapterKind = Field(
        AdapterKind.NONE,
        description="none trains the full model; lora (Hu et al. 2021) and dora (Liu et al. 2024) train an adapter.",
    )
    rank: int = Field(16, ge=1, le=4096, description="Rank of the adapter matrices.")
    alpha: int = Field(32, ge=1, description="The adapter's output is scaled by `alpha / rank`.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the adapter's input.")
    target_modules: tuple[Text, ...] = Field(
        (AUTO_TARGETS,),
        min_length=1,
        examples=["q_proj"],
        description="Names of the linear layers that get an adapter; auto means all but the output head and routers of experts.",
    )
    experts: bool = Field(
        False, description="Experts that are stored in one tensor get an adapter each as well."
    )
    start_from: Text | None = Field(
        None,
        description="Folder of an adapter to train on; `--model FOLDER` sets it, its base and its shape.",
    )
    rslora: bool = Field(
        False, description="Rank-stabilized LoRA: scale by `alpha / sqrt(rank)` (Kalajdzievski 2023)."
    )
    quantize: Quantize = Field(
        Quantize.NONE,
        description="4bit keeps the base model in NF4 (QLoRA, Dettmers et al. 2023); CUDA only.",
    )

    @property
    def is_on(self) -> bool:
        """Whether an adapter is trained."""
        return self.kind is not AdapterKind.NONE

    def described(self) -> str:
        """Return kind and shape in a few words."""
        name = {AdapterKind.NONE: "none", AdapterKind.LORA: "LoRA", AdapterKind.DORA: "DoRA"}[self.kind]
        parts = [f"rank {self.rank}, alpha {self.alpha}"]
        parts += [f"dropout {self.dropout:g}"] if self.dropout else []
        parts += ["scaled by the root of the rank"] if self.rslora else []
        parts += [] if self.quantize is Quantize.NONE else [f"on a {self.quantize.described} base"]
        return f"{name} of {', '.join(parts)}, on {', '.join(self.target_modules)}{' and experts' if self.experts else ''}"

    @model_validator(mode="after")
    def _experts_have_plain_lora(self) -> Self:
        if not self.experts or not self.is_on:
            return self
        if self.kind is AdapterKind.DORA:
            raise ValueError("experts is set, but kind is dora: experts have LoRA alone (peft)")
        if self.dropout:
            raise ValueError("experts is set, but so is dropout: experts have none (peft)")
        if self.quantize is not Quantize.NONE:
            raise ValueError(
                f"experts is set, but quantize is {self.quantize}: experts in one tensor are not kept in that form"
            )
        return self

    @model_validator(mode="after")
    def _shape_belongs_to_an_adapter(self) -> Self:
        changed = [
            name for name, field in type(self).model_fields.items() if getattr(self, name) != field.default
        ]
        if changed and not self.is_on:
            raise ValueError(
                f"{changed[0]} is set, but kind is none: there is no adapter; set kind to lora (--lora)"
            )
        return self
