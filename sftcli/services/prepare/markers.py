"""Whether the control tokens that a chat template writes are tokens of the tokenizer, or fall into ordinary pieces.

A template of another family writes ``<|im_start|>`` where the tokenizer has no such token. A model can learn the pieces, and some
were trained on them by their own template, so that is told. Where the pieces are what ends an answer, nothing would stop it.
"""

import json

from sftcli.errors import SftError, UsageError
from sftcli.events import EventSink, Notice, Warned
from sftcli.modeling.tokenizer.chat_tokenizer import OWN_TEMPLATE, HFChatTokenizer
from sftcli.modeling.tokenizer.special_tokens import MARKER

_CONTENT = "qzx"
_ANSWERED = ("user", "assistant")
_CONVERSATIONS = (_ANSWERED, ("system", *_ANSWERED), (*_ANSWERED, *_ANSWERED))


def check_markers(tokenizer: HFChatTokenizer, emit: EventSink) -> None:
    """Compare what the template of ``tokenizer`` writes around contents with its tokens.

    Raises:
        UsageError: What ends an answer falls into pieces, and no stop token follows.
    """
    texts = [text for roles in _CONVERSATIONS if (text := _rendered(tokenizer, roles))]
    markers = dict.fromkeys(marker for text in texts for marker in MARKER.findall(text))
    pieces = {marker: len(_ids(tokenizer, marker)) for marker in markers}
    broken = {marker: count for marker, count in pieces.items() if count > 1}
    if not broken:
        return
    is_own = tokenizer.template_name == OWN_TEMPLATE
    name = "the model's chat template" if is_own else f"the template {tokenizer.template_name}"
    ways = f"add them: --set model.new_tokens='{json.dumps([*broken], ensure_ascii=False)}'; or choose another --template"
    tail = texts[0].rpartition(_CONTENT)[2].lstrip()
    end = next((marker for marker in broken if tail.startswith(marker)), None)
    if end is not None and tokenizer.stop_ids.isdisjoint(_ids(tokenizer, tail)):
        raise UsageError(
            f"{name} ends an answer with {end}, which is no token of this tokenizer: it falls into {broken[end]} ordinary "
            "tokens, and generation would not stop there",
            hint=ways,
        )
    shown = ", ".join(f"{marker} ({count} tokens)" for marker, count in broken.items())
    if is_own:
        emit(Notice(text=f"{name} writes control tokens as ordinary text: {shown}"))
    else:
        emit(
            Warned(
                text=f"{name} writes control tokens that this tokenizer lacks and reads as ordinary text: {shown}; {ways}"
            )
        )


def _rendered(tokenizer: HFChatTokenizer, roles: tuple[str, ...]) -> str:
    messages = [{"role": role, "content": _CONTENT} for role in roles]
    try:
        return tokenizer.render(messages, tools=None, add_generation_prompt=False)
    except SftError:
        return ""  # rows that a template refuses are rejected in its words


def _ids(tokenizer: HFChatTokenizer, text: str) -> list[int]:
    return tokenizer.encode_many([text], reading="template", continued=True)[0]
