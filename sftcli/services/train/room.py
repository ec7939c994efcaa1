"""Whether the machine has the memory for the rows of a training, before its first step."""

from sftcli.config.schema.settings import Settings
from sftcli.config.schema.training import OPTIMIZERS
from sftcli.data.batches.batch import Batch, collate, piece_of
from sftcli.data.example import Example
from sftcli.data.prepared.store import ExampleTable
from sftcli.modeling.pass_memory import PassMemory, may_be_short, measure_pass, require_memory
from sftcli.runtime import free_memory_bytes, stop_keeping_memory
from sftcli.services.train.build import TrainingParts
from sftcli.services.train.start.inputs import TrainingInputs
from sftcli.training.loss import chunk_logits, minimized
from sftcli.training.optim.optimizer import optimizer_tensors
from sftcli.training.probes.choices import HeadLoss
from sftcli.training.probes.cost import longest_micro_batch
from sftcli.training.random_streams import capture_rng, restore_rng
from sftcli.training.trainer import Trainer

_FEWEST_TOKENS = 64  # of rows that are worth training on
_GAPS = 2.5  # what blocks of a long row and the gaps between them take, where freed memory is kept
_HEAD_COPIES = 3  # logits of a chunk in two precisions, and their gradient


def ease_into_memory(parts: TrainingParts, inputs: TrainingInputs) -> None:
    """Go down the ladder of a trainer until its largest micro-batch fits in the memory that is free.

    Processes that share weights out, or a batch, have to move together and are left as they are.

    Raises:
        ResourceError: The longest row does not fit by itself; it is named.
    """
    trainer, settings, dataset = parts.trainer, inputs.settings, inputs.prepared.dataset
    table, row = _longest(dataset.train, dataset.text if settings.data.text_fraction else None)
    length, most = int(table.num_tokens[row]), _most_tokens(trainer, settings, int(table.num_tokens[row]))
    later = _later_bytes(trainer, settings)
    if trainer.group.size > 1 or not may_be_short(parts.model, most, longest=length, more=later):
        return
    memory = _measured(trainer, table[row], inputs.pad_id)
    if _GAPS * _largest(trainer, memory) > _free(parts, later, most):
        stop_keeping_memory(trainer.device)
    while (free := _free(parts, later, most)) < _largest(trainer, memory):
        lower = trainer.ladder.below(trainer.state)
        if lower is None:
            break
        trainer.ease(lower, why="would run out of memory")
        if lower.checkpoints_activations:
            memory = _measured(trainer, table[row], inputs.pad_id)
    require_memory(
        memory, free, row=str(table[row].origin), tokens=length, doing="training on it", hint=_way_out
    )


def _free(parts: TrainingParts, later: int, tokens: int) -> int:
    return free_memory_bytes() - later - _head_bytes(parts, tokens)


def _largest(trainer: Trainer, memory: PassMemory) -> int:
    """Return what the largest micro-batch takes."""

    def need(batch: Batch) -> int:
        return memory.at(batch.input_ids.shape[1], rows=batch.input_ids.shape[0])

    return need(longest_micro_batch(trainer, trainer.settings.max_steps, size=need)[0])


def _way_out(longest: int) -> str:
    others = "training.optimizer=adafactor, --lora or a smaller model need less"
    if longest < _FEWEST_TOKENS:
        return others
    return f"leave such rows out with --max-tokens {longest} --overlong drop, or cut them with --overlong truncate; {others}"


def _longest(*tables: ExampleTable | None) -> tuple[ExampleTable, int]:
    """Return the table that holds the longest row, and its number there."""
    found = [
        (max(range(len(table)), key=lambda row: table.num_tokens[row]), table)
        for table in tables
        if table is not None and len(table)
    ]
    row, table = max(found, key=lambda one: one[1].num_tokens[one[0]])
    return table, row


def _most_tokens(trainer: Trainer, settings: Settings, longest: int) -> int:
    """Return how many tokens a micro-batch has at most."""
    return max(longest, trainer.plan.micro_batch_tokens or settings.training.micro_batch_size * longest)


def _later_bytes(trainer: Trainer, settings: Settings) -> int:
    """Return what the optimizer and the copy of a checkpoint will take that is not there yet."""
    masters = trainer.weights.masters
    numbers = sum(master.numel() for master in masters.values())
    state = round(4 * OPTIMIZERS[settings.training.optimizer].state_share * numbers)
    there = sum(tensor.nbytes for tensor in optimizer_tensors(trainer.optimizer, masters).values())
    copy = 4 * numbers + state if trainer.checkpoint.in_background else 0
    return max(0, state - there) + copy


def _head_bytes(parts: TrainingParts, tokens: int) -> int:
    """Return what the head takes of a chunk of positions; whole logits are part of what is measured."""
    vocabulary = int(parts.model.config.get_text_config().vocab_size)
    return (
        4 * _HEAD_COPIES * min(chunk_logits(parts.trainer.device), tokens * vocabulary)
        if parts.decisions.head == HeadLoss.LEAN
        else 0
    )


def _measured(trainer: Trainer, example: Example, pad_id: int) -> PassMemory:
    """Return what passes over pieces of ``example`` take; the trainer is left as it was."""
    rng = capture_rng()
    trainer.weights.model.train()

    def take(tokens: int) -> None:
        batch = collate([piece_of(example, tokens)], example_ids=[0], pad_id=pad_id)
        if trainer.before_step:
            trainer.before_step([batch])
        minimized(trainer.batch_loss(batch)).backward()

    try:
        return measure_pass(take, len(example.input_ids))
    finally:
        trainer.discard_gradients()
        restore_rng(rng)
