"""Tokenizers of about 512 tokens, trained in a fraction of a second on sentences of our own."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

TEMPLATES = Path(__file__).parent / "templates"
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content']"
    " + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
PLAIN_ADDED_TOKENS = ("<think>", "</think>")
_SENTENCES = (
    "The ferry leaves the harbour at seven and returns before the evening bell.",
    "Please write a short answer to the question and give one reason for it.",
    "A system message tells the assistant how to speak with the user.",
    "Response: the list holds three names, and the longest name comes first.",
    "Instruction: sort the numbers 12, 7, 30 and 45 from small to large.",
    "Below is an input that describes a task; the output completes the request.",
    "She asked for two cups of coffee, one with milk and one without.",
    "def add(a, b):\n    return a + b\n\nprint(add(1, 2))\n",
    "Grüße aus Köln, un café à Paris, 東京の駅で会いましょう。",
)


@dataclass(frozen=True)
class Family:
    """A template in the manner of a family of models, and the tokens that go with it."""

    bos_token: str
    eos_token: str
    special: tuple[str, ...]
    stop_token: str  # that the generation settings name


FAMILIES = {
    "chatml": Family("<|im_start|>", "<|im_end|>", (), "<|im_end|>"),
    "llama3": Family(
        "<|begin|>",
        "<|eot_id|>",
        ("<|begin|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "<|eot_id|>",
    ),
    "mistral": Family("<s>", "</s>", ("<s>", "</s>", "[INST]", "[/INST]"), "</s>"),
    "gemma": Family(
        "<bos>", "<eos>", ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"), "<end_of_turn>"
    ),
    "qwen3": Family("<|endoftext|>", "<|im_end|>", (), "<|im_end|>"),
}


def build_tiny_tokenizer(
    folder: Path,
    *,
    template: str | None = CHATML,
    bos_token: str = "<|im_start|>",
    eos_token: str = "<|im_end|>",
    pad_token: str | None = "<|im_end|>",
    stop_token: str | None = None,
    extra_special: tuple[str, ...] = (),
    swallowing: tuple[str, ...] = (),
) -> Path:
    """Write tokenizer.json, tokenizer_config.json, generation_config.json and the template to ``folder``.

    By default padding is the stop token, as in SmolLM2. Token ids: ``<|endoftext|>`` 0, ``<|im_start|>`` 1,
    ``<|im_end|>`` 2; ``<think>`` and ``</think>`` are added tokens that are not special.
    The tokens of ``swallowing`` take the white space behind them.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=[
            AddedToken(text, normalized=False, special=True, rstrip=text in swallowing)
            for text in (*SPECIAL_TOKENS, *extra_special)
        ],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_SENTENCES * 3, trainer)
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in PLAIN_ADDED_TOKENS])
    named = {"bos_token": bos_token, "eos_token": eos_token, "pad_token": pad_token}
    return save_tokenizer(
        folder, tokenizer, named=named, stop_token=stop_token or eos_token, template=template
    )


def build_family_tokenizer(folder: Path, name: str) -> Path:
    """Write a byte-level tokenizer with the template and the tokens of one of ``FAMILIES``."""
    family = FAMILIES[name]
    return build_tiny_tokenizer(
        folder,
        template=(TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8"),
        bos_token=family.bos_token,
        eos_token=family.eos_token,
        pad_token=family.eos_token,
        stop_token=family.stop_token,
        extra_special=family.special,
    )


def build_metaspace_tokenizer(folder: Path, scheme: Literal["never", "first", "always", "prepend"]) -> Path:
    """Write a tokenizer in the manner of sentencepiece: spaces are a letter, unknown letters fall back to bytes.

    ``scheme`` says when a space is put in front of text; ``prepend`` does it by a normalizer, as Llama-2 has it.
    """
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    if scheme == "prepend":
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
        )
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            *([decoders.Strip(" ", 1, 0)] if scheme != "never" else []),
        ]
    )
    bytes_ = [f"<0x{value:02X}>" for value in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=640, special_tokens=["<unk>", "<s>", "</s>", *bytes_], show_progress=False
    )
    tokenizer.train_from_iterator(" ".join(_SENTENCES).replace("\n", " ").split(". "), trainer)
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] not in bytes_]
    tokenizer = Tokenizer.from_str(json.dumps(content))
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    template = (TEMPLATES / "llama2.jinja").read_text(encoding="utf-8")
    return save_tokenizer(folder, tokenizer, named=named, stop_token="</s>", template=template)


def save_tokenizer(
    folder: Path, tokenizer: Tokenizer, *, named: dict[str, str | None], stop_token: str, template: str | None
) -> Path:
    """Write the files of a tokenizer folder."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **named,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 2048,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    stop_id = tokenizer.token_to_id(stop_token)
    generation = {"eos_token_id": stop_id, "pad_token_id": stop_id}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2), encoding="utf-8")
    if template is not None:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    return folder
