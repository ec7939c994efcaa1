"""A byte-level BPE tokenizer of about 512 tokens, trained in a fraction of a second on sentences of our own."""

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

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


def build_tiny_tokenizer(
    folder: Path,
    *,
    template: str | None = CHATML,
    eos_token: str = "<|im_end|>",
    pad_token: str | None = "<|im_end|>",
    extra_special: tuple[str, ...] = (),
) -> Path:
    """Write tokenizer.json, tokenizer_config.json, generation_config.json and the template to ``folder``.

    By default padding is the stop token, as in SmolLM2. Token ids: ``<|endoftext|>`` 0, ``<|im_start|>`` 1,
    ``<|im_end|>`` 2; ``<think>`` and ``</think>`` are added tokens that are not special.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=[*SPECIAL_TOKENS, *extra_special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_SENTENCES * 3, trainer)
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in PLAIN_ADDED_TOKENS])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|im_start|>",
        "eos_token": eos_token,
        "pad_token": pad_token,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 2048,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    stop_id = tokenizer.token_to_id(eos_token)
    generation = {"bos_token_id": 1, "eos_token_id": stop_id, "pad_token_id": stop_id}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2), encoding="utf-8")
    if template is not None:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    return folder
