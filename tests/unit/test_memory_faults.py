"""What says that memory ran out is known in all its forms, and no try of something takes it for an answer."""

import ast
import errno
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from sftcli import memory_faults
from sftcli.cli.errors.show import guarded
from sftcli.errors import ResourceError
from sftcli.memory_faults import Attempt, MemoryErrors, is_out_of_memory
from sftcli.modeling.adapter.targets import linear_layers
from sftcli.modeling.decoding.decoder import checked_decoder
from sftcli.modeling.kernels import ways
from sftcli.modeling.kernels.fuse import fuse_layers
from sftcli.modeling.kernels.ways import Part, Way
from sftcli.services.processes.failures import describe_failure, exit_code_of
from sftcli.services.processes.peers import is_broken_connection
from sftcli.training.probes.agreement import Ways, agreed_ways
from sftcli.training.probes.choices import RowSharing
from sftcli.training.probes.loss import choose_batch_loss
from sftcli.training.probes.packing import Probe
from tests.support.memory import FAULTS, KERNEL
from tests.support.recording import RecordingSink
from tests.support.training import CPU, PAD_ID, random_examples, tiny_llama

PACKAGE = Path(memory_faults.__file__).parent
# They hand it on: to ``_tell``, and to the parent process. Or they read or draw what needs no memory to speak of.
HAND_ON = {
    "training/checkpoint/background_saver.py",
    "training/checkpoint/store.py",  # the others hear how a save has ended; it is raised all the same
    "training/checkpoint/together.py",
    "modeling/hub/worker.py",
    "modeling/config_values.py",
    "modeling/tokenizer/template.py",
    "training/utilization.py",
    "services/train/run.py",  # the page about a run
    "training/window_ahead.py",  # the step that needs the window meets it again
}
BROAD = {"RuntimeError", "Exception", "BaseException", "OutOfMemoryError", ""}

FUSED = Ways(layers=True, rows=RowSharing.NONE, head=False)
LEAN = Ways(layers=False, rows=RowSharing.NONE, head=True)


@pytest.mark.parametrize("error", FAULTS.values(), ids=FAULTS)
def test_every_way_of_saying_it_is_known(error):
    assert is_out_of_memory(error)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx`"),
        dist.DistBackendError("NCCL error: remote process exited or there was a network error"),
        RuntimeError("shape"),
        ValueError("this machine is out of memory"),
        ResourceError("out of memory with micro-batches of 4 rows"),
        OSError(errno.ENOSPC, "No space left on device"),
        KeyboardInterrupt(),
    ],
)
def test_other_errors_are_others(error):
    assert not is_out_of_memory(error)


def test_real_failures_to_allocate_are_known():
    with pytest.raises(RuntimeError) as on_cpu:
        torch.empty(2**58, dtype=torch.uint8)
    assert is_out_of_memory(on_cpu.value)


@pytest.mark.parametrize("error", FAULTS.values(), ids=FAULTS)
def test_attempt_ends_with_what_says_cannot_and_lets_memory_pass(error):
    for cannot in (RuntimeError("shape"), KeyError("head"), TypeError(), AttributeError(), ValueError()):
        with Attempt() as attempt:
            raise cannot
        assert attempt.failed
    with pytest.raises(type(error)), Attempt(), Attempt(Exception):
        raise error
    with pytest.raises(ZeroDivisionError), Attempt():
        raise ZeroDivisionError


def test_attempt_takes_a_kernel_that_is_too_large_for_the_card_as_cannot():
    with Attempt() as attempt:
        raise KERNEL
    assert attempt.failed
    assert is_out_of_memory(KERNEL)  # inside a step it is one: less at a time may do


def test_guard_of_a_block_makes_an_error_with_an_exit_code_of_it_and_keeps_an_inner_one():
    with pytest.raises(ResourceError) as caught, MemoryErrors():
        raise torch.OutOfMemoryError
    assert caught.value.exit_code == 71
    inner = ResourceError("out of memory with micro-batches of 4 rows")
    with pytest.raises(ResourceError) as kept, MemoryErrors():
        raise inner
    assert kept.value is inner


@pytest.mark.parametrize("error", FAULTS.values(), ids=FAULTS)
def test_any_command_and_any_of_several_processes_ends_with_71(error, capsys):
    def full():
        raise error

    assert guarded(full, command="sft generate") == 71
    assert "error: out of memory" in capsys.readouterr().err
    assert exit_code_of(describe_failure(error, rank=1)) == 71
    assert not is_broken_connection(error)


def tried_head(model):
    batch = random_batch()
    choose_batch_loss(model, batch, emit=RecordingSink())


def random_batch():
    from sftcli.data.batches.batch import collate

    return collate(random_examples(1), example_ids=[0], pad_id=PAD_ID)


def tried_packing(model):
    probe = Probe(model, random_examples(6), PAD_ID)
    probe.keeps_apart([probe.rows])


def tried_agreement(model):
    agreed_ways(model, None, random_examples(2), wanted=LEAN, pad_id=PAD_ID)


def tried_layers(model):
    fuse_layers(model)


TRIES = {
    "head": (tried_head, "sftcli.training.probes.loss.response_nll_sum"),
    "packing": (tried_packing, "sftcli.training.probes.packing.Probe.by_row"),
    "agreement": (tried_agreement, "sftcli.training.probes.agreement.response_nll_sum"),
    "layers": (tried_layers, "sftcli.modeling.kernels.ways.applied"),
    "layers as a whole": (tried_layers, "sftcli.modeling.kernels.fused_layer.applied"),
    "documents": (tried_layers, "sftcli.modeling.kernels.fused_layer._kwargs_of"),
    "cache": (checked_decoder, "sftcli.modeling.decoding.decoder._distances"),
}


@pytest.mark.parametrize("error", [FAULTS["torch"], FAULTS["runtime"], FAULTS["cublas"]])
@pytest.mark.parametrize(("tried", "place"), TRIES.values(), ids=TRIES)
def test_no_try_of_a_model_takes_it_for_cannot(monkeypatch, tried, place, error):
    def full(*_, **__):
        raise error

    monkeypatch.setattr(place, full)
    with pytest.raises(type(error)):
        tried(tiny_llama())


def test_a_try_that_fails_otherwise_is_an_answer(monkeypatch):
    def unable(*_, **__):
        raise RuntimeError("shape")

    monkeypatch.setitem(ways.WAYS, "cpu", {Part.NORM: (Way(forward=unable),)})
    assert "LlamaRMSNorm" in fuse_layers(tiny_llama()).left_alone


def test_layers_of_others_that_run_out_of_memory_when_tried_say_so():
    class Foreign(torch.nn.Linear):
        def forward(self, given):
            raise FAULTS["torch"]

    model = tiny_llama()
    model.model.layers[0].mlp.up_proj = Foreign(4, 4).to(CPU)
    with pytest.raises(torch.OutOfMemoryError):
        linear_layers(model)


def broad_handlers(tree):
    for node in ast.walk(tree):
        if not isinstance(node, ast.ExceptHandler):
            continue
        kinds = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
        names = {getattr(kind, "attr", getattr(kind, "id", "")) if kind is not None else "" for kind in kinds}
        if names & BROAD and "is_out_of_memory" not in ast.dump(node):
            yield node.lineno


@pytest.mark.parametrize("layer", ["training", "modeling", "services/train"])
def test_nothing_that_computes_catches_broadly_but_through_an_attempt(layer):
    found = [
        f"{path.relative_to(PACKAGE).as_posix()}:{line}"
        for path in sorted((PACKAGE / layer).rglob("*.py"))
        if path.relative_to(PACKAGE).as_posix() not in HAND_ON
        for line in broad_handlers(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert found == []
