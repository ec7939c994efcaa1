"""What to do about rows that are rejected: one sentence for each reason, and better ones where a fault knows more.

Errors end in them, and the table in ``docs/prepare.md`` repeats those of the reasons.
"""

from collections.abc import Mapping, Sequence

from sftcli.data.conversations.messages import Rejected, RejectReason

REMEDIES: Mapping[RejectReason, str] = {
    RejectReason.EMPTY_ANSWER: "fill these answers in, or leave the rows out of the file",
    RejectReason.EMPTY_PROMPT: "fill these prompts in, or leave the rows out of the file",
    RejectReason.EMPTY_TEXT: "fill these texts in, or leave the rows out of the file",
    RejectReason.MISSING_FIELD: "fill it in, or leave these rows out of the file",
    RejectReason.WRONG_TYPE: "put a text there, or leave these rows out of the file",
    RejectReason.UNKNOWN_ROLE: "rename the role in these rows",
    RejectReason.ROLE_ORDER: "put the turns of these rows in order: the system first, then the user, and an answer at the end",
    RejectReason.NOTHING_TRAINED: "mark an answer of these rows as one that is trained, or leave the rows out of the file",
    RejectReason.LABELED_BAD: "nothing: they are no answers to learn from; where the label is a class, train them: --ignore label",
    RejectReason.TOO_LONG: "raise --max-tokens, or cut such rows with --overlong truncate",
    RejectReason.TEMPLATE_REFUSED: "change these rows as the template's words say, or choose another --template",
    RejectReason.TEMPLATE_DROPS: "choose a --template that shows it, or take it out of these rows",
    RejectReason.TEMPLATE_REWRITES: "choose a --template that writes contents as they are",
    RejectReason.SPAN_UNPROVABLE: "choose a --template that asks for an answer as it shows one",
    RejectReason.NO_STOP_TOKEN: "choose a --template that ends an answer in a stop token",
    RejectReason.CONTROL_TOKEN: "rename it in these rows",
}

OTHER_COLUMNS = "fix these rows, or choose other columns with --map"
FIRST_TURN = "keep the turn that comes before the first question in the context: --first-turn untrained; or train it: --first-turn trained"
NO_SYSTEM = (
    "the template takes no system text: put it in front of the first user text, or choose another --template"
)
SURROGATE = "mend the text of these rows: half of a pair of surrogates is no character"


def remedy_of(rejected: Rejected) -> str:
    """Return what to do about a row: what is known of it, else what its reason has."""
    if rejected.remedy:
        return rejected.remedy
    is_of_column = rejected.detail.startswith(
        ('"', "there is no column")
    )  # a fault inside a turn names the turn first
    if rejected.reason in (RejectReason.MISSING_FIELD, RejectReason.WRONG_TYPE) and is_of_column:
        return OTHER_COLUMNS
    return REMEDIES[rejected.reason]


def with_flags(words: Sequence[str], flags: Sequence[str]) -> str:
    """Return what to do in ``words`` with the ``flags`` that do it."""
    return f"{' and '.join(words)}: {' '.join(flags)}"


def name_stop_token(text: str, token: int) -> str:
    """Return what makes generation stop at a token."""
    return (
        f"if {text!r} ends an answer, add its id {token} to eos_token_id in the model's generation_config.json; "
        "else choose another --template"
    )
