"""One training, in each of its processes: from its inputs to the model that it leaves behind."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from sftcli.config.schema.settings import Settings
from sftcli.config.schema.training import BestBy, TrainingSettings
from sftcli.data.quality.thresholds import LeftOut
from sftcli.errors import ResourceError, StoppedError
from sftcli.events import Ending, EventSink, ModelSaved, NeverStop, Notice, Session, StopFlag, Warned
from sftcli.memory_faults import MemoryErrors
from sftcli.modeling.formats.folder_write import save_model_folder
from sftcli.runtime import monotonic, seed_everything
from sftcli.services.diagnosis.verdict import Verdict
from sftcli.services.processes.peers import Peers
from sftcli.services.report.html import write_report
from sftcli.services.runs.earlier import Kept
from sftcli.services.runs.folder import RunFolder
from sftcli.services.runs.record import Decisions
from sftcli.services.train.answers import find_answers
from sftcli.services.train.build import TrainingParts, build_trainer
from sftcli.services.train.decisions import agree_on_decisions
from sftcli.services.train.earlier.scores import EarlierScorer
from sftcli.services.train.room import ease_into_memory
from sftcli.services.train.start.inputs import TrainingInputs, find_inputs
from sftcli.training.checkpoint.format import read_snapshot
from sftcli.training.checkpoint.names import list_checkpoints, step_of
from sftcli.training.checkpoint.store import DirectoryCheckpointStore
from sftcli.training.distributed.agreed_stop import AgreedStop
from sftcli.training.random_streams import start_stream
from sftcli.training.state import Part, TrainingSnapshot, TrainState
from sftcli.training.trainer import Trainer


@dataclass(frozen=True, slots=True, kw_only=True)
class Spent:
    """What a start of a run took, of how much where it was given a time, and its price where an hour has one."""

    seconds: float
    of_seconds: float | None
    price: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainOutcome:
    """How a run ended. Losses are nats per response token, the last one that of ``final``; None where nothing is held out."""

    run: str
    path: str
    ending: Ending
    step: int
    last_step: int
    first_heldout_loss: float | None = None
    last_heldout_loss: float | None = None
    last_heldout_step: int = -1  # of that loss; -1 where there is none
    final: str | None  # folder of the tuned model; None when stopped before the end
    seconds: float = 0.0
    heldout_rows: int = 0  # that both losses are of
    # What this start found changed: kind (machine, changes, allowed) -> name -> what it was and is.
    changed: Mapping[str, Mapping[str, tuple[str, str]]] = field(default_factory=dict)
    left_out: LeftOut | None = None  # rows that this start did not train on; None where it took all
    # Answers to held-out prompts, where some were given: what says which are right, and the mean scores, 0 to 1.
    measure: str = ""
    first_score: float | None = None
    last_score: float | None = None
    earlier: tuple[Kept, ...] = ()  # what became of the rows that earlier runs held out
    verdict: Verdict | None = None  # on the curves of the run up to the step of ``final``
    spent: Spent | None = None  # by this start, where a time or a price was given


@dataclass(slots=True, kw_only=True)
class TrainingRun:
    """A run on its way: ``open`` -> ``build`` -> ``fit`` -> ``keep_best`` -> ``save``. All its processes take the same steps.

    Who trains nothing, or has its inputs already, begins with ``take`` in place of ``open``.
    """

    trainer_type: ClassVar[type[Trainer]] = Trainer

    folder: RunFolder
    settings: Settings  # complete once there are inputs
    session: Session
    peers: Peers = field(default_factory=Peers)
    checkpoint: Path | None = None  # that it goes on from
    # Before anything is published: raises an error where another process has taken the run.
    check_owner: Callable[[], None] = lambda: None
    begun: float = field(default_factory=monotonic)  # when its command was
    inputs: TrainingInputs = field(init=False)
    parts: TrainingParts = field(init=False)

    @property
    def trainer(self) -> Trainer:
        """The trainer, once it is built."""
        return self.parts.trainer

    def open(self) -> None:
        """Find the inputs, in rank 0 before the others.

        Raises:
            MismatchError: This process has found others than the first one.
        """
        self.take(
            self.peers.rank_zero_first(
                lambda: find_inputs(self.settings, self.session, run=self.folder), self.session.stop
            )
        )
        self.peers.agree_on(self.inputs.identity)

    def take(self, inputs: TrainingInputs) -> None:
        """Train on ``inputs``."""
        self.inputs, self.settings = inputs, inputs.settings

    def end_at(self, steps: int, origin: str) -> None:
        """Let the trainer, which is built, end after ``steps``, which come from ``origin``."""
        self.take(self.inputs.ending_at(steps, origin))
        self.trainer.settings = self.settings.training
        store = self.trainer.store
        if isinstance(store, DirectoryCheckpointStore):
            store.fingerprints = dict(self.inputs.fingerprints)

    def build(self, decided: Decisions, *, is_verified: bool = False) -> None:
        """Build the trainer in the state of the start or of the checkpoint, with what is ``decided``.

        With ``is_verified`` this process has verified the checkpoint.

        Raises:
            MismatchError: Something cannot be had here as it is decided, or as the first process has it.
            ResourceError: A row, or the model with what its training keeps beside it, takes more memory than there is.
        """
        with MemoryErrors(_too_large):
            self._build(decided, is_verified=is_verified)

    def _build(self, decided: Decisions, *, is_verified: bool) -> None:
        group, seed = self.peers.group, self.settings.training.seed
        seed_everything(seed)
        self.parts = build_trainer(
            self.folder,
            self.inputs,
            self.session.emit,
            check_owner=self.check_owner,
            group=group,
            recorded=decided,
            trainer_type=self.trainer_type,
            notes=self.peers.notes,
        )
        self.trainer.answer = find_answers(self.inputs, self.parts, self.peers, self.session.emit)
        start_stream(group, seed=seed)
        if self.checkpoint is not None:
            self.trainer.restore(self._read(self.checkpoint, is_verified=is_verified))
        agree_on_decisions(self.parts.decisions, self.peers)
        ease_into_memory(self.parts, self.inputs)

    def _read(self, checkpoint: Path, *, is_verified: bool = False) -> TrainingSnapshot:
        """Read ``checkpoint``. Processes that share the weights out verify it together, as each reads a part of it only."""
        group = self.peers.group
        part = Part(number=group.rank, of=group.size) if self.trainer.weights.is_sharded else None
        return read_snapshot(checkpoint, is_verified=is_verified, part=part)

    @property
    def earlier(self) -> EarlierScorer | None:
        """What scores the rows that earlier runs held out, where there are some."""
        if self.inputs.earlier is None:
            return None
        return EarlierScorer(
            earlier=self.inputs.earlier,
            model=self.parts.model,
            trainer=self.trainer,
            pad_id=self.inputs.pad_id,
            computes_all=self.trainer.weights.is_sharded,
            emit=self.session.emit,
        )

    def fit(self, stop: StopFlag) -> Ending:
        """Train until the end, or until ``stop`` is set in any of the processes.

        Raises:
            ResourceError: Memory ran out.
            StoppedError: It was set before the first step.
        """
        with self.memory_errors():
            if self.earlier:
                self.earlier.begin(AgreedStop(stop=stop, group=self.peers.group))
            ending = self.trainer.fit(stop)
        if not self.trainer.state.step:
            raise StoppedError
        return ending

    def memory_errors(self) -> MemoryErrors:
        """Turn running out of memory, in the block that is begun with it, into an error that says what to do."""
        return memory_errors(
            self.trainer.tried,
            resume_command=f"sft resume {self.folder.argument}",
            way_down=self.trainer.way_down,
        )

    def keep_best(self) -> None:
        """Go back to the best checkpoint, if the settings request early stopping.

        Then score what earlier runs held out, for this is the final model.

        Raises:
            DataError: That checkpoint is damaged.
            ResourceError: Memory ran out.
        """
        self.check_owner()
        with self.memory_errors():
            self.peers.rank_zero_first(self._take_best)
            if self.earlier:
                self.earlier.end(NeverStop())

    def _take_best(self) -> None:
        emit, state = self.session.emit, self.trainer.state
        if not self.settings.training.early_stopping_evals or state.best_step == state.step:
            return
        if not state.best_step:
            by_check = self.settings.training.metric_for_best is BestBy.CHECK
            before = "held-out answers were best" if by_check else "held-out loss was lowest"
            emit(
                Warned(
                    text=f"{before} before training; final/ holds the last step. Lower "
                    "training.learning_rate, or mix in pretraining text"
                )
            )
            return
        found = [
            path for path in list_checkpoints(self.folder.checkpoints) if step_of(path) == state.best_step
        ]
        if not found:
            emit(
                Warned(text=f"step {state.best_step} was best but was not saved; final/ holds the last step")
            )
            return
        self.trainer.restore(self._read(found[0]))
        emit(Notice(text=f"final/ holds step {state.best_step}: {_why_best(state, self.settings.training)}"))

    def outcome(self, ending: Ending, step: int) -> TrainOutcome:
        """Return how the run ended at ``step``, without what only the process that led its training knows."""
        return TrainOutcome(
            run=self.folder.name,
            path=str(self.folder.path),
            ending=ending,
            step=step,
            last_step=self.settings.training.max_steps,
            final=str(self.folder.final) if ending.is_complete else None,
        )

    def save(self) -> None:
        """Write the final model; all processes have a part in it.

        Raises:
            ResourceError: Memory ran out.
        """
        if not self.peers.group.is_writer:
            if not self.trainer.weights.saves_parts:
                self.trainer.take_part_in_snapshot()
            return
        self.check_owner()
        with self.memory_errors():
            pt = self._write_final(self._whole())
        self.session.emit(ModelSaved(path=str(self.folder.final), pt=pt))

    def _whole(self) -> TrainingSnapshot:
        """Return the whole state. Where the processes save it in parts, it is read from the checkpoint of it, which they have written."""
        if not self.trainer.weights.saves_parts:
            return self.trainer.snapshot()
        saved = {step_of(path): path for path in list_checkpoints(self.folder.checkpoints)}
        return read_snapshot(saved[self.trainer.state.step], is_verified=True)

    def _write_final(self, snapshot: TrainingSnapshot) -> str:
        """Return the path of the file for the model's own pipeline, where it has one."""
        model, tokenizer = self.parts.model, self.inputs.prepared.tokenizer
        if self.parts.adapter is not None:
            self.parts.adapter.save(self.folder.final, snapshot)
            return ""
        pt = "" if self.parts.pt is None else self.parts.pt.write_final(snapshot)
        save_model_folder(
            model,
            source=self.inputs.located.folder,
            folder=self.folder.final,
            stop_ids=tokenizer.stop_ids,
            template=tokenizer.chosen_template,
            weights=snapshot.weights,
            streams=self.trainer.weights.saves_parts,
            unchanged={name for name, weight in model.named_parameters() if not weight.requires_grad},
        )
        return pt


def _why_best(state: TrainState, settings: TrainingSettings) -> str:
    """Return what made the best step so far the best."""
    if settings.metric_for_best is BestBy.CHECK and state.best_score is not None:
        return f"its held-out answers score {state.best_score:.1%}, the highest"
    return f"its held-out loss {state.best_heldout_loss:.4f} is the lowest"


def _too_large() -> ResourceError:
    """Return the error of a model that does not fit with what its training keeps beside it."""
    return ResourceError(
        "out of memory while the model is loaded and made ready to train",
        hint="weights, gradients and optimizer of a whole model take up to 18 bytes a weight: train an adapter (--lora, or on CUDA "
        "--adapter qlora, which packs the model in 4 bits), choose training.optimizer=adafactor or adamw_lean (10 bytes), set "
        "training.gradient_checkpointing, or choose a smaller model; if another program took the memory, run it again",
    )


def memory_errors(
    tried: Callable[[], str], *, resume_command: str, way_down: Callable[[], str] = str
) -> MemoryErrors:
    """Turn running out of memory inside the block into an error with flags, the one that costs no quality first.

    Args:
        tried: Returns in words with what it ran out, such as "micro-batches of 4 rows".
        resume_command: Goes on with the run.
        way_down: Returns the setting that goes on with less memory, such as "training.micro_batch_size=2", where there is one.

    Raises:
        ResourceError: Memory ran out; checkpoints are intact.
    """

    def told() -> ResourceError:
        setting = way_down()
        smaller = f"{resume_command} --set {setting} --allow-change {setting.partition('=')[0]}"
        return ResourceError(
            f"out of memory with {tried()}; checkpoints are intact",
            hint=(
                f"resume with smaller micro-batches and the same updates: {smaller}; or " if setting else ""
            )
            + "in a new run lower training.micro_batch_size, or training.micro_batch_tokens if set (the updates stay "
            "the same), set "
            "training.gradient_checkpointing, choose training.optimizer=adafactor or adamw_lean, train an adapter (--lora, or on CUDA "
            "--adapter qlora), lower data.max_tokens, or choose a "
            f"smaller model; if another program took the memory: {resume_command}",
        )

    return MemoryErrors(told)


def write_page(run: RunFolder, emit: EventSink, *, goes_on: bool = False) -> bool:
    """Write the page about ``run``, return whether that went well; a failure is told and no more."""
    try:
        write_report([run], run.report, goes_on=goes_on)
    except Exception as error:  # noqa: BLE001 - a page about the run must not take the run down
        emit(Warned(text=f"no report was written: {error}"))
        return False
    return True
