"""Short ways to write conversations, and to read what became of them."""

import functools
import tempfile
from pathlib import Path
from typing import Any

from sftcli.data.conversations.messages import Conversation, Message
from sftcli.data.example import Example
from sftcli.data.reading.record import Origin
from sftcli.data.rendering.render import Renderer
from sftcli.data.rendering.token_view import describe_tokens
from sftcli.modeling.tokenizer.chat_tokenizer import HFChatTokenizer, load_chat_tokenizer
from tests.support.tiny_tokenizer import (
    build_family_tokenizer,
    build_metaspace_tokenizer,
    build_tiny_tokenizer,
)

ORIGIN = Origin(path="rows.jsonl", line=7)


def system(content: str) -> Message:
    return Message(role="system", content=content)


def user(content: str) -> Message:
    return Message(role="user", content=content)


def answer(content: str, *, trained: bool = True, tool_calls: str = "", thinking: str = "") -> Message:
    return Message(
        role="assistant", content=content, trained=trained, tool_calls=tool_calls, thinking=thinking
    )


def tool(content: str) -> Message:
    return Message(role="tool", content=content)


def rendered(tokenizer: HFChatTokenizer, row: Conversation, **options: Any) -> list[Example]:
    """Return the examples of a row, all of which are kept."""
    results = Renderer(tokenizer, max_tokens=9999, **options).render_batch([row]).results
    assert all(isinstance(result, Example) for result in results), results
    return [result for result in results if isinstance(result, Example)]


def conversation(*messages: Message, tools: str = "") -> Conversation:
    return Conversation(messages=messages, origin=ORIGIN, tools=tools)


@functools.cache
def family_tokenizer(name: str) -> HFChatTokenizer:
    """Return the tokenizer of a family, or of a built-in template for a tokenizer without one."""
    folder = Path(tempfile.mkdtemp())
    if name in ("alpaca", "modern-llm"):
        build_tiny_tokenizer(folder, template=None, bos_token="<|endoftext|>", eos_token="<|endoftext|>")
        tokenizer = load_chat_tokenizer(folder, template=name)
    elif name.startswith("metaspace-"):
        tokenizer = load_chat_tokenizer(build_metaspace_tokenizer(folder, name.removeprefix("metaspace-")))
    else:
        tokenizer = load_chat_tokenizer(build_family_tokenizer(folder, name))
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()
    return tokenizer


def marked(example: Example, tokenizer: HFChatTokenizer) -> str:
    """Return the row's text with its trained tokens in ⟦ ⟧."""
    text = "".join(
        f"⟦{view.text}⟧" if view.trained else view.text for view in describe_tokens(example, tokenizer)
    )
    return text.replace("⟧⟦", "")


def trained_texts(example: Example, tokenizer: HFChatTokenizer) -> list[str]:
    """Return the text of each run of trained tokens."""
    return [part.split("⟧")[0] for part in marked(example, tokenizer).split("⟦")[1:]]
