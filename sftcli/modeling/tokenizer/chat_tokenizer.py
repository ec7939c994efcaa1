"""A model's tokenizer and chat template, without torch and without transformers.

Three readings of a text, of which only the first lets it name control tokens:

- ``template``: as the tokenizer reads any text. For text that a template wrote.
- ``answer``: control tokens stay text; markup such as ``<think>``, which models write themselves, becomes its token.
- ``text``: both stay text. For what users, systems and tools say.
"""

import functools
import hashlib
import json
import threading
import unicodedata
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Literal

from tokenizers import Tokenizer

from sftcli.errors import DataError, UsageError
from sftcli.foreign import AGAIN, foreign_file, without_panics
from sftcli.input_files import read_whole_text
from sftcli.modeling.tokenizer.builtin_templates import BUILTIN_TEMPLATES, STOP_TOKENS
from sftcli.modeling.tokenizer.files import (
    DEFAULT_TEMPLATE,
    TokenizerFiles,
    max_chars_per_token,
    read_tokenizer_files,
)
from sftcli.modeling.tokenizer.sandbox import FIXED_DATE
from sftcli.modeling.tokenizer.special_tokens import (
    check_needed_tokens,
    classify,
    find_stop_ids,
    without_control_tokens,
)
from sftcli.modeling.tokenizer.template import ChatTemplate, read_template
from sftcli.modeling.tokenizer.variables import Value, check_known, find_switches, with_defaults
from sftcli.paths import as_path

Reading = Literal["template", "answer", "text"]
PrefixSpace = Literal["never", "first", "always"]

MAX_TEMPLATE_BYTES = 4 << 20  # of which its characters are counted
TOOL_TEMPLATE = "tool_use"
OWN_TEMPLATE = "the model's own"
_NORMAL_FORMS: tuple[Literal["NFC", "NFKC", "NFD", "NFKD"], ...] = ("NFC", "NFKC", "NFD", "NFKD")
_NORMAL_PROBE = "e\u0301\ufb01\u00e9"  # differs under each of the forms


class HFChatTokenizer:
    """A tokenizer that knows its template, its control tokens and at which of them generation stops.

    Attributes:
        control_ids: Control tokens: special ones, and those that look it. Never made from a row's text.
        markup_ids: Bracketed tokens that are not special, such as ``<think>``. Only templates and answers make them.
        control_texts: Text -> id of both kinds.
        eos_text: The token that is put behind texts which bring no stop token themselves.
        text_prefix: What the tokenizer puts in front of any text by itself: mostly nothing, or its first token.
        prefix_space: When the tokenizer puts a space in front of text: not at all, at the start of a text only, or
            behind every control token too.
        fingerprint: Changes with anything that could change ids or masks.
    """

    def __init__(
        self,
        files: TokenizerFiles,
        templates: Mapping[str, ChatTemplate],
        stop_texts: Sequence[str],
        variables: Mapping[str, Value],
    ) -> None:
        self._tokenizer = files.tokenizer
        self._path = files.path
        self._encoding = threading.Lock()
        self._templates = templates
        self._chosen = variables
        self._variables: dict[str, object] = {**files.named, **variables}
        with self._working(), without_panics():
            self._look_at(files, stop_texts)
        self._variables["text_prefix"] = self.text_prefix

    def _look_at(self, files: TokenizerFiles, stop_texts: Sequence[str]) -> None:
        self.control_ids, self.markup_ids = classify(files)
        texts = {i: token.content for i, token in self._tokenizer.get_added_tokens_decoder().items()}
        self.control_texts: Mapping[str, int] = {
            texts[i]: i for i in sorted(self.control_ids | self.markup_ids)
        }
        self.stop_ids = find_stop_ids(files, stop_texts)
        self.eos_text = files.named.get("eos_token") or str(self._tokenizer.id_to_token(min(self.stop_ids)))
        if not (first := self._tokenizer.encode(self.eos_text, add_special_tokens=False).ids):
            raise DataError(f"{files.path} reads its stop token {self.eos_text!r} as nothing", hint=AGAIN)
        self.eos_id = first[0]
        pad_id = self._tokenizer.token_to_id(files.named.get("pad_token", ""))
        self.pad_id = self.eos_id if pad_id is None else pad_id  # no matter which: masks never go by it
        self.text_prefix = self._find_text_prefix()
        self.prefix_space: PrefixSpace = self._find_prefix_space()
        self.fingerprint = self._find_fingerprint(files)

    def _working(self) -> AbstractContextManager[None]:
        """Guard what the library does with a text: a damaged tokenizer may only fail there."""
        return foreign_file(self._path, "does not work")

    @property
    def template_name(self) -> str:
        """A built-in name, a file name, or "the model's own"."""
        return self._template(None).name

    @property
    def chosen_template(self) -> str | None:
        """What was chosen in place of the model's own, as others can read it: with its variables, and without ``text_prefix``."""
        if self.template_name == OWN_TEMPLATE and not self._chosen:
            return None
        source = with_defaults(self._template(None).source, self._chosen)
        if "text_prefix" not in source:
            return source
        return f"{{%- set text_prefix = {json.dumps(self.text_prefix)} %}}{source}"

    @property
    def template_hash(self) -> str:
        """SHA-256 of the template sources."""
        sources = {name: template.source for name, template in sorted(self._templates.items())}
        return hashlib.sha256(json.dumps(sources).encode()).hexdigest()

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know about this tokenizer and template, a sentence each."""
        notes = []
        if any(template.prints_date for template in self._templates.values()):
            notes.append(f"the template prints the date; here it is always {FIXED_DATE:%d %b %Y}")
        if self.text_prefix and self.template_name in BUILTIN_TEMPLATES:
            notes.append(f"every text starts with {self.text_prefix}, as this tokenizer adds it")
        return tuple(notes)

    def render(
        self,
        messages: Sequence[Mapping[str, object]],
        *,
        tools: Sequence[object] | None,
        add_generation_prompt: bool,
        variables: Mapping[str, object] | None = None,
    ) -> str:
        """Return the text of ``messages`` by the template; ``variables`` of a row go before those of the settings.

        Raises:
            TemplateRefusedError: The template raised; the message is its own.
        """
        return self._template(tools).render(
            messages,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            variables={**self._variables, **variables} if variables else self._variables,
        )

    @functools.cached_property
    def vocab_size(self) -> int:
        """One more than the largest id; there can be fewer tokens, as some vocabularies leave ids out."""
        return 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values())

    @functools.cached_property
    def max_chars_per_token(self) -> int:
        """No token stands for more characters of a text; 0 if unknown."""
        return max_chars_per_token(self._tokenizer)

    def mentions(self, text: str) -> bool:
        """Return whether the template's source holds ``text``."""
        return any(text in template.source for template in self._templates.values())

    @functools.cached_property
    def switches(self) -> Sequence[str]:
        """Variables that the template asks about and may be set by name, those of thinking first."""
        if len(self._templates) > 1:
            return ()  # which of them would be meant?
        return find_switches(self._template(None).source)

    def encode(self, text: str, *, reading: Reading = "template") -> list[int]:
        """Return the ids of ``text``, without anything the tokenizer would add."""
        return self.encode_many([text], reading=reading)[0]

    def encode_many(
        self, texts: Sequence[str], *, reading: Reading, continued: bool = False
    ) -> list[list[int]]:
        """Return the ids of each of ``texts``, on all cores.

        Args:
            texts: Each is read by itself.
            reading: See the module.
            continued: Whether the texts stand in the middle of others, so that none gets a space in front.
        """
        tokenizer = self._reader(
            masked=reading == "text" and bool(self.markup_ids),
            continued=continued and self.prefix_space != "never",
        )
        with self._encoding, self._working():  # the switch is the tokenizer's, not the call's
            tokenizer.encode_special_tokens = reading != "template"
            try:
                encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
            finally:
                tokenizer.encode_special_tokens = False
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int], *, skip_special: bool) -> str:
        """Return the text of ``ids``; incomplete characters become U+FFFD."""
        with self._working():
            return str(self._tokenizer.decode(list(ids), skip_special_tokens=skip_special))

    def decode_many(self, rows: Sequence[Sequence[int]]) -> list[str]:
        """Return the text of each of ``rows`` as it reads in the middle of a text, control tokens included."""
        if self.prefix_space == "never":
            with self._working():
                return self._tokenizer.decode_batch(rows, skip_special_tokens=False)
        anchored = [[self.eos_id, *row] for row in rows]  # decoders take a space from the start of a text
        with self._working():
            texts = self._tokenizer.decode_batch(anchored, skip_special_tokens=False)
        return [text.removeprefix(self.eos_text) for text in texts]

    def normalize(self, text: str) -> str:
        """Return ``text`` in the Unicode normal form that the tokenizer brings every text to, if any."""
        return unicodedata.normalize(self._normal_form, text) if self._normal_form else text

    @functools.cached_property
    def _normal_form(self) -> Literal["NFC", "NFKC", "NFD", "NFKD"] | None:
        if self._tokenizer.normalizer is None:
            return None
        found = self._tokenizer.normalizer.normalize_str(_NORMAL_PROBE)
        if found.endswith(_NORMAL_PROBE):
            return None
        return next(
            (form for form in _NORMAL_FORMS if found.endswith(unicodedata.normalize(form, _NORMAL_PROBE))),
            None,
        )

    def _template(self, tools: Sequence[object] | None) -> ChatTemplate:
        if tools is not None and TOOL_TEMPLATE in self._templates:
            return self._templates[TOOL_TEMPLATE]
        return self._templates[DEFAULT_TEMPLATE]

    def _find_text_prefix(self) -> str:
        body = self._tokenizer.encode("a", add_special_tokens=False).ids
        whole = self._tokenizer.encode("a", add_special_tokens=True).ids
        return (
            "".join(str(self._tokenizer.id_to_token(token)) for token in whole[: whole.index(body[0])])
            if body
            else ""
        )

    def _find_prefix_space(self) -> PrefixSpace:
        def opens_with_space(text: str) -> bool:
            return str(self._tokenizer.encode(text, add_special_tokens=False).tokens[-1]) != "a"

        if not opens_with_space("a"):
            return "never"
        return "always" if opens_with_space(f"{self.eos_text}a") else "first"

    def _find_fingerprint(self, files: TokenizerFiles) -> str:
        parts: tuple[object, ...] = (
            files.digest,
            self.template_hash,
            FIXED_DATE.isoformat(),
            self._variables,
            sorted(self.stop_ids),
        ) + (
            (sorted(files.in_text),) if files.in_text else ()
        )  # runs without such tokens keep their fingerprint
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    @functools.cache  # noqa: B019 (one tokenizer lives as long as its command)
    def _reader(self, *, masked: bool, continued: bool) -> Tokenizer:
        if not masked and not continued:
            return self._tokenizer
        with self._working(), without_panics():
            return without_control_tokens(
                self._tokenizer, hidden=self.markup_ids if masked else frozenset(), prefix_space=not continued
            )


def named_template(text: str) -> ChatTemplate:
    """Return the built-in template of that name, or the one in the file of that name.

    Raises:
        UsageError: It is neither.
        DataError: It is not Jinja.
    """
    return read_template(
        text,
        builtins=BUILTIN_TEMPLATES,
        read=lambda path: read_whole_text(as_path(path), most_bytes=MAX_TEMPLATE_BYTES),
    )


def load_chat_tokenizer(
    folder: Path,
    *,
    template: str | None = None,
    variables: Mapping[str, Value] | None = None,
    stop_tokens: Sequence[str] = (),
) -> HFChatTokenizer:
    """Load the tokenizer of ``folder``.

    Args:
        folder: With ``tokenizer.json``; the configuration, template and generation settings beside it are used.
        template: A built-in name or a file of Jinja text; None takes the tokenizer's own.
        variables: What the template is to see by name.
        stop_tokens: Texts of tokens at which generation stops too, beside those the files name.

    Raises:
        NotFoundError: There is no tokenizer.
        DataError: A file is damaged.
        UsageError: There is no template or none of that name, it reads no such variable, or no token ends an answer.
    """
    files = read_tokenizer_files(folder)
    if template is not None:
        chosen = named_template(template)
        check_needed_tokens(files, template)
        stop_tokens = (*stop_tokens, *STOP_TOKENS.get(template, ()))
        check_known(variables or {}, [chosen.source], f"the chat template {template}")
        return HFChatTokenizer(files, {DEFAULT_TEMPLATE: chosen}, stop_tokens, variables or {})
    if DEFAULT_TEMPLATE not in files.templates:
        raise UsageError(
            f"the tokenizer in {folder} has no chat template",
            hint=f"choose one with --template: {', '.join(sorted(BUILTIN_TEMPLATES))}, or a file of Jinja text",
        )
    own = {name: ChatTemplate(source, name=OWN_TEMPLATE) for name, source in files.templates.items()}
    if variables and len(own) > 1:
        raise UsageError(
            f"the tokenizer in {folder} has several chat templates ({', '.join(own)}), which cannot be given variables",
            hint="choose one with --template FILE",
        )
    check_known(variables or {}, files.templates.values(), "the model's chat template")
    return HFChatTokenizer(files, own, stop_tokens, variables or {})
