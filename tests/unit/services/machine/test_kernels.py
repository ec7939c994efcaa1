"""Kernels on CUDA, asked of torch without a device: a CPU is left as it is."""

import os
import subprocess
import sys

import pytest
import torch

from sftcli.config.schema.training import TrainingSettings
from sftcli.environment import set_defaults
from sftcli.errors import UsageError
from sftcli.events import Notice
from sftcli.runtime import used_kernels
from sftcli.services.machine import facts, kernels
from sftcli.services.machine.facts import describe_machine, facts_of_run, facts_of_training
from sftcli.services.machine.kernels import kernels_as_set, why_not_equal
from sftcli.services.train.resuming.changes import MACHINE, find_changes
from tests.support.recording import RecordingSink

CUDA = torch.device("cuda")
DETERMINISTIC = "cumsum_cuda_kernel does not have a deterministic implementation, but you set 'torch.use_deterministic_algorithms(True)'."


@pytest.fixture
def on_cuda(monkeypatch):
    monkeypatch.setattr(kernels, "choose_device", lambda: CUDA)


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """An A100 in place of the CPU, as far as facts ask."""
    version = tmp_path / "version"
    version.write_text(
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024\n"
    )
    monkeypatch.setattr("sftcli.runtime._DRIVER", version)
    monkeypatch.setattr(facts, "choose_device", lambda: CUDA)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: "NVIDIA A100-SXM4-80GB")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (8, 0))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *, including_emulation: True)
    properties = type("Properties", (), {"total_memory": 85_000_000_000})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _device: properties)


@pytest.mark.parametrize(("deterministic", "tf32"), [(True, False), (False, True), (True, True)])
def test_kernels_are_as_set_in_the_block_and_as_before_behind_it(on_cuda, deterministic, tf32):
    before, sink = used_kernels(), RecordingSink()
    with kernels_as_set(TrainingSettings(deterministic=deterministic, tf32=tf32), sink):
        assert torch.are_deterministic_algorithms_enabled() is deterministic
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
        assert not torch.utils.deterministic.fill_uninitialized_memory
        assert torch.backends.cuda.matmul.allow_tf32 is tf32
        assert torch.backends.cudnn.allow_tf32 is tf32
    assert used_kernels() == before
    (told,) = sink.of(Notice)
    assert ("does not repeat bit for bit" in told.text) is not deterministic


def test_a_cpu_is_left_as_it_is():
    sink, before = RecordingSink(), used_kernels()
    with kernels_as_set(TrainingSettings(tf32=True), sink):
        assert used_kernels() == before
    assert sink.events == []


def test_operation_without_such_a_kernel_is_named_with_the_setting(on_cuda):
    with (
        pytest.raises(UsageError, match="cumsum_cuda_kernel does not have") as caught,
        kernels_as_set(TrainingSettings(), RecordingSink()),
    ):
        raise RuntimeError(DETERMINISTIC)
    assert "training.deterministic=false" in caught.value.hint
    with pytest.raises(RuntimeError, match="shape"), kernels_as_set(TrainingSettings(), RecordingSink()):
        raise RuntimeError("shape")


def test_promise_is_off_where_the_setting_is():
    assert "does not repeat" in why_not_equal(TrainingSettings(deterministic=False), CUDA)
    for settings, device in (({}, "cuda"), ({"deterministic": False}, "cpu")):
        assert "library versions" in why_not_equal(TrainingSettings(**settings), torch.device(device))


def test_workspace_of_products_is_set_before_torch_is_there_and_a_users_own_stays(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    set_defaults()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    set_defaults()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
    code = "import sys; from sftcli.environment import set_defaults; set_defaults(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_facts_name_the_gpu_and_what_decides_its_bits(gpu):
    found = facts_of_training(TrainingSettings())
    assert (found["gpu"], found["capability"], found["cuda"]) == ("NVIDIA A100-SXM4-80GB", "8.0", "13.0")
    assert "driver" not in found
    assert facts_of_run(TrainingSettings())["driver"] == "550.54.15"
    described = describe_machine()
    assert described["device"] == "cuda (NVIDIA A100-SXM4-80GB)"
    assert described["gpu memory"] == "85.0 GB"
    assert {"driver", "cuda", "peft"} <= set(described)


def test_another_gpu_is_told_on_resume():
    was, now = ({f"{MACHINE}gpu": name} for name in ("NVIDIA A100", "NVIDIA H100"))
    (warned,) = find_changes(was, now, allowed=(), what="x").message()
    assert "gpu was NVIDIA A100, is NVIDIA H100: the run continues, but not bit for bit" in warned.text


def test_a_cpu_has_no_such_facts():
    assert not {"gpu", "cuda", "driver"} & set(facts_of_run(TrainingSettings()))
