"""What servers answer, as far as it is read."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """The turn that a server writes."""

    content: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprob:
    """A token of an answer, as text, with its log-probability."""

    token: str
    logprob: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Logprobs:
    """Those of an answer."""

    content: tuple[TokenLogprob, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One answer. ``finish_reason`` is null of one that is not whole."""

    message: Said
    finish_reason: str | None = None
    logprobs: Logprobs | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Tokens of a request."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatReply:
    """``/chat/completions``."""

    choices: tuple[Choice, ...]
    usage: Usage | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class OllamaReply:
    """``/api/chat`` of Ollama, in one piece."""

    message: Said
    done: bool
    done_reason: str | None = None
    prompt_eval_count: int | None = None
    eval_count: int | None = None
    logprobs: tuple[TokenLogprob, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RenderedPrompt:
    """What a prompt becomes in Ollama."""

    rendered_template: str


@dataclass(frozen=True, slots=True, kw_only=True)
class OllamaShown:
    """``/api/chat`` of Ollama, asked to show the prompt; versions before 0.11.5 answer it instead."""

    _debug_info: RenderedPrompt | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class OllamaModel:
    """``/api/show`` of Ollama."""

    system: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ListedModel:
    """A model that a server has."""

    id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelList:
    """``/models``."""

    data: tuple[ListedModel, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class AppliedTemplate:
    """``/apply-template`` of llama.cpp."""

    prompt: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenIds:
    """``/tokenize``."""

    tokens: tuple[int, ...]
