"""The tokenizer of a GGUF file: tokens, merges, how text is cut into words, template and stop tokens."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf

from sftcli.errors import UsageError
from sftcli.json_files import read_json
from sftcli.modeling.formats.gguf.gguf_families import CONVERT_HINT
from sftcli.modeling.tokenizer.chat_tokenizer import HFChatTokenizer

_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SHORT_FORMS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)|"


def add_tokenizer(writer: gguf.GGUFWriter, tokenizer: HFChatTokenizer, source: Path, *, rows: int) -> None:
    """Write tokens, merges, template and stop tokens; ``rows`` may exceed the tokens, as in Qwen2."""
    content = read_json(source / "tokenizer.json")
    cutter = _word_cutter(content, source)
    ids: dict[str, int] = dict(content["model"]["vocab"])
    added = {token["content"]: token["id"] for token in content["added_tokens"]}
    ids |= added
    texts = {token: text for text, token in ids.items()}
    control = tokenizer.control_ids
    kinds = {
        token: gguf.TokenType.CONTROL if token in control else gguf.TokenType.USER_DEFINED
        for token in added.values()
    }
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(cutter)
    writer.add_token_list([texts.get(token, f"[PAD{token}]") for token in range(rows)])
    writer.add_token_types(
        [
            kinds.get(token, gguf.TokenType.NORMAL if token in texts else gguf.TokenType.UNUSED)
            for token in range(rows)
        ]
    )
    special = gguf.SpecialVocab(source, load_merges=True)
    writer.add_token_merges(special.merges)
    if special.chat_template is not None:
        writer.add_chat_template(special.chat_template)
    writer.add_add_bos_token(bool(tokenizer.text_prefix))
    for kind, add in (("bos", writer.add_bos_token_id), ("unk", writer.add_unk_token_id)):
        if (token := special.special_token_ids.get(kind)) is not None:
            add(token)
    writer.add_pad_token_id(tokenizer.pad_id)
    _add_stop_tokens(writer, tokenizer)


def check_tokenizer(source: Path) -> None:
    """Make sure that the tokenizer in the folder ``source`` can be written.

    Raises:
        UsageError: It cannot.
    """
    _word_cutter(read_json(source / "tokenizer.json"), source)


def _add_stop_tokens(writer: gguf.GGUFWriter, tokenizer: HFChatTokenizer) -> None:
    """Write the stop tokens: the format has three names for them, and readers stop at each."""
    first = tokenizer.eos_id if tokenizer.eos_id in tokenizer.stop_ids else min(tokenizer.stop_ids)
    writer.add_eos_token_id(first)
    for add, token in zip(
        (writer.add_eot_token_id, writer.add_eom_token_id), sorted(tokenizer.stop_ids - {first}), strict=False
    ):
        add(token)


def _is_byte_level(content: Mapping[str, object]) -> bool:
    model, decoder = content.get("model"), content.get("decoder")
    return (
        isinstance(model, dict)
        and model.get("type") == "BPE"
        and not model.get("byte_fallback")
        and isinstance(decoder, dict)
        and decoder.get("type") == "ByteLevel"
    )


def _word_cutter(content: Mapping[str, Any], source: Path) -> str:
    """Return the format's name of how the tokenizer cuts text into words.

    Raises:
        UsageError: It is of another kind, or there is none that is known here; another name would give other tokens without a
            word.
    """
    if not _is_byte_level(content) or not content["model"].get("vocab"):
        raise UsageError(
            f"the tokenizer in {source} is not a byte-level BPE, the only kind that can be written as GGUF here",
            hint=CONVERT_HINT,
        )
    outer = content.get("pre_tokenizer")
    steps = outer.get("pretokenizers", [outer]) if isinstance(outer, dict) else []
    found = tuple(_shown_step(step) for step in steps)
    ignores_merges = bool(content["model"].get("ignore_merges"))
    known = {
        (("words",), False): "gpt-2",
        (("digits", "words"), False): "smollm",
        ((_SHORT_FORMS + _WORDS % r"\p{N}", "bytes"), False): "qwen2",
        ((_SHORT_FORMS + _WORDS % r"\p{N}{1,3}", "bytes"), False): "dbrx",
        ((_SHORT_FORMS + _WORDS % r"\p{N}{1,3}", "bytes"), True): "llama-bpe",
    }
    if (found, ignores_merges) not in known:
        raise UsageError(
            f"the tokenizer in {source} uses a pre-tokenizer with no GGUF name known here",
            hint=CONVERT_HINT,
        )
    return known[found, ignores_merges]


def _shown_step(step: Mapping[str, object]) -> str:
    pattern = step.get("pattern")
    match step.get("type"):
        case "ByteLevel" if not step.get("add_prefix_space"):
            return "words" if step.get("use_regex", True) else "bytes"
        case "Digits" if step.get("individual_digits"):
            return "digits"
        case "Split" if (
            isinstance(pattern, dict) and step.get("behavior") == "Isolated" and not step.get("invert")
        ):
            return str(pattern.get("Regex"))
        case _:
            return "unknown"
