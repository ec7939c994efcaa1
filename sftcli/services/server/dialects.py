"""What each kind of server is asked, and what of its answers is taken: a class for each, chosen by a table."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from sftcli.config.schema.run import SamplingSettings
from sftcli.data.conversations.messages import Message
from sftcli.errors import NetworkError, NotFoundError, UsageError
from sftcli.events import EventSink, Notice, StopFlag
from sftcli.services.server.address import ServerAddress, ServerKind
from sftcli.services.server.connection import Connection, Patience, RefusedError
from sftcli.services.server.forms import (
    AppliedTemplate,
    ChatReply,
    ModelList,
    OllamaModel,
    OllamaReply,
    OllamaShown,
    TokenIds,
    TokenLogprob,
)
from sftcli.services.server.several import KeptEvents

_FINISHES = {
    "stop": "stop",
    "eos": "stop",
    "eos_token": "stop",
    "end_turn": "stop",
    "length": "length",
    "max_tokens": "length",
}
_LIMIT, _NEWER_LIMIT = "max_tokens", "max_completion_tokens"  # of one meaning; newer models refuse the first
_WITHOUT = {
    "logprobs": "answers come without log-probabilities and confidence",
    "seed": "answers with a temperature differ each time",
}
_FILTERS = {"top_k": "top_k", "min_p": "min_p"}  # our names and those of servers one runs oneself
_NAMED = 8  # models that a message lists


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerAnswer:
    """An answer. ``finish`` is "stop" or "length"; numbers that the server does not tell are None."""

    text: str
    finish: str
    prompt_tokens: int | None
    new_tokens: int | None
    tokens: tuple[tuple[str, float], ...] | None  # text and log-probability

    @property
    def logprob(self) -> float | None:
        """The sum over the tokens."""
        return None if self.tokens is None else sum(logprob for _, logprob in self.tokens)

    @property
    def confidence(self) -> float | None:
        """Geometric mean of the probabilities of the tokens, 0 to 1."""
        if not self.tokens or self.logprob is None:
            return None
        return round(math.exp(min(0.0, self.logprob / len(self.tokens))), 5)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerPrompt:
    """What a server makes of a conversation: token ids, its text, or both, as it tells them."""

    ids: tuple[int, ...] | None = None
    text: str | None = None


class Server:
    """A server that speaks as OpenAI's does, and what the other kinds have in common with it.

    Args:
        address: Where it is.
        emit: Is told of tries that failed.
        stop: Ends waiting.
        patience: How long to wait.
    """

    penalties: Mapping[str, str] = {}  # settings that go beyond OpenAI's, and how the server calls them
    chat_path = "/chat/completions"
    models_path = "/models"

    def __init__(
        self, address: ServerAddress, emit: EventSink, stop: StopFlag, patience: Patience | None = None
    ) -> None:
        self.address = address
        self.events = KeptEvents(emit)
        self.connection = Connection(address, self.events, stop, patience)
        self._left_out: set[str] = set()
        self._limit = _LIMIT
        self.model = address.model or self._only_model()

    @property
    def name(self) -> str:
        """The model with its server, as rows and reports have it."""
        return f"{self.address.kind}={self.address.url}#{self.model}"

    def require(self, sampling: SamplingSettings) -> None:
        """See that the server can sample so.

        Raises:
            UsageError: It has no such setting.
        """
        asked = {
            "--top-k": ("top_k", sampling.top_k != 0),
            "--min-p": ("min_p", sampling.min_p != 0),
            "--repetition-penalty": ("repetition_penalty", sampling.repetition_penalty != 1),
        }
        if flag := next((flag for flag, (key, is_set) in asked.items() if is_set and key not in self.penalties), ""):  # fmt: skip
            raise UsageError(
                f"{flag} is no setting of {self.address.kind} servers",
                hint="leave it out, or name the kind: llama.cpp=URL, vllm=URL",
            )

    def answer(self, messages: Sequence[Message], sampling: SamplingSettings, seed: int) -> ServerAnswer:
        """Return one answer to ``messages``.

        Raises:
            SftError: As ``Connection.post``.
            RefusedError: The answer was withheld, or it is a call of a tool.
        """
        while True:
            body = {
                "model": self.model,
                "messages": as_turns(messages),
                "stream": False,
                **self._settings(sampling, seed),
            }
            try:
                return self._taken(self.connection.post(self.chat_path, body, ChatReply))
            except RefusedError as error:
                self._adapt(error, body)

    def prompt(self, messages: Sequence[Message]) -> ServerPrompt | None:  # noqa: ARG002
        """Return what the model reads for ``messages``; None where the server does not tell."""
        return None

    def system(self) -> str:
        """Return the system text that the server puts in front by itself, where it tells that; else ""."""
        return ""

    @property
    def counts_prompts(self) -> bool:
        """Whether the number of tokens that an answer names for its prompt is that of the whole prompt."""
        return True

    def _settings(self, sampling: SamplingSettings, seed: int) -> dict[str, object]:
        body: dict[str, object] = {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            self._limit: sampling.max_new_tokens,
            "seed": seed,
            "logprobs": True,
        }
        if "logprobs" not in self._left_out:
            body["top_logprobs"] = 1  # llama-cpp-python tells none without it
        if sampling.stop:
            body["stop"] = list(sampling.stop)
        body |= {theirs: getattr(sampling, ours) for ours, theirs in self.penalties.items()}
        return {name: value for name, value in body.items() if name not in self._left_out}

    def _adapt(self, error: RefusedError, body: Mapping[str, object]) -> None:
        """Ask in another way from now on, where the server refuses a name in ``body`` that is not needed.

        Raises:
            RefusedError: It refuses something else.
        """
        if _LIMIT in body and _LIMIT in error.message and _NEWER_LIMIT in error.message:
            self._limit = _NEWER_LIMIT
            return
        refused = next((name for name in _WITHOUT if name in body and name in error.message), "")
        if not refused:
            raise error
        if refused not in self._left_out:  # else another thread has learned it meanwhile
            self._left_out.add(refused)
            self.events(Notice(text=f"{self.address} takes no {refused}: {_WITHOUT[refused]}"))

    def _taken(self, reply: ChatReply) -> ServerAnswer:
        if not reply.choices:
            raise NetworkError(f"{self.address} answers without an answer", hint="see its log")
        choice, usage = reply.choices[0], reply.usage
        return ServerAnswer(
            text=choice.message.content or "",
            finish=self._finish(choice.finish_reason),
            prompt_tokens=None if usage is None else usage.prompt_tokens,
            new_tokens=None if usage is None else usage.completion_tokens,
            tokens=None if choice.logprobs is None else _pairs(choice.logprobs.content),
        )

    def _finish(self, reason: str | None) -> str:
        if reason in _FINISHES:
            return _FINISHES[reason]
        if reason is None:
            raise NetworkError(f"{self.address} gives an answer that is not whole", hint="see its log")
        raise RefusedError(
            f"{self.address} gives no answer, but ends with {reason!r}",
            hint="take this prompt out, or ask another model",
        )

    def _only_model(self) -> str:
        """Return the model of a server that has one.

        Raises:
            UsageError: It has several.
        """
        found = [model.id for model in self.connection.get(self.models_path, ModelList).data]
        if len(found) != 1:
            more = ", ".join(sorted(found)[:_NAMED]) + (", ..." if len(found) > _NAMED else "")
            raise UsageError(
                f"{self.address} has {len(found)} models: {more or 'none'}",
                hint=f"name one: {self.address}#MODEL",
            )
        return found[0]


class _OpenServer(Server):
    """A program that one runs oneself; its address has no ``/v1``."""

    chat_path = "/v1/chat/completions"
    models_path = "/v1/models"


class LlamaCppServer(_OpenServer):
    """``llama-server`` of llama.cpp."""

    penalties: Mapping[str, str] = _FILTERS | {"repetition_penalty": "repeat_penalty"}

    def prompt(self, messages: Sequence[Message]) -> ServerPrompt | None:
        """Return text and ids: the server tells both, and reads its own text as it does for a chat; the one of Python does not."""
        try:
            text = self.connection.post(
                "/apply-template", {"messages": as_turns(messages)}, AppliedTemplate
            ).prompt
        except NotFoundError:
            return None
        asked = {"content": text, "add_special": True, "parse_special": True}
        return ServerPrompt(ids=self.connection.post("/tokenize", asked, TokenIds).tokens, text=text)


class VllmServer(_OpenServer):
    """vLLM."""

    penalties: Mapping[str, str] = _FILTERS | {"repetition_penalty": "repetition_penalty"}

    def prompt(self, messages: Sequence[Message]) -> ServerPrompt | None:
        """Return the ids."""
        body = {"model": self.model, "messages": as_turns(messages), "add_generation_prompt": True}
        return ServerPrompt(ids=self.connection.post("/tokenize", body, TokenIds).tokens)


class OllamaServer(Server):
    """Ollama, by its own API: that for OpenAI's clients has no way to leave its repetition penalty out."""

    penalties: Mapping[str, str] = _FILTERS | {"repetition_penalty": "repeat_penalty"}

    def answer(self, messages: Sequence[Message], sampling: SamplingSettings, seed: int) -> ServerAnswer:
        """Return one answer."""
        options = {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "num_predict": sampling.max_new_tokens,
            "seed": seed,
            **{theirs: getattr(sampling, ours) for ours, theirs in self.penalties.items()},
            **({"stop": list(sampling.stop)} if sampling.stop else {}),
        }
        body = {
            "model": self.model,
            "messages": as_turns(messages),
            "stream": False,
            "truncate": False,  # else a prompt longer than its context loses its beginning, and nothing says so
            "logprobs": True,
            "options": options,
        }
        reply = self.connection.post("/api/chat", body, OllamaReply)
        return ServerAnswer(
            text=reply.message.content or "",
            finish=self._finish((reply.done_reason or "stop") if reply.done else None),
            prompt_tokens=reply.prompt_eval_count,
            new_tokens=reply.eval_count,
            tokens=_pairs(reply.logprobs),
        )

    def prompt(self, messages: Sequence[Message]) -> ServerPrompt | None:
        """Return the text, by a key that newer versions know; an older one answers the prompt, which is kept short."""
        body = {
            "model": self.model,
            "messages": as_turns(messages),
            "stream": False,
            "options": {"num_predict": 1},
            "_debug_render_only": True,
        }
        shown = self.connection.post("/api/chat", body, OllamaShown)._debug_info
        return None if shown is None else ServerPrompt(text=shown.rendered_template)

    def system(self) -> str:
        """Return what the Modelfile has."""
        return self.connection.post("/api/show", {"model": self.model}, OllamaModel).system

    @property
    def counts_prompts(self) -> bool:
        """It leaves out tokens that it has read before."""
        return False


_KINDS: Mapping[ServerKind, Callable[..., Server]] = {
    ServerKind.OPENAI: Server,
    ServerKind.LLAMA_CPP: LlamaCppServer,
    ServerKind.VLLM: VllmServer,
    ServerKind.OLLAMA: OllamaServer,
}


def open_server(
    address: ServerAddress, emit: EventSink, stop: StopFlag, patience: Patience | None = None
) -> Server:
    """Return the server at ``address``, which is asked for its model where none is named.

    Raises:
        SftError: As ``Connection.post``; or it has several models.
    """
    return _KINDS[address.kind](address, emit, stop, patience)


def as_turns(messages: Sequence[Message]) -> list[dict[str, str]]:
    """Return ``messages`` as servers take them."""
    return [{"role": message.role, "content": message.content} for message in messages]


def _pairs(tokens: Sequence[TokenLogprob] | None) -> tuple[tuple[str, float], ...] | None:
    """Return tokens with log-probabilities; None where one is missing, so that no sum is of a part."""
    if tokens is None:
        return None
    found = [
        (one.token, one.logprob) for one in tokens if one.logprob is not None and math.isfinite(one.logprob)
    ]
    return tuple(found) if found and len(found) == len(tokens) else None
