"""An example as a person can read it: its tokens as text, with what each of them is for."""

from dataclasses import dataclass

from sftcli.data.example import Example
from sftcli.data.rendering.tokenizer import ChatTokenizer

MAX_GROUP_TOKENS = 32  # a token may end one character and begin the next, so that a group goes on
_BROKEN = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenView:
    """A token, or the few tokens that a character, or characters with a token in common, are made of.

    ``is_control`` is true for control and markup tokens, ``is_stop`` for a trained token at which generation stops.
    """

    text: str
    ids: tuple[int, ...]
    trained: bool
    is_control: bool
    is_stop: bool


def describe_tokens(example: Example, tokenizer: ChatTokenizer) -> list[TokenView]:
    """Return the tokens of ``example`` in order; joined, their texts are the row's text."""
    ids: list[int] = example.input_ids.tolist()
    trained: list[bool] = example.loss_mask.tolist()
    texts = tokenizer.decode_many([[token] for token in ids])
    views, begin = [], 0
    while begin < len(ids):
        end, text = begin + 1, texts[begin]
        while _BROKEN in text and _may_grow(begin, end, trained):
            (longer,) = tokenizer.decode_many([ids[begin : end + 1]])
            end, text = end + 1, longer
        group = tuple(ids[begin:end])
        views.append(
            TokenView(
                text=text,
                ids=group,
                trained=trained[begin],
                is_control=not tokenizer.control_ids.union(tokenizer.markup_ids).isdisjoint(group),
                is_stop=trained[begin] and group[-1] in tokenizer.stop_ids,
            )
        )
        begin = end
    return views


def _may_grow(begin: int, end: int, trained: list[bool]) -> bool:
    """Return whether the tokens from ``begin`` may take one more: few enough, and with loss alike."""
    return end < len(trained) and end - begin < MAX_GROUP_TOKENS and trained[end] == trained[begin]
