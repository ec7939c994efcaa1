"""The flags that set settings: a row of ``FLAGS`` each. To give one to a command, name it in the command's list.

Imports nothing heavier than Typer, because it is read before every command, ``--help`` and shell completion included.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import KW_ONLY, dataclass, field, replace
from enum import StrEnum
from inspect import Parameter
from keyword import iskeyword
from typing import TYPE_CHECKING, Annotated

import typer

from sftcli.cli.options import complete
from sftcli.figures import fraction_of, seconds_of

if TYPE_CHECKING:
    from typer.models import OptionInfo

    from sftcli.config.layers import Override

MAIN_PANEL = "Main options"
ROWS_PANEL = "Rows"
TRAINING_PANEL = "Training"
MODEL_PANEL = "Model"
SETTINGS_PANEL = "Settings"
ADAPTER_PANEL = "Adapter"
SAMPLING_PANEL = "Sampling"
RUN_PANEL = "Run"


class AdapterChoice(StrEnum):
    """Adapters as people call them."""

    NONE = "none"
    LORA = "lora"
    DORA = "dora"
    RSLORA = "rslora"
    QLORA = "qlora"


class PrecisionChoice(StrEnum):
    """Of matrix products."""

    AUTO = "auto"
    BF16 = "bf16"
    FP16 = "fp16"
    FP32 = "fp32"


def _one_of_setting(key: str) -> Callable[[object], object]:
    """Return a callback that checks words of a flag against the setting ``key``, together with the other flags.

    The settings would refuse them too, but only after the flags that Typer checks.
    """

    def check(value: object) -> object:
        if value:
            from sftcli.config.fields import choices, element_choices
            from sftcli.config.schema.settings import FIELDS

            words = choices(FIELDS[key]) or element_choices(FIELDS[key])
            for word in value if isinstance(value, list) else [value]:
                if word not in words:
                    raise typer.BadParameter(f"{word!r} is not one of {', '.join(map(repr, words))}")
        return value

    return check


def _readable(reads: Callable[[str], object]) -> Callable[[object], object]:
    """Return a callback that refuses what ``reads`` cannot read, together with the other flags."""

    def check(value: object) -> object:
        if value is not None:
            try:
                reads(str(value))
            except ValueError as error:
                raise typer.BadParameter(str(error)) from error
        return value

    return check


def _minutes(text: str) -> float:
    return seconds_of(text) / 60


@dataclass(frozen=True, slots=True, eq=False)
class Flag:
    """A flag that sets a setting.

    Attributes:
        names: As they are typed, the long one first: ``--data -d``.
        key: The setting.
        kind: Type of the value; a ``bool`` is set by the name alone, a list by each repetition.
        checks_words: Whether the value must be one of the words that the setting accepts.
        means: Settings that a value stands for, where that is not the value itself for ``key``.
        reads: Makes the value for ``key`` of the text that was given; its ``ValueError`` says what is wrong with that.
    """

    names: str
    key: str
    _: KW_ONLY
    help: str
    panel: str | None = None
    kind: type = str
    metavar: str | None = None
    min: float | None = None
    max: float | None = None
    complete: Callable[[str], list[str | tuple[str, str]]] | None = None
    checks_words: bool = False
    means: Mapping[object, Mapping[str, object]] = field(default_factory=dict)
    reads: Callable[[str], object] | None = None

    @property
    def name(self) -> str:
        """The long name."""
        return self.names.split()[0]

    @property
    def parameter_name(self) -> str:
        """The name of the parameter that the flag is to Typer: its own, unless Python has the word."""
        name = self.name.removeprefix("--").replace("-", "_")
        return f"{name}_" if iskeyword(name) else name

    @property
    def option(self) -> "OptionInfo":
        """The flag as Typer wants it within ``Annotated``."""
        option: OptionInfo = typer.Option(
            *self.names.split(),
            metavar=self.metavar,
            min=self.min,
            max=self.max,
            autocompletion=self.complete,
            callback=_one_of_setting(self.key) if self.checks_words else self.reads and _readable(self.reads),
            help=self.help,
            rich_help_panel=self.panel,
            show_default=False,
        )
        return option

    @property
    def parameter(self) -> Parameter:
        """The flag as a parameter of a command."""
        kind, default = (bool, False) if self.kind is bool else (self.kind | None, None)
        return Parameter(
            self.parameter_name,
            Parameter.KEYWORD_ONLY,
            default=default,
            annotation=Annotated[kind, self.option],
        )

    def overrides(self, given: object) -> "Iterator[Override]":
        """Yield what the value ``given`` sets; nothing where the user gave none."""
        from sftcli.config.layers import Override

        if given is None or given is False or given == []:
            return
        value = given.value if isinstance(given, StrEnum) else given
        origin = f"{self.name} {value}" if self.means and value is not True else self.name
        if self.reads is not None:
            value = self.reads(str(value))
        meant = self.means[value] if self.means else {self.key: value}
        for key, setting in meant.items():
            yield Override(key=key, value=setting, origin=origin)


@dataclass(frozen=True, slots=True)
class Flags:
    """What the user gave for each flag of a command."""

    values: Mapping[Flag, object]

    def with_value(self, name: str, value: object) -> "Flags":
        """Return these and the flag ``name`` as if it had been given ``value``."""
        return Flags({**self.values, FLAGS[name]: value})

    def words(self) -> list[str]:
        """Return the words of a command line that give the same."""
        given = [(name, self.values[flag]) for name, flag in FLAGS.items() if flag in self.values]
        return [
            word
            for name, value in given
            if value is not None and value is not False
            for one in (value if isinstance(value, list) else [value])
            for word in ((name,) if one is True else (name, str(one)))
        ]

    def overrides(self) -> "list[Override]":
        """Return the settings that the user gave."""
        return [override for flag, given in self.values.items() for override in flag.overrides(given)]


_ADAPTERS: Mapping[object, Mapping[str, object]] = {
    "none": {"adapter.kind": "none"},
    "lora": {"adapter.kind": "lora"},
    "dora": {"adapter.kind": "dora"},
    "rslora": {"adapter.kind": "lora", "adapter.rslora": True},
    "qlora": {"adapter.kind": "lora", "adapter.quantize": "4bit"},
}

# fmt: off
_ROWS: Mapping[str | None, tuple[Flag, ...]] = {
    MAIN_PANEL: (
        Flag("--data -d", "data.sources", kind=list[str], metavar="SOURCE", complete=complete.rows,
             help="File, folder or hub name of rows to use; SOURCE:N takes N rows. Repeatable."),
        Flag("--model -m", "model.name", metavar="MODEL", complete=complete.models,
             help="Alias, hub name, folder, .gguf or .pt file of a model."),
        Flag("--run", "run.name", metavar="NAME",
             help="Name of the run folder; by default from preset and time."),
        Flag("--lora", "adapter.kind", kind=bool, means={True: _ADAPTERS["lora"]},
             help="Train a LoRA adapter instead of the full model."),
        Flag("--learning-rate --lr", "training.learning_rate", kind=float, metavar="X",
             help="Peak learning rate."),
        Flag("--epochs", "training.epochs", kind=float, metavar="N",
             help="Passes over the rows to train."),
        Flag("--batch-size", "training.batch_size", kind=int, metavar="N", min=1,
             help="Rows of an optimizer step, on all devices together."),
        Flag("--max-steps", "training.max_steps", kind=int, metavar="N", min=1,
             help="Optimizer steps to train."),
        Flag("--max-time", "training.max_minutes", metavar="TIME", reads=_minutes,
             help="Train for this long, as in `90s`, `30m` or `1h30m`: the steps that fit are counted at the start."),
    ),
    ROWS_PANEL: (
        Flag("--heldout", "data.heldout_sources", kind=list[str], metavar="SOURCE", complete=complete.rows,
             help="Held-out rows; by default a share of the data is held out. Repeatable."),
        Flag("--replay", "data.replay", metavar="SHARE", reads=fraction_of,
             help="Training on from a run: make this share of the training rows rows of that run, as in `--replay 20%`."),
        Flag("--as-text", "data.as_text", kind=bool,
             help="Rows of pretraining text are meant to be trained whole: do not warn."),
        Flag("--map", "data.renames", kind=list[str], metavar="OURS=THEIRS",
             help="Read a column under another name, as in `--map prompt=question`. Repeatable."),
        Flag("--ignore", "data.ignored_keys", kind=list[str], metavar="KEY",
             help="Drop a key that is refused because it changes what rows mean, as in `--ignore history`. Repeatable."),
        Flag("--where", "data.where", kind=list[str], metavar="CONDITION",
             help="Use only rows that meet a condition on a column, as in `--where 'quality>=4'`. Repeatable; all must hold."),
        Flag("--fixes", "data.fixes", metavar="FILE",
             help="Leave rows out or replace their answers, as the page of `sft report --rows` has written to this file."),
        Flag("--duplicates", "data.duplicates", metavar="keep|drop", checks_words=True,
             help="Keep rows equal to another one, or drop all but one of them."),
        Flag("--near-duplicates", "data.near_duplicates", metavar="keep|drop", checks_words=True,
             help="Keep rows nearly equal to another one, or drop all but one of them."),
        Flag("--strip-stop-text", "data.strip_stop_text", kind=bool,
             help="Take away the text of a stop token at the end of answers."),
        Flag("--template", "data.template", metavar="NAME",
             help="Chat template: chatml, alpaca, modern-llm or a file of Jinja text; the tokenizer's own without it."),
        Flag("--template-var", "data.template_variables", kind=list[str], metavar="NAME=VALUE",
             help="Set a variable of the chat template, as in `--template-var enable_thinking=false`. Repeatable."),
        Flag("--train-on", "data.train_on", metavar="all|last|each", checks_words=True,
             help="Train all assistant turns of a conversation, the last one only, or each in an example of its own."),
        Flag("--first-turn", "data.first_turn", metavar="reject|untrained|trained", checks_words=True,
             help="Where the assistant begins a conversation: reject it, keep that turn without loss, or train it."),
        Flag("--thinking", "data.thinking", metavar="train|keep|drop", checks_words=True,
             help="Train the thinking before answers, keep it in the context without loss, or leave it out."),
        Flag("--max-tokens", "data.max_tokens", kind=int, metavar="N", min=8,
             help="Maximum row length in tokens; longer rows are dropped and counted."),
        Flag("--overlong", "data.overlong", metavar="drop|truncate|error", checks_words=True,
             help="What to do with longer rows: drop them, truncate them to the turns that fit, or fail."),
        Flag("--allow-leak", "data.allow_leak", kind=bool,
             help="Continue even if held-out rows are also trained on."),
        Flag("--strict", "data.strict", kind=bool,
             help="Exit with 3 if rows are rejected, truncated, duplicated or broken, or share prompts with held-out rows."),
    ),
    TRAINING_PANEL: (
        Flag("--eval-every", "training.eval_every_steps", kind=int, metavar="N", min=0,
             help="Steps between evaluations on held-out rows; 0 for none but the first and the last."),
        Flag("--save-every", "checkpoint.every_steps", kind=int, metavar="N", min=0,
             help="Steps between checkpoints; 0 saves by time alone."),
        Flag("--packing", "training.packing", metavar="auto|on|off", checks_words=True,
             help="Pack several rows into one, isolated by attention; auto packs if the model keeps them apart."),
        Flag("--processes", "training.processes", kind=int, metavar="N", min=1,
             help="Split each step across this many processes on this machine, one per GPU."),
    ),
    MODEL_PANEL: (
        Flag("--tokenizer", "model.tokenizer", metavar="NAME_OR_DIR",
             help="Tokenizer for a .pt model, which has none; gpt2 by default."),
        Flag("--trust-remote-code", "model.trust_remote_code", kind=bool,
             help="Run the code of a hub model, at the full commit in model.revision. Read it first."),
    ),
    ADAPTER_PANEL: (
        Flag("--adapter", "adapter.kind", kind=AdapterChoice, means=_ADAPTERS,
             help="Train an adapter of this kind; `qlora` keeps the model below it in 4 bits, on CUDA."),
        Flag("--rank", "adapter.rank", kind=int, metavar="N", min=1,
             help="Rank of the adapter matrices."),
    ),
    RUN_PANEL: (
        Flag("--seed", "training.seed", kind=int, metavar="N", min=0, max=2**32 - 1,
             help="Random seed."),
        Flag("--runs", "run.root", metavar="DIR",
             help="Folder with the run folders."),
        Flag("--price", "run.price_per_hour", kind=float, metavar="X", min=0,
             help="What an hour of the machine costs; the price of the training is stated."),
        Flag("--for", "run.served_by", metavar="vllm|llama.cpp|ollama", checks_words=True,
             help="The program that is to serve the model: refuse before training what it does not take."),
        Flag("--track", "run.trackers", kind=list[str], metavar="TRACKER", checks_words=True,
             help="Also log to tensorboard, wandb or mlflow. Repeatable."),
    ),
    SAMPLING_PANEL: (
        Flag("--max-new-tokens", "sampling.max_new_tokens", kind=int, metavar="N", min=1, max=1_000_000,
             help="Maximum answer length in tokens."),
        Flag("--temperature", "sampling.temperature", kind=float, metavar="T", min=0.0, max=5.0,
             help="0 always takes the most likely token."),
        Flag("--top-p", "sampling.top_p", kind=float, metavar="P", min=0.0, max=1.0,
             help="Sample from the smallest set of tokens with this probability."),
        Flag("--top-k", "sampling.top_k", kind=int, metavar="K", min=0,
             help="Sample from this many most likely tokens; 0 for all."),
        Flag("--min-p", "sampling.min_p", kind=float, metavar="P", min=0.0, max=1.0,
             help="Drop tokens with less than this share of the most likely token's probability."),
        Flag("--repetition-penalty", "sampling.repetition_penalty", kind=float, metavar="X", min=0.1, max=10.0,
             help="Above 1 makes tokens already in the text less likely."),
        Flag("--stop", "sampling.stop", kind=list[str], metavar="TEXT",
             help="Stop string; the answer ends before it. Repeatable."),
    ),
    None: (
        Flag("--precision", "training.precision", kind=PrecisionChoice,
             help="Precision of matrix products; fp32 matches other programs in float32."),
    ),
}
# fmt: on
FLAGS: Mapping[str, Flag] = {
    flag.name: replace(flag, panel=panel) for panel, flags in _ROWS.items() for flag in flags
}

# Of every command that reads rows to train on.
ROW_FLAGS = (
    "--as-text", "--map", "--ignore", "--where", "--fixes", "--duplicates", "--near-duplicates", "--strip-stop-text", "--template",
    "--template-var", "--train-on", "--first-turn", "--thinking", "--max-tokens", "--overlong", "--allow-leak", "--strict",
)  # fmt: skip
