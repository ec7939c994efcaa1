"""How other programs open what was written: the part of a card that depends on the kind of its files."""

from dataclasses import dataclass
from pathlib import Path

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from sftcli.json_files import read_json
from sftcli.modeling.adapter.folder import CONFIG_FILE, is_adapter_folder
from sftcli.services.report.vllm_ranks import RANKS, room_for

_TEXT, _IMAGES = "text-generation", "image-text-to-text"
_TRANSFORMERS = """\
```python
from {library} import {opener}{tokenizer_import}
tokenizer = AutoTokenizer.from_pretrained("{place}")
model = {opener}.from_pretrained("{place}")
messages = [{{"role": "user", "content": "your prompt"}}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
answer = model.generate(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=256)
print(tokenizer.decode(answer[0][inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```
"""
_VLLM = "\nWith [vLLM](https://docs.vllm.ai):\n\n```sh\n{}\n```\n"
_AS_TRAINED = "\nThe chat template and the stop tokens in this folder are those that it was trained with.\n"
# What vLLM cannot add to a model that it serves.
_NOT_SERVED = ("use_dora", "modules_to_save", "trainable_token_indices", "target_parameters", "lora_bias")
_OF_IMAGES = "ForConditionalGeneration"


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """The head lines of a card that say of which kind the files are, and the text about opening them."""

    library: str  # "" where none opens them
    pipeline: str
    tags: tuple[str, ...]
    text: str


def usage_of_model(kind: str, place: str) -> Usage:
    """Return the usage of a model folder of the class ``kind`` at ``place``, a folder or a name on the hub."""
    is_of_images = kind.endswith(_OF_IMAGES)
    opener = "AutoModelForImageTextToText" if is_of_images else "AutoModelForCausalLM"
    text = _TRANSFORMERS.format(
        library="transformers", opener=opener, tokenizer_import=", AutoTokenizer\n", place=place
    )
    if is_of_vllm(kind):
        text += _VLLM.format(f"vllm serve {place}")
    return Usage(
        library="transformers",
        pipeline=_IMAGES if is_of_images else _TEXT,
        tags=(),
        text=text + _AS_TRAINED,
    )


def is_of_vllm(kind: str) -> bool:
    """Return whether vLLM may have the model class ``kind``: one that transformers has."""
    return kind.endswith(_OF_IMAGES) or kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()


def usage_of_adapter(folder: Path, place: str, base: str) -> Usage:
    """Return the usage of the adapter in ``folder``; ``base`` is its model's name on the hub, "" where it has none."""
    text = _TRANSFORMERS.format(
        library="peft",
        opener="AutoPeftModelForCausalLM",
        tokenizer_import="\nfrom transformers import AutoTokenizer\n",
        place=place,
    )
    config = read_json(folder / CONFIG_FILE)
    rank = config.get("r")
    if (
        base
        and isinstance(rank, int)
        and rank <= RANKS[-1]
        and not any(config.get(key) for key in _NOT_SERVED)
    ):
        room = f" --max-lora-rank {told}" if (told := room_for(rank)) else ""
        text += _VLLM.format(f"vllm serve {base} --enable-lora{room} --lora-modules tuned={place}")
    return Usage(
        library="peft",
        pipeline=_TEXT,
        tags=("lora",),
        text=text + _AS_TRAINED,
    )


def usage_of_gguf(file: str, place: str, *, is_on_hub: bool) -> Usage:
    """Return the usage of the GGUF file ``file`` beside a ``Modelfile`` in ``place``, a folder or a name on the hub."""
    name = place.rpartition("/")[2].lower()
    if is_on_hub:
        ollama, llama = f"ollama run hf.co/{place}", f"llama-cli -hf {place} -cnv"
    else:
        ollama, llama = f"ollama create {name} -f Modelfile\nollama run {name}", f"llama-cli -m {file} -cnv"
    return Usage(
        library="",
        pipeline=_TEXT,
        tags=("gguf",),
        text=f"With Ollama, in this folder:\n\n```sh\n{ollama}\n```\n\nWith llama.cpp:\n\n```sh\n{llama}\n```\n\n"
        "The file has the chat template and the stop tokens that it was trained with.\n",
    )


def usage_of_folder(folder: Path, place: str, base: str) -> Usage:
    """Return the usage of what lies in ``folder``, once it is on the hub as ``place``."""
    if is_adapter_folder(folder):
        return usage_of_adapter(folder, place, base)
    files = sorted(path.name for path in folder.glob("*.gguf"))
    if files:
        return usage_of_gguf(files[0], place, is_on_hub=True)
    return usage_of_model(kind_of(folder), place)


def kind_of(folder: Path) -> str:
    """Return the class that a model folder says it is of; "" where it does not say."""
    names = read_json(folder / "config.json").get("architectures")
    return str(names[0]) if isinstance(names, list) and names else ""
