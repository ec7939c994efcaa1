"""Laws of the trainer: cutting, stopping and resuming a run change nothing about where it ends."""

import threading

import pytest
import torch

from sftcli.config.schema.run import CheckpointSettings
from sftcli.config.schema.training import Checkpointing, TrainingSettings
from sftcli.data.batches.batch import BatchPlan, TextShare, collate
from sftcli.errors import DivergedError
from sftcli.events import CheckpointSaved, Ending, FitEnded, HeldoutDone, NeverStop, StepDone, Warned
from sftcli.modeling.load import load_model
from sftcli.training.checkpoint.format import read_snapshot
from sftcli.training.checkpoint.names import list_checkpoints
from sftcli.training.checkpoint.store import DirectoryCheckpointStore
from sftcli.training.embeddings import add_embedding_noise, embedding_names, freeze_embeddings
from sftcli.training.loss import NllSum, response_nll_sum
from sftcli.training.optim.optimizer import make_optimizer, optimizer_tensors
from sftcli.training.weights.masters import MasterWeights
from tests.support.recording import MemoryStore, RecordingSink, StopAfter, assert_equal_bits
from tests.support.tiny_model import build_tiny_model
from tests.support.training import CPU, PAD_ID, build_trainer, random_examples, tiny_llama


def settings(**changes) -> TrainingSettings:
    values = {
        "max_steps": 6,
        "batch_size": 8,
        "micro_batch_size": 8,
        "learning_rate": 1e-2,
        "warmup_steps": 2,
    }
    return TrainingSettings(**(values | changes))


class FixedPlan:
    """One global batch of eight examples cut into micro-batches of the given sizes."""

    def __init__(self, sizes):
        self.sizes = sizes

    def window(self, step):
        examples, batches, begin = random_examples(8), [], 0
        for size in self.sizes:
            ids = range(begin, begin + size)
            batches.append(collate([examples[i] for i in ids], example_ids=ids, pad_id=PAD_ID))
            begin += size
        return batches

    def epoch(self, step):
        return float(step)


@pytest.mark.parametrize("sizes", [(4, 4), (5, 2, 1), (1,) * 8])
def test_one_step_does_not_depend_on_how_the_batch_is_cut(sizes):
    ends = []
    for cut in ((8,), sizes):
        # AdamW's first step is the sign of the gradient where epsilon is smaller than it; a larger one keeps it smooth.
        once = settings(max_steps=1, warmup_steps=0, learning_rate=1e-3, epsilon=1e-4)
        trainer = build_trainer(settings=once, store=MemoryStore(), emit=RecordingSink())
        trainer.plan = FixedPlan(cut)
        trainer.fit(NeverStop())
        ends.append(trainer.snapshot().weights)
    for name, tensor in ends[0].items():
        torch.testing.assert_close(tensor, ends[1][name], atol=1e-6, rtol=0, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stop_at", [1, 3, 5])
def test_stopped_and_resumed_equals_uninterrupted_bit_for_bit(tmp_path, stop_at: int, dtype: torch.dtype):
    def trainer(store, sink):
        return build_trainer(
            settings=settings(),
            store=store,
            emit=sink,
            model=tiny_llama(dropout=0.2),
            heldout=random_examples(5, seed=1),
            dtype=dtype,
        )

    torch.manual_seed(0)
    whole_store, whole_sink = MemoryStore(), RecordingSink()
    assert trainer(whole_store, whole_sink).fit(NeverStop()) is Ending.FINISHED

    torch.manual_seed(0)
    disk = DirectoryCheckpointStore(
        tmp_path,
        settings=CheckpointSettings(keep_last=2),
        write_model_files=lambda folder: None,
        fingerprints={},
    )
    first_sink, second_sink, second_store = RecordingSink(), RecordingSink(), MemoryStore()
    first = trainer(disk, first_sink)
    first.heldout_loss = None
    assert first.fit(StopAfter(stop_at)) is Ending.STOPPED

    torch.manual_seed(123)  # the resumed process starts from other random numbers
    second = trainer(second_store, second_sink)
    second.restore(read_snapshot(list_checkpoints(tmp_path)[-1]))
    assert second.fit(NeverStop()) is Ending.FINISHED

    assert_equal_bits(whole_store.snapshots[6], second_store.snapshots[6])
    losses = [event.loss for event in first_sink.of(StepDone) + second_sink.of(StepDone)]
    assert losses == [event.loss for event in whole_sink.of(StepDone)]


@pytest.mark.parametrize("optimizer", ["adafactor", "adamw_8bit", "muon"])
@pytest.mark.parametrize("stop_at", [1, 4])
def test_every_optimizer_goes_on_bit_for_bit(tmp_path, optimizer: str, stop_at: int):
    if optimizer == "adamw_8bit":
        pytest.importorskip("bitsandbytes", reason="the extra 8bit is not installed")

    def trainer(store):
        return build_trainer(settings=settings(optimizer=optimizer), store=store, emit=RecordingSink())

    whole, disk, rest = MemoryStore(), checkpoints_under(tmp_path), MemoryStore()
    trainer(whole).fit(NeverStop())
    trainer(disk).fit(StopAfter(stop_at))
    second = trainer(rest)
    second.restore(read_snapshot(list_checkpoints(tmp_path)[-1]))
    second.fit(NeverStop())
    assert_equal_bits(whole.snapshots[6], rest.snapshots[6])
    assert not all(
        torch.equal(tensor, tiny_llama().get_parameter(name))
        for name, tensor in whole.snapshots[6].weights.items()
    )


def checkpoints_under(folder):
    return DirectoryCheckpointStore(
        folder,
        settings=CheckpointSettings(keep_last=2),
        write_model_files=lambda folder: None,
        fingerprints={},
    )


@pytest.mark.parametrize(("optimizer", "share"), [("adafactor", 0.1), ("adamw_8bit", 0.35)])
def test_lean_optimizers_keep_less_state_than_adamw(optimizer: str, share: float):
    if optimizer == "adamw_8bit":
        pytest.importorskip("bitsandbytes", reason="the extra 8bit is not installed")
    sizes = []
    for name in ("adamw", optimizer):
        weight = torch.nn.Parameter(torch.randn(256, 256))
        weight.grad = torch.randn(256, 256)
        made = make_optimizer({"weight": weight}, settings(optimizer=name))
        made.step()
        state = optimizer_tensors(made, {"weight": weight})
        sizes.append(sum(tensor.numel() * tensor.element_size() for tensor in state.values()))
    assert sizes[1] < share * sizes[0]


def test_muon_takes_the_matrices_of_layers_and_adamw_all_else():
    torch.manual_seed(0)
    model = tiny_llama()
    masters = dict(model.named_parameters())
    own = settings(optimizer="muon", learning_rate=1e-3, weight_decay=0.1)
    optimizer = make_optimizer(masters, own, embeddings=embedding_names(model))
    theirs = {name: torch.nn.Parameter(weight.detach().clone()) for name, weight in masters.items()}
    matrices = [name for name, weight in theirs.items() if weight.ndim == 2 and "layers" in name]
    plain = [name for name in theirs if name not in matrices]
    muon = torch.optim.Muon(
        [theirs[name] for name in matrices],
        lr=1e-3, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw",
    )  # fmt: skip
    adamw = torch.optim.AdamW(
        [
            {"params": [theirs[name]], "weight_decay": 0.1 if theirs[name].ndim > 1 else 0.0}
            for name in plain
        ],
        lr=1e-3, betas=(own.beta1, own.beta2), eps=own.epsilon,
    )  # fmt: skip
    for _ in range(3):
        for name, weight in masters.items():
            weight.grad = torch.randn_like(weight)
            theirs[name].grad = weight.grad.clone()
        optimizer.step()
        muon.step()
        adamw.step()
    for name, weight in masters.items():
        torch.testing.assert_close(weight, theirs[name], rtol=1e-6, atol=1e-7)
    assert {name for name in masters if "momentum_buffer" in optimizer.state[masters[name]]} == set(matrices)


def test_resume_with_other_random_state_differs_so_the_law_above_can_fail(tmp_path):
    ends = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        store = MemoryStore()
        build_trainer(
            settings=settings(), store=store, emit=RecordingSink(), model=tiny_llama(dropout=0.2)
        ).fit(NeverStop())
        ends.append(store.snapshots[6].weights)
    assert any(not torch.equal(tensor, ends[1][name]) for name, tensor in ends[0].items())


def test_every_example_comes_once_an_epoch_in_an_order_of_the_seed():
    examples = random_examples(10)
    plan = BatchPlan(examples, batch_size=4, micro_batch_size=4, pad_id=PAD_ID, seed=7)
    seen = [index for step in range(5) for index in plan.example_ids(step)]
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert seen[:10] != seen[10:]
    # The order is part of what a seed means: it must be the same on every machine and in every release.
    assert seen[:10] == [4, 5, 9, 8, 1, 7, 6, 0, 2, 3]


def test_window_holds_the_examples_of_its_step_and_no_others():
    plan = BatchPlan(random_examples(10), batch_size=6, micro_batch_size=4, pad_id=PAD_ID, seed=0)
    window = plan.window(1)
    assert sum(len(batch.example_ids) for batch in window) == 6
    assert max(len(batch.example_ids) for batch in window) <= 4
    assert sorted(index for batch in window for index in batch.example_ids) == sorted(plan.example_ids(1))


def test_steps_of_text_hold_texts_in_an_order_of_their_own_and_leave_no_row_out():
    rows, texts = random_examples(10), random_examples(6, seed=5)
    plan = BatchPlan(
        rows,
        batch_size=2,
        micro_batch_size=2,
        pad_id=PAD_ID,
        seed=0,
        text=TextShare(examples=texts, fraction=0.2),
    )
    seen = {True: [], False: []}
    for step in range(15):
        for batch in plan.window(step):
            seen[batch.is_text] += [plan.example(index) for index in batch.example_ids]
    assert len(seen[True]) == 6
    assert {id(example) for example in seen[True]} == {id(example) for example in texts}
    assert {id(example) for example in seen[False][:10]} == {id(example) for example in rows}
    assert plan.epoch(15) == 12 * 2 / 10


def test_update_that_pure_bfloat16_loses_is_kept_by_the_masters():
    model = tiny_llama()
    trainer = build_trainer(
        settings=settings(learning_rate=1e-5, warmup_steps=0, max_steps=4),
        store=MemoryStore(),
        emit=RecordingSink(),
        model=model,
        dtype=torch.bfloat16,
    )
    name = "model.norm.weight"  # near 1, where bfloat16 numbers stand 0.0078 apart
    before = trainer.weights.masters[name].detach().clone()
    trainer.fit(NeverStop())
    assert (trainer.weights.masters[name] != before).all()
    assert torch.equal(before.bfloat16(), (before.bfloat16() - 1e-5).bfloat16())


def test_nonfinite_step_is_skipped_named_and_leaves_the_weights():
    sink = RecordingSink()
    trainer = build_trainer(settings=settings(max_steps=3), store=MemoryStore(), emit=sink)
    trainer.name_row = "random:{}".format
    whole_loss = trainer.batch_loss

    def poisoned(batch):
        return whole_loss(batch) * (float("nan") if trainer.state.step == 1 else 1.0)

    trainer.batch_loss = poisoned
    trainer.take_step()
    before = trainer.snapshot().weights["model.norm.weight"].clone()
    skipped = trainer.take_step()
    assert not skipped.applied
    assert torch.equal(before, trainer.snapshot().weights["model.norm.weight"])
    (warning,) = sink.of(Warned)
    assert "step 2 skipped" in warning.text
    assert "training rows random:" in warning.text
    assert "more" not in warning.text  # there are eight
    assert trainer.take_step().applied


def test_three_nonfinite_steps_in_a_row_end_the_run():
    trainer = build_trainer(settings=settings(), store=MemoryStore(), emit=RecordingSink())
    whole_loss = trainer.batch_loss
    trainer.batch_loss = lambda batch: whole_loss(batch) * float("inf")
    with pytest.raises(DivergedError, match="3 steps in a row"):
        trainer.fit(NeverStop())
    assert trainer.state.step == 3


def test_heldout_loss_is_measured_before_during_and_after():
    sink = RecordingSink()
    build_trainer(
        settings=settings(eval_every_steps=4),
        store=MemoryStore(),
        emit=sink,
        heldout=random_examples(4, seed=9),
    ).fit(NeverStop())
    assert [event.step for event in sink.of(HeldoutDone)] == [0, 4, 6]


def test_checkpoints_are_saved_when_due_and_old_ones_go(tmp_path):
    store = DirectoryCheckpointStore(
        tmp_path,
        settings=CheckpointSettings(keep_last=2),
        write_model_files=lambda folder: None,
        fingerprints={},
    )
    build_trainer(
        settings=settings(max_steps=5),
        store=store,
        emit=RecordingSink(),
        checkpoint=CheckpointSettings(every_steps=2, keep_last=2),
    ).fit(NeverStop())
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000004", "step-00000005"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000004", "step-00000005"]


def test_weight_decay_applies_to_matrices_only():
    weights = MasterWeights(tiny_llama(), compute_dtype=torch.float32)
    decayed, undecayed = make_optimizer(weights.masters, settings(weight_decay=0.1)).param_groups
    assert all(parameter.ndim == 2 for parameter in decayed["params"])
    assert all(parameter.ndim == 1 for parameter in undecayed["params"])
    assert (decayed["weight_decay"], undecayed["weight_decay"]) == (0.1, 0.0)


def test_run_ends_when_heldout_loss_falls_no_more_and_each_best_state_is_saved():
    losses = iter([3.0, 2.0, 1.5, 1.4995, 1.6, 1.0])
    store, sink = MemoryStore(), RecordingSink()
    trainer = early_trainer(store, sink, losses)
    assert trainer.fit(NeverStop()) is Ending.PLATEAU
    assert trainer.state.step == 4
    assert trainer.state.best_step == 3
    assert {1, 2, 3} <= set(store.snapshots)
    assert sink.of(FitEnded)[0].ending is Ending.PLATEAU


def test_patience_goes_on_where_it_was_when_a_run_is_resumed():
    store = MemoryStore()
    first = early_trainer(store, RecordingSink(), iter([3.0, 2.0, 2.1]))
    first.fit(StopAfter(4))
    assert first.state.stale_evals == 1
    second = early_trainer(MemoryStore(), RecordingSink(), iter([2.2, 1.0, 1.0]))
    second.restore(store.snapshots[first.state.step])
    assert second.fit(NeverStop()) is Ending.PLATEAU
    assert second.state.step == first.state.step + 1


def early_trainer(store, sink, losses):
    early = settings(max_steps=9, eval_every_steps=1, early_stopping_evals=2)
    trainer = build_trainer(settings=early, store=store, emit=sink, heldout=random_examples(2, seed=1))
    trainer.heldout_loss = lambda stop: NllSum(nll=next(losses), response_tokens=1, rows=1)
    return trainer


def test_noise_on_embeddings_moves_training_and_never_scoring():
    losses = []
    for alpha in (0.0, 5.0):
        sink = RecordingSink()
        torch.manual_seed(0)
        trainer = build_trainer(
            settings=settings(max_steps=1, warmup_steps=0),
            store=MemoryStore(),
            emit=sink,
            model=tiny_llama(),
            heldout=random_examples(3, seed=1),
        )
        if alpha:  # last, as in a run: trials of speedups see no noise
            add_embedding_noise(trainer.weights.model, alpha)
        trainer.fit(NeverStop())
        losses.append((sink.of(HeldoutDone)[0].loss, sink.of(StepDone)[0].loss))
    assert losses[0][0] == losses[1][0]
    assert losses[0][1] != losses[1][1]
    assert losses[0][1] == pytest.approx(losses[1][1], rel=0.05)


def test_noise_on_embeddings_goes_on_bit_for_bit(tmp_path):
    def trainer(store):
        model = tiny_llama()
        add_embedding_noise(model, 5.0)
        return build_trainer(settings=settings(), store=store, emit=RecordingSink(), model=model)

    torch.manual_seed(0)
    whole, rest = MemoryStore(), MemoryStore()
    trainer(whole).fit(NeverStop())
    torch.manual_seed(0)
    trainer(checkpoints_under(tmp_path)).fit(StopAfter(3))
    torch.manual_seed(9)
    second = trainer(rest)
    second.restore(read_snapshot(list_checkpoints(tmp_path)[-1]))
    second.fit(NeverStop())
    for name, tensor in whole.snapshots[6].weights.items():
        assert torch.equal(tensor, rest.snapshots[6].weights[name])


class GatedStore(MemoryStore):
    """A store whose disk is slow: a save is durable when the gate is opened."""

    def __init__(self):
        super().__init__()
        self.gate = threading.Event()

    def save(self, snapshot):
        assert self.gate.wait(timeout=30)
        return super().save(snapshot)


def test_background_save_is_announced_when_it_is_durable_and_not_before():
    store, steps_meanwhile = GatedStore(), []

    class Sink(RecordingSink):
        def __call__(self, event):
            super().__call__(event)
            if isinstance(event, CheckpointSaved):
                assert event.step in store.snapshots
            if isinstance(event, StepDone) and not store.gate.is_set():
                assert self.of(CheckpointSaved) == []
                if event.step > 2:
                    steps_meanwhile.append(event.step)
                if event.step == 5:
                    store.gate.set()

    sink = Sink()
    checkpoint = CheckpointSettings(every_steps=0, in_background=True)
    trainer = build_trainer(settings=settings(), store=store, emit=sink, checkpoint=checkpoint)
    stop = SaveOnce(after=2, sink=sink)
    assert trainer.fit(stop) is Ending.FINISHED
    assert steps_meanwhile == [3, 4, 5]
    assert [event.step for event in sink.of(CheckpointSaved)] == [2, 6]


class SaveOnce(NeverStop):
    """Asks for a save once a step is done."""

    def __init__(self, after, sink):
        self.after, self.sink, self.is_done = after, sink, False

    def save_requested(self):
        due = len(self.sink.of(StepDone)) == self.after and not self.is_done
        self.is_done |= due
        return due


def test_background_save_holds_the_state_of_its_step_and_not_a_later_one():
    ends = []
    for background in (False, True):
        store = MemoryStore()
        build_trainer(
            settings=settings(),
            store=store,
            emit=RecordingSink(),
            model=tiny_llama(dropout=0.0),
            checkpoint=CheckpointSettings(every_steps=1, in_background=background),
        ).fit(NeverStop())
        ends.append(store.snapshots)
    for step in range(1, 7):
        for name, tensor in ends[0][step].weights.items():
            assert torch.equal(tensor, ends[1][step].weights[name])
        for name, tensor in ends[0][step].optimizer.items():
            assert torch.equal(tensor, ends[1][step].optimizer[name])


def test_frozen_embeddings_stay_and_are_part_of_the_checkpoint(tmp_path):
    model = tiny_llama()
    freeze_embeddings(model)
    before = model.model.embed_tokens.weight.detach().clone()
    store = DirectoryCheckpointStore(
        tmp_path,
        settings=CheckpointSettings(keep_last=1),
        write_model_files=lambda folder: None,
        fingerprints={},
    )
    trainer = build_trainer(settings=settings(), store=store, emit=RecordingSink(), model=model)
    trainer.fit(NeverStop())
    assert torch.equal(model.model.embed_tokens.weight, before)
    saved = read_snapshot(list_checkpoints(tmp_path)[-1]).weights
    assert torch.equal(saved["model.embed_tokens.weight"], before)
    assert not any("embed" in name for name in trainer.snapshot().optimizer)


def test_gradient_checkpointing_gives_the_same_gradients_and_is_off_when_scoring(tmp_path):
    folder = build_tiny_model(tmp_path / "model")
    batch = FixedPlan((8,)).window(0)[0]
    gradients, kept = [], []
    for checkpointing in (Checkpointing.OFF, Checkpointing.LAYERS):
        model = load_model(folder, dtype=torch.float32, device=CPU, checkpointing=checkpointing).train()
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor, saved=saved: saved.append(tensor.numel()) or tensor, lambda tensor: tensor
        ):
            nll = response_nll_sum(model, batch)
        nll.backward()
        kept.append(sum(saved))
        gradients.append({name: weight.grad for name, weight in model.named_parameters()})
    assert kept[1] < kept[0] / 2
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name
