"""Writes the page of model families, `docs/models.md`, from the results of the matrix.

python -m tests.models.page DIR/results > docs/models.md
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.models.families import FAMILIES, TOWERS
from tests.models.matrix import EXPERT_COLUMNS

Cells = dict[str, str]
# What people call the models of a family, where that is not the family's own name.
KNOWN_AS = {
    "llama": "Llama 2, SmolLM2, Yi", "llama_rope3": "Llama 3.1 to 3.3", "llama4_text": "text part of Llama 4",
    "mistral": "Mistral 7B v0.3, Nemo, Small", "mistral_swa": "Mistral 7B v0.1", "ministral3": "Ministral 3",
    "ministral": "Ministral 8B", "mixtral": "Mixtral 8x7B", "qwen2": "Qwen 2, 2.5, QwQ", "qwen3": "Qwen 3",
    "qwen2_moe": "Qwen 1.5 MoE", "qwen3_moe": "Qwen 3 30B-A3B, Coder", "qwen3_next": "Qwen 3 Next",
    "qwen3_5_text": "text part of Qwen 3.5", "qwen3_5_moe_text": "text part of Qwen 3.5 MoE", "gemma3_text": "Gemma 3 1B",
    "gemma3n_text": "text part of Gemma 3n", "gemma4_text": "text part of Gemma 4", "phi": "Phi 1.5, 2",
    "phi3": "Phi 3, 3.5, 4", "phimoe": "Phi 3.5 MoE", "granitemoehybrid": "Granite 4", "granite": "Granite 3",
    "granitemoehybrid_dense": "Granite 4 Micro", "gpt_oss": "gpt-oss 20b, 120b", "deepseek_v3": "DeepSeek V3, R1, Kimi K2",
    "deepseek_v32": "DeepSeek V3.2", "glm4_moe": "GLM 4.5 to 4.7", "glm4_moe_lite": "GLM 4.7 Flash", "glm_moe_dsa": "GLM 5",
    "lfm2": "LFM2", "lfm2_moe": "LFM2 8B-A1B", "smollm3": "SmolLM3", "nemotron_h": "Nemotron Nano 2, Nemotron 3",
    "falcon_h1": "Falcon H1", "falcon": "Falcon 40B", "falcon7b": "Falcon 7B", "seed_oss": "Seed-OSS", "exaone4": "EXAONE 4",
    "cohere": "Command R", "cohere2": "Command R7B, Command A", "olmo2": "OLMo 2", "olmo3": "OLMo 3", "ernie4_5": "ERNIE 4.5",
    "ernie4_5_moe": "ERNIE 4.5 MoE", "hunyuan_v1_dense": "Hunyuan", "hunyuan_v1_moe": "Hunyuan A13B", "gpt_neox": "Pythia",
    "minimax": "MiniMax 01, M1", "minimax_m2": "MiniMax M2", "mimo_v2_flash": "MiMo V2 Flash", "vlm_gemma3": "Gemma 3 4B to 27B",
    "vlm_gemma4": "Gemma 4", "vlm_qwen3_5": "Qwen 3.5", "vlm_qwen3_5_moe": "Qwen 3.5 MoE", "vlm_qwen3_vl": "Qwen 3 VL",
    "vlm_qwen2_5_vl": "Qwen 2.5 VL", "vlm_mistral3": "Mistral Small 3.1", "vlm_llama4": "Llama 4", "vlm_mllama": "Llama 3.2 Vision",
}  # fmt: skip
PARTS = {
    "trains like transformers": ("train", "auto = off", "= transformers"),
    "packed": ("packing",),
    "LoRA, merged": ("LoRA", "merged answers", "peft opens"),
    "LoRA on experts": EXPERT_COLUMNS,
    "answers": ("answers",),
    "checkpoints": ("checkpoint", "verify", "stopped"),
    "final folder": ("names",),
}


def main() -> int:
    """Print the page."""
    results = {path.stem: json.loads(path.read_text("utf-8")) for path in Path(sys.argv[1]).glob("*.json")}
    found = {name: results[name] for name in (*FAMILIES, *TOWERS) if name in results}
    print("\n".join(page(found)))
    return 0


def page(found: dict[str, Cells]) -> Iterator[str]:
    """Yield the lines of the page."""
    trained = [name for name, cells in found.items() if cells["train"] == "ok"]
    adapted = [name for name in trained if told(found[name], PARTS["LoRA, merged"]) == "yes"]
    answering = [name for name in trained if told(found[name], PARTS["answers"]) == "yes"]
    yield "# Model families\n"
    yield (
        f"`make models` builds {len(found)} tiny random models, one or more of each family that `transformers` knows, and tries "
        "everything on each. This page is what it found. Losses and gradients of three steps are compared with those of a plain loop "
        "in `torch` that takes each row alone, answers with those of `transformers`, tensors with those of the source.\n"
    )
    yield (
        f"{len(trained)} train; {len(adapted)} of these also with LoRA, merged and read back by `peft`; {len(answering)} answer as "
        "`transformers` does. A model not listed is tried the same way before its first step: speedups that do not agree with the "
        "model's own forward pass are dropped.\n"
    )
    yield "`yes` means right to 1e-4. Not packed means that each row of a batch stands alone: right, and slower for short rows.\n"
    yield f"| family | models | {' | '.join(PARTS)} |"
    yield f"|---|---|{'---|' * len(PARTS)}"
    reasons: dict[str, list[str]] = {}
    for name, cells in found.items():
        columns = [told(cells, part) for part in PARTS.values()]
        for cell in columns:
            if cell not in ("yes", "no", ""):
                reasons.setdefault(cell, []).append(name)
        shown = [
            cell if cell in ("yes", "no", "") else f"no ({list(reasons).index(cell) + 1})" for cell in columns
        ]
        yield f"| {name} | {KNOWN_AS.get(name, '')} | {' | '.join(shown)} |"
    if reasons:
        yield "\n## What is refused, and why\n"
        yield from (
            f"{number}. {reason}: {', '.join(names)}"
            for number, (reason, names) in enumerate(reasons.items(), 1)
        )


def told(cells: Cells, columns: tuple[str, ...]) -> str:
    """Return what a person needs to know of some cells: yes, no, nothing where none was tried, or what went wrong."""
    values = [cells[column] for column in columns if cells.get(column)]
    if not values:
        return ""
    for value in values:
        if value.startswith("refused: "):
            return value.removeprefix("refused: ")
        if "**" in value:
            return value.replace("*", "")
    return "no" if values[0].startswith("not packed") else "yes"


if __name__ == "__main__":
    sys.exit(main())
