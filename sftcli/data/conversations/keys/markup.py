"""Running text that is none: a conversation in the notation of a template, or text with control tokens of the model."""

import re
from collections.abc import Callable

from sftcli.data.conversations.keys.meaning import TREE, Unread, UnreadError

_ALLOW = "--set data.allow_control_text=true"

# What begins a turn in the templates of many models, and the pairs of headings of older ones.
_MARKUP = re.compile(
    r"<\|(?:im_start|start_header_id|header_start|start_of_role|turn|START_OF_TURN_TOKEN)\|?>"
    r"|<start_of_turn>|<[|\uff5c](?:system|user|assistant)[|\uff5c]>|\[INST\]"
    r"|(?i:### ?(?:Instruction|Human|User):(?=[\s\S]*### ?(?:Response|Assistant|Answer):))"
    r"|(?:\A|\n)Human:(?=[\s\S]*\n+Assistant:)"
)


def check_text(text: str, find_control: Callable[[str], str]) -> None:
    """See that running text is no conversation in the notation of a template, and holds no control token.

    Args:
        text: A row of running text.
        find_control: Returns the first control token of the model whose text stands in another text, else nothing.

    Raises:
        UnreadError: It does.
    """
    markup = _MARKUP.search(text)
    if markup:
        what = f"the text holds chat markup ({markup.group()!r}): all of it would be trained, what the user says too"
    elif control := find_control(text):
        what = f"the text holds the control token {control!r}, which would be trained as letters"
    else:
        return
    raise UnreadError([Unread(what, TREE.remedy if markup else "take it out of the text", flag=_ALLOW)])
