"""A model server on this machine that speaks as llama.cpp, vLLM, Ollama and OpenAI do, with faults that can be switched on.

It answers with a model folder, by a loop of its own: no code of ours decodes here.
"""

import json
import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from sftcli.modeling.tokenizer.chat_tokenizer import HFChatTokenizer, load_chat_tokenizer
from tests.support.serving import answering


@dataclass
class Faults:
    """What is wrong with a server."""

    system: str = ""  # put in front of conversations without a system message
    template: str | None = None  # in place of the model's own
    stops: bool = True
    room: int = 1 << 20  # tokens that an answer may have at most, as a small context leaves
    context: int = 1 << 20  # tokens that a prompt may have at most
    bits: int = 0  # of weights; 0 leaves them
    key: str = ""  # that it asks for
    tells_logprobs: bool = True
    shows_prompts: bool = True  # as Ollama does since 0.11.5
    refuses: tuple[str, ...] = ()  # names in a request
    finish: str = ""  # in place of the reason for which an answer ends
    # One is taken for each chat request: a status, "cut" (half a body), "hang up", "slow" or "" for none.
    next: deque[int | str] = field(default_factory=deque)
    slow_seconds: float = 0.3
    retry_after: str = "0.01"
    body: bytes | None = None  # in place of every answer


class ModelServer:
    """``asked`` counts the last turn of each chat that was answered whole; ``requests`` has all of them, with their bodies.

    With ``echoes`` it has no model and repeats what it is asked, which takes no time. ``on_chat`` is told the number of each chat
    before it is answered.
    """

    def __init__(self, folder: Path, faults: Faults | None = None, *, echoes: bool = False) -> None:
        self.faults = faults or Faults()
        self.echoes = echoes
        self.on_chat: Callable[[int], None] = lambda _: None
        self.tokenizer: HFChatTokenizer = load_chat_tokenizer(folder, template=self.faults.template)
        self.model = (
            None if echoes else AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        )
        if self.faults.bits:
            _round(self.model, self.faults.bits)
        self.asked: Counter[str] = Counter()
        self.requests: list[tuple[str, Mapping[str, object], Mapping[str, str]]] = []
        self.models = ["tiny"]
        self.url = ""
        self._one_at_a_time = threading.Lock()

    @contextmanager
    def serving(self) -> Iterator["ModelServer"]:
        server = _QuietServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"owner": self}))
        with answering(server) as self.url:
            yield self

    def text_of(self, messages: Sequence[Mapping[str, object]]) -> str:
        if self.faults.system and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.faults.system}, *messages]
        return self.tokenizer.render(messages, tools=None, add_generation_prompt=True)

    def ids_of(self, messages: Sequence[Mapping[str, object]]) -> list[int]:
        return self.tokenizer.encode(self.text_of(messages))

    def answer(
        self, messages: Sequence[Mapping[str, object]], most: int, temperature: float, seed: int
    ) -> tuple[str, str, int, list[tuple[str, float]]]:
        """Return text, reason of its end, tokens of the prompt, and tokens with their log-probabilities."""
        if self.model is None:
            return f"You said: {messages[-1]['content']}", "stop", len(self.ids_of(messages)), [("You", -0.5)]
        ids, found, tokens = self.ids_of(messages), list[int](), []
        draws = torch.Generator().manual_seed(seed)
        finish = "length"
        with self._one_at_a_time, torch.inference_mode():
            while len(found) < min(most, self.faults.room):
                logits = self.model(input_ids=torch.tensor([[*ids, *found]])).logits[0, -1].float()
                logprobs = torch.log_softmax(logits, -1)
                if temperature:
                    odds = torch.softmax(logits / temperature, -1)
                    token = int(torch.multinomial(odds, 1, generator=draws))
                else:
                    token = int(logits.argmax())
                if token in self.tokenizer.stop_ids and self.faults.stops:
                    finish = "stop"
                    break
                found.append(token)
                tokens.append((self.tokenizer.decode([token], skip_special=False), float(logprobs[token])))
        return self.tokenizer.decode(found, skip_special=True), finish, len(ids), tokens


class _QuietServer(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        """Say nothing of clients that hang up."""


class _Handler(BaseHTTPRequestHandler):
    owner: ModelServer

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        if self._is_let_in({}):
            models = [{"id": name, "object": "model"} for name in self.owner.models]
            self._reply({"object": "list", "data": models} if self.path == "/v1/models" else None)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self._is_let_in(body):
            return
        if self.path.endswith(("completions", "/api/chat")):
            self.owner.on_chat(sum(self.owner.asked.values()))
        do = {
            "/apply-template": self._apply,
            "/tokenize": self._tokenize,
            "/v1/chat/completions": self._chat,
            "/api/chat": self._ollama,
            "/api/show": lambda _: {"system": self.owner.faults.system, "template": "?"},
        }.get(self.path)
        if self.path.endswith(("completions", "/api/chat")) and (refusal := self._too_long(body)):
            self._send(400, json.loads(refusal))
            return
        is_replaced = self.owner.faults.body is not None
        self._reply(None if do is None else {} if is_replaced else do(body))

    def _is_let_in(self, body: Mapping[str, object]) -> bool:
        owner, faults = self.owner, self.owner.faults
        owner.requests.append((self.path, body, dict(self.headers)))
        if faults.key and self.headers.get("Authorization") != f"Bearer {faults.key}":
            self._send(401, {"error": {"message": f"wrong key {self.headers.get('Authorization')}"}})
            return False
        fault = (
            faults.next.popleft() if self.path.endswith(("completions", "/api/chat")) and faults.next else ""
        )
        if refused := next((name for name in faults.refuses if name in body), ""):
            self._send(400, {"error": {"message": f"Unsupported parameter: {refused} \x1b[31m"}})
        elif isinstance(fault, int):
            self._send(fault, {"error": "busy"}, {"Retry-After": faults.retry_after})
        elif fault == "hang up":
            self.connection.close()
        else:
            if fault == "slow":
                time.sleep(faults.slow_seconds)
            self._is_cut = fault == "cut"
            return True
        return False

    def _apply(self, body: Mapping[str, object]) -> object:
        return {"prompt": self.owner.text_of(body["messages"])}

    def _tokenize(self, body: Mapping[str, object]) -> object:
        if "messages" in body:  # vLLM
            ids = self.owner.ids_of(body["messages"])
            return {"count": len(ids), "max_model_len": 512, "tokens": ids}
        return {"tokens": self.owner.tokenizer.encode(body["content"])}

    def _chat(self, body: Mapping[str, object]) -> object:
        most = body.get("max_tokens") or body.get("max_completion_tokens") or 16
        text, finish, prompt, tokens = self.owner.answer(
            body["messages"], int(most), body.get("temperature", 1.0), body.get("seed", 0)
        )
        content = [{"token": token, "logprob": logprob, "bytes": None} for token, logprob in tokens]
        tells = body.get("logprobs") and self.owner.faults.tells_logprobs
        self._count(body["messages"])
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": text},
            "finish_reason": self.owner.faults.finish or finish,
            "logprobs": {"content": content} if tells else None,
        }
        usage = {"prompt_tokens": prompt, "completion_tokens": len(tokens), "total_tokens": 0}
        return {"id": "1", "object": "chat.completion", "choices": [choice], "usage": usage}

    def _ollama(self, body: Mapping[str, object]) -> object:
        options = body["options"]
        if body.get("_debug_render_only") and self.owner.faults.shows_prompts:
            return {
                "model": body["model"], "created_at": "2026-01-31T00:00:00Z", "message": {"role": "", "content": ""},
                "done": False, "_debug_info": {"rendered_template": self.owner.text_of(body["messages"])},
            }  # fmt: skip
        assert (
            "_debug_render_only" in body or options["repeat_penalty"] == 1.0
        )  # else its default changes answers
        text, finish, prompt, tokens = self.owner.answer(
            body["messages"], options["num_predict"], options.get("temperature", 0.8), options.get("seed", 0)
        )
        self._count(body["messages"])
        return {
            "model": body["model"], "message": {"role": "assistant", "content": text}, "done": True,
            "done_reason": finish, "prompt_eval_count": prompt, "eval_count": len(tokens),
        }  # fmt: skip

    def _too_long(self, body: Mapping[str, object]) -> str:
        """Return what is said of a prompt that is too long; Ollama cuts it unless it is told not to, and hands on what another says."""
        count, room = len(self.owner.ids_of(body["messages"])), self.owner.faults.context
        if count < room or "_debug_render_only" in body:
            return ""
        message = (
            f"request ({count} tokens) exceeds the available context size ({room} tokens), try increasing it"
        )
        error = {"error": {"code": 400, "message": message, "type": "exceed_context_size_error"}}
        if self.path != "/api/chat":
            return json.dumps(error)
        return "" if body.get("truncate", True) else json.dumps({"error": json.dumps(error)})

    def _count(self, messages: Sequence[Mapping[str, object]]) -> None:
        if not self._is_cut:
            self.owner.asked[str(messages[-1]["content"])] += 1

    def _reply(self, value: object) -> None:
        if value is None:
            self._send(404, {"error": f"no path {self.path}"})
        else:
            self._send(200, value)

    def _send(self, status: int, value: object, headers: Mapping[str, str] | None = None) -> None:
        body = (
            self.owner.faults.body if status == 200 and self.owner.faults.body else json.dumps(value).encode()
        )
        self.send_response(status)
        for name, text in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, text)
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if getattr(self, "_is_cut", False) else body)


def _round(model: torch.nn.Module, bits: int) -> None:
    """Round each row of each matrix to so many bits, as simple quantizations do."""
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2:
                step = weight.abs().amax(dim=1, keepdim=True) / (2 ** (bits - 1) - 1)
                weight.copy_((weight / step.clamp_min(math.ulp(0.0))).round() * step)
