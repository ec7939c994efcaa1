"""Adapters as plain peft leaves them, without a line of this package."""

import warnings
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from transformers import LlamaForCausalLM

IDS = torch.arange(3, 40)[None]


def foreign_adapter(base: Path, folder: Path, **settings: object) -> Path:
    """Write an adapter of random numbers for ``base``, and the logits that its model gives for ``IDS``."""
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")  # peft asks transformers for names that are going away
        torch.manual_seed(5)
        config = LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **settings)
        model = get_peft_model(LlamaForCausalLM.from_pretrained(base), config)
        for name, parameter in model.named_parameters():
            if "lora_magnitude" in name or "modules_to_save" in name:
                parameter.data += 0.1 * torch.randn_like(parameter)
        model.save_pretrained(folder, save_embedding_layers=False)
    save_file({"logits": _logits(model)}, folder / "expected")
    return folder


def logits_by_peft(base: Path, folder: Path) -> torch.Tensor:
    """Return the logits for ``IDS`` of an adapter's folder that plain peft opens."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _logits(PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), folder))


def _logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits
