"""What works on this machine, found by trying: a line for each thing that a training needs, the last one a training."""

import os
import platform
import shutil
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, cast
from urllib.parse import urlsplit

import numpy as np
import torch

from sftcli.cache import cache_folder
from sftcli.config.schema.training import TrainingSettings
from sftcli.data.batches.batch import collate
from sftcli.data.example import Example
from sftcli.data.reading.record import Origin
from sftcli.errors import SftError
from sftcli.events import Notice, Session
from sftcli.extras import EXTRAS, install_command
from sftcli.modeling.attention import attention_of
from sftcli.modeling.hub.process import endpoint, offline_by
from sftcli.modeling.kernels.document_attention import attend_by_document
from sftcli.modeling.kernels.varlen import varlen_on
from sftcli.modeling.libraries import quiet_libraries
from sftcli.modeling.locate.default_model import ALIAS, place_without_download
from sftcli.runtime import choose_device, dtype_named, is_finite, monotonic, total_memory_bytes
from sftcli.services.machine.precision import decide_precision
from sftcli.storage import nearest_folder
from sftcli.training.loss import response_nll_sum
from sftcli.training.optim.optimizer import make_optimizer
from sftcli.training.weights.masters import MasterWeights

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NEEDED_BYTES = 2_000_000_000  # the default model, a checkpoint of it and the final model
_MODULES = {"rouge-score": "rouge_score", "lm-eval": "lm_eval", "mlflow-skinny": "mlflow", "flash-linear-attention": "fla",
            "causal-conv1d": "causal_conv1d", "mamba-ssm": "mamba_ssm"}  # fmt: skip
_HUB_SECONDS = 4.0
_STEPS, _ROWS, _LENGTH, _VOCABULARY = 60, 16, 24, 256
_LEARNED = 0.5  # of the first loss that the last one has to be below


class State(StrEnum):
    """How a check came out."""

    WORKS = "works"
    MISSING = "missing"  # and can be done without
    FAILS = "fails"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One line: what was looked at, how it is, and in words what was found."""

    name: str
    state: State
    text: str


def examine(session: Session) -> list[Finding]:
    """Look at everything, in the order in which a training needs it; what raises an error fails with its words."""
    quiet_libraries()
    checks: dict[str, Callable[[], tuple[State, str]]] = {
        "program": _program,
        "device": _device,
        "precision": _precision,
        "attention": _attention,
        "compile": _compiler,
        "extras": _extras,
        "disk": _disk,
        "hub": _hub,
        "model": lambda: _model(session),
        "training": _training,
    }
    found = []
    for name, check in checks.items():
        session.emit(Notice(text=f"checking: {name}"))
        try:
            state, text = check()
        except (SftError, OSError, RuntimeError, ValueError, ImportError) as error:
            state, text = State.FAILS, f"{type(error).__name__}: {error}".splitlines()[0]
        found.append(Finding(name=name, state=state, text=text))
    return found


def _program() -> tuple[State, str]:
    return State.WORKS, f"Python {platform.python_version()}, torch {torch.__version__}, {platform.system()}"


def _device() -> tuple[State, str]:
    device = choose_device()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    memory = total_memory_bytes(device)
    size = f", {memory / 1e9:.1f} GB" if memory else ""
    return State.WORKS, f"{device} ({name}){size}, {torch.get_num_threads()} of {os.cpu_count()} CPU threads"


def _precision() -> tuple[State, str]:
    found = decide_precision("auto", choose_device())
    return State.WORKS, f"{found.name} ({found.why})"


def _attention() -> tuple[State, str]:
    model = _tiny_model()
    name = attention_of(model)
    kernel = varlen_on(choose_device())
    if kernel is not None and kernel.missing is not None:
        return (
            State.MISSING,
            f"{name}; rows are padded, not packed: of torch's kernel for packed rows, {kernel.missing}",
        )
    if attend_by_document(model):
        return State.WORKS, f"{name}; rows can be packed"
    return State.MISSING, f"{name}; rows are padded, not packed"


def _compiler() -> tuple[State, str]:
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang", "cl"))), None)
    return State.WORKS, f"not needed; a C compiler is {'at ' + compiler if compiler else 'not there'}"


def _extras() -> tuple[State, str]:
    def is_there(requirement: str) -> bool:
        package = requirement.split(">=")[0]
        return find_spec(_MODULES.get(package, package)) is not None

    lacking = {extra: [one for one in named if not is_there(one)] for extra, named in EXTRAS.items()}
    whole = [extra for extra, named in lacking.items() if not named]
    part = [extra for extra, named in lacking.items() if named]
    text = f"installed: {', '.join(whole)}" if whole else "none is installed"
    return (
        (State.MISSING, f"{text}; missing: {', '.join(part)}; to install one: {install_command(part[0])}")
        if part
        else (State.WORKS, text)
    )


def _disk() -> tuple[State, str]:
    places = {"cache": cache_folder(), "here": Path.cwd()}
    free = {name: shutil.disk_usage(nearest_folder(place)).free for name, place in places.items()}
    text = ", ".join(
        f"{size / 1e9:.1f} GB free {'in the ' if name == 'cache' else ''}{name}"
        for name, size in free.items()
    )
    if not os.access(Path.cwd(), os.W_OK):
        return State.FAILS, "this folder is not writable, and runs are written here: --runs DIR"
    is_enough = min(free.values()) >= NEEDED_BYTES
    return (State.WORKS, text) if is_enough else (State.FAILS, f"{text}; a small training needs 2 GB")


def _hub() -> tuple[State, str]:
    if variable := offline_by():
        return State.MISSING, f"not asked: {variable} is set"
    hub = urlsplit(endpoint())
    if not hub.hostname:
        return (
            State.FAILS,
            f"HF_ENDPOINT is {endpoint()!r}, expected an address such as https://huggingface.co",
        )
    port = hub.port or (80 if hub.scheme == "http" else 443)
    try:
        socket.create_connection((hub.hostname, port), timeout=_HUB_SECONDS).close()
    except OSError as error:
        proxy = any(name in os.environ for name in ("HTTPS_PROXY", "https_proxy"))
        return (
            State.MISSING,
            f"{hub.netloc} cannot be reached{' without the proxy' if proxy else ''}: {error}",
        )
    return State.WORKS, f"{hub.netloc} can be reached"


def _model(session: Session) -> tuple[State, str]:
    place = place_without_download(session.emit)
    if place is None:
        return State.MISSING, f"{ALIAS} is not here yet; the first training downloads it"
    return State.WORKS, f"{ALIAS} is in {place}"


def _training() -> tuple[State, str]:
    """Train a tiny model to answer with the token it was asked with, as a step of ``sft train`` multiplies."""
    begin = monotonic()
    losses = list(_losses())
    text = f"loss {losses[0]:.2f} to {losses[-1]:.2f} in {len(losses)} steps, {monotonic() - begin:.1f}s"
    has_learned = losses[-1] < _LEARNED * losses[0]
    return (State.WORKS, text) if has_learned else (State.FAILS, f"does not learn: {text}")


def _losses() -> Iterator[float]:
    device = choose_device()
    dtype = dtype_named(decide_precision("auto", device).name, device)
    model = _tiny_model()
    cast("torch.nn.Module", model).to(device)
    settings = TrainingSettings(max_steps=_STEPS, learning_rate=1e-2)
    weights = MasterWeights(model, compute_dtype=dtype)
    optimizer = make_optimizer(weights.masters, settings)
    generator = np.random.default_rng(0)
    model.train()
    for _ in range(_STEPS):
        rows = [_row(int(asked)) for asked in generator.integers(3, 35, size=_ROWS)]
        batch = collate(rows, example_ids=range(_ROWS), pad_id=0).to(device)
        loss = response_nll_sum(model, batch) / batch.response_tokens
        loss.backward()
        optimizer.step()
        weights.publish()
        optimizer.zero_grad(set_to_none=True)
        if not is_finite(loss):
            raise RuntimeError("the loss is not finite")
        yield loss.item()


def _row(asked: int) -> Example:
    ids = np.full(_LENGTH, asked, dtype=np.int32)
    ids[0] = 1
    return Example(
        input_ids=ids, loss_mask=np.arange(_LENGTH) >= _LENGTH // 2, origin=Origin(path="doctor", line=asked)
    )


def _tiny_model() -> "PreTrainedModel":
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=_VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config)
