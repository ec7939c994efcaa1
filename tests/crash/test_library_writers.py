"""What other libraries write is whole or absent too: the tuned model and files of the Modern LLM pipeline."""

import errno
import resource
import signal
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from sftcli import storage
from sftcli.config.schema.adapter import AdapterKind, AdapterSettings
from sftcli.config.schema.run import ModelSettings
from sftcli.errors import SftError, StorageError
from sftcli.modeling.adapter.adapter import merge_adapter
from sftcli.modeling.adapter.targets import file_name
from sftcli.modeling.formats.folder_write import save_model_folder
from sftcli.modeling.formats.pt_file import read_pt, write_pt
from sftcli.modeling.load import load_model
from sftcli.modeling.locate.locate import locate_model
from sftcli.modeling.modern_lm.config import ModernLMConfig
from sftcli.modeling.modern_lm.model import ModernLMForCausalLM
from sftcli.modeling.tokenizer.chat_tokenizer import load_chat_tokenizer
from sftcli.services.train.adapters import adapter_files, put_adapter
from sftcli.training.random_streams import capture_rng
from sftcli.training.state import TrainingSnapshot, TrainState
from sftcli.training.weights.masters import AdapterWeights
from tests.support.faulty_disk import CountingDisk, FailingDisk, KillingDisk
from tests.support.forked import run_forked
from tests.support.recording import RecordingSink
from tests.support.tiny_model import build_tiny_model

CPU = torch.device("cpu")


class FinalModel:
    """``RUN/final``; an older one is there."""

    def __init__(self, place: Path) -> None:
        self.source = build_tiny_model(place / "model")
        self.model = load_model(self.source, dtype=torch.float32, device=CPU)
        self.names: set[str] = set()

    def write(self, place: Path) -> None:
        save_model_folder(self.model, source=self.source, folder=place / "final")

    def check(self, place: Path) -> None:
        if not self.names:
            self.names = {path.name for path in (place / "final").iterdir()}
        if (place / "final").exists():  # a crash between two renames leaves none for a moment
            load_model(place / "final", dtype=torch.float32, device=CPU)
            assert {path.name for path in (place / "final").iterdir()} == self.names


class FinalAdapter:
    """``RUN/final`` of an adapter; an older one is there."""

    def __init__(self, place: Path) -> None:
        folder = build_tiny_model(place / "model")
        located = locate_model(str(folder), revision=None, emit=RecordingSink())
        model = load_model(folder, dtype=torch.float32, device=CPU)
        added = put_adapter(model, located, AdapterSettings(kind=AdapterKind.LORA, rank=2))
        weights = AdapterWeights(model, compute_dtype=torch.float32, file_name=file_name)
        self.base, self.names = folder, set[str]()
        self.files = adapter_files(
            model,
            added.config,
            settings=ModelSettings(name=str(folder)),
            located=located,
            tokenizer=load_chat_tokenizer(folder),
            tokenizer_source=folder,
        )
        self.snapshot = TrainingSnapshot(
            state=TrainState(step=1), weights=weights.tensors(), optimizer={}, rng=capture_rng()
        )

    def write(self, place: Path) -> None:
        self.files.save(place / "final", self.snapshot)

    def check(self, place: Path) -> None:
        if not self.names:
            self.names = {path.name for path in (place / "final").iterdir()}
        if (place / "final").exists():  # a crash between two renames leaves none for a moment
            merge_adapter(place / "final", base=self.base)
            assert {path.name for path in (place / "final").iterdir()} == self.names


class PtFile:
    """``RUN-sft_final.pt``; an older one is there."""

    def __init__(self, place: Path) -> None:
        self.config = ModernLMConfig(
            vocab_size=64, d_model=16, n_layers=1, n_heads=2, ffn_hidden_size=32, max_seq_len=16
        )
        self.model = ModernLMForCausalLM(self.config)

    def write(self, place: Path) -> None:
        place.mkdir(exist_ok=True)
        weights = dict(self.model.named_parameters())
        write_pt(place / "x.pt", config=self.config, weights=weights, optimizer={}, group={}, step=1, run_name="x")  # fmt: skip

    def check(self, place: Path) -> None:
        assert read_pt(place / "x.pt").step == 1


@pytest.fixture(params=[FinalModel, FinalAdapter, PtFile], ids=["final model", "final adapter", "pt file"])
def output(request, tmp_path):
    made = request.param(tmp_path)
    made.write(tmp_path / "0")
    made.check(tmp_path / "0")
    return made


def count(output, place: Path, monkeypatch) -> int:
    disk = CountingDisk()
    with monkeypatch.context() as patch:
        patch.setattr(storage, "disk", disk)
        output.write(place)
    assert "rename" in {what for what, _ in disk.log}
    return disk.count


def test_kill_at_every_operation_leaves_the_output_whole(output, tmp_path, monkeypatch):
    for at in range(1, count(output, tmp_path / "0", monkeypatch) + 1):
        place = tmp_path / str(at)
        output.write(place)

        def work(place=place, at=at):
            storage.disk = KillingDisk(at)
            output.write(place)

        assert run_forked(work) == -signal.SIGKILL
        output.check(place)
        output.write(place)
        output.check(place)


def test_full_disk_at_every_operation_is_an_expected_error_and_leaves_the_output_whole(
    output, tmp_path, monkeypatch
):
    total, refused = count(output, tmp_path / "0", monkeypatch), 0
    for at in range(1, total + 1):
        place = tmp_path / str(at)
        output.write(place)
        with monkeypatch.context() as patch:
            patch.setattr(storage, "disk", FailingDisk(at, errno.ENOSPC))
            with suppress(StorageError):
                output.write(place)
                refused -= 1
            refused += 1
        output.check(place)
    assert refused > total // 2  # the rest fails while it tidies up


def test_library_that_is_cut_off_at_any_byte_leaves_the_output_whole(output, tmp_path):
    output.write(tmp_path / "cut")
    for offset in (0, 1, 100, 4096, 9000):

        def work(offset=offset):
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (offset, resource.RLIM_INFINITY))
            with pytest.raises(SftError) as caught:
                output.write(tmp_path / "cut")
            assert caught.value.exit_code == 74

        assert run_forked(work) == 0
        output.check(tmp_path / "cut")
        assert not list((tmp_path / "cut").glob(".sft-*"))
