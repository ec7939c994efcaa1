"""An adapter folder, read from its small files: its base model and its configuration.

``adapter_config.json`` and ``adapter_model.safetensors`` are those of peft, which opens the folder. Nothing in the
configuration is trusted: patterns are not compiled, no class or module that it names is imported, and a key that is not
known to be harmless is refused. ``sft_base.json`` names the model by its content; folders made elsewhere have none.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from sftcli import storage
from sftcli.config.schema.adapter import AdapterKind
from sftcli.errors import ConsentError, DataError, NotFoundError, UsageError
from sftcli.json_files import read_json, write_json
from sftcli.modeling.formats.folder_check import (
    CONVERT_HINT,
    UNSAFE_SUFFIXES,
    check_safetensors,
    safetensors_header,
)
from sftcli.own_files import OwnFile
from sftcli.paths import PathText, as_path

CONFIG_FILE, WEIGHTS_FILE, BASE_FILE = "adapter_config.json", "adapter_model.safetensors", "sft_base.json"
PREFIX = "base_model.model."  # what names of tensors in files begin with
_MATRIX, _WEIGHT = ".lora_A.weight", ".weight"
# Keys that settings of a training have no word for, with the value that means nothing.
_UNTRAINED: Mapping[str, object] = {
    "rank_pattern": {},
    "modules_to_save": None,
    "bias": "none",
    "lora_bias": False,
}
# Keys that say how the adapter is computed. They are read below.
_READ = frozenset(
    {"peft_type", "lora_alpha", "use_rslora", "use_dora", "fan_in_fan_out", "lora_bias", "init_lora_weights",
     "target_parameters", "base_model_name_or_path", "revision", "trainable_token_indices"}
)  # fmt: skip
# Keys that matter only while an adapter is trained or started, or that the weights themselves answer.
_WITHOUT_MEANING = frozenset(
    {"task_type", "inference_mode", "peft_version", "auto_mapping", "r", "rank_pattern", "lora_dropout", "bias",
     "target_modules", "exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern", "loftq_config",
     "eva_config", "corda_config", "lora_ga_config", "qalora_group_size", "megatron_core", "runtime_config",
     "ensure_weight_tying", "modules_to_tie", "target_modules_to_tie"}
)  # fmt: skip
# Ways to start that leave the base as it is; the others take a part out of it, and the adapter fits only the rest.
_STARTS = (True, False, "gaussian", "eva", "orthogonal", "lora_ga")


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterBase:
    """The model that an adapter belongs to: its name as ``locate_model`` takes it, and where known its content."""

    name: PathText
    revision: str | None = None
    tokenizer: PathText | None = None  # of a .pt file
    content: str | None = None  # see ``identity.numbers_hash``
    new_tokens: tuple[str, ...] = ()  # that it was given before; ``content`` is of the model with their rows
    dropout: float | None = None  # that the adapter was trained with

    def __post_init__(self) -> None:
        if not self.name or "" in self.new_tokens:
            raise ValueError("name or one of new_tokens is empty")


BASES = OwnFile(
    form=AdapterBase, hint="set its name and revision to those of the model that the adapter belongs to"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraForm:
    """How an adapter's matrices are used; ranks and layers follow from the weights."""

    alpha: float
    rslora: bool
    dora: bool
    fan_in_fan_out: bool
    bias: bool
    parameters: tuple[str, ...] = ()  # endings of names of parameters that have one, besides layers
    token_ids: Mapping[str, tuple[int, ...]] = field(
        default_factory=dict
    )  # last parts of a layer's name -> rows that have numbers of their own


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterShape:
    """An adapter as the settings of a training describe one; see ``AdapterSettings``."""

    kind: AdapterKind
    rank: int
    alpha: int
    dropout: float
    target_modules: tuple[str, ...]
    experts: bool
    rslora: bool


def is_adapter_folder(folder: Path) -> bool:
    """Return whether ``folder`` holds an adapter and not a full model."""
    return (folder / CONFIG_FILE).is_file() and not (folder / "config.json").is_file()


def read_base(folder: Path) -> AdapterBase:
    """Return the model that the adapter in ``folder`` belongs to.

    Raises:
        DataError: The files do not say it.
    """
    own = BASES.find(folder / BASE_FILE)
    if own is not None:
        return own
    config = read_json(folder / CONFIG_FILE)
    name, revision = config.get("base_model_name_or_path"), config.get("revision")
    if not isinstance(name, str) or not name or not isinstance(revision, str | None):
        raise DataError(
            f"{folder / CONFIG_FILE} does not say which model the adapter belongs to",
            hint="set base_model_name_or_path in it",
        )
    try:
        as_path(name)
    except UsageError as error:
        raise DataError(
            f"{folder / CONFIG_FILE} names no model in base_model_name_or_path: {error}",
            hint="set it to the folder or the hub name of the model",
        ) from None
    return AdapterBase(name=name, revision=revision)


def read_new_tokens(folder: Path) -> tuple[str, ...]:
    """Return the tokens that the model of the adapter in ``folder`` was given before it was trained.

    Raises:
        DataError: The file does not say it.
    """
    own = BASES.find(folder / BASE_FILE)
    return () if own is None else own.new_tokens


def check_adapter_weights(folder: Path) -> Path:
    """Return the file with the adapter's weights, whose header is sound.

    Raises:
        ConsentError: It is a pickle file.
        NotFoundError, DataError: There is none, or it is damaged.
    """
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        unsafe = sorted(file.name for file in folder.iterdir() if file.suffix in UNSAFE_SUFFIXES)
        if unsafe:
            raise ConsentError(
                f"{folder / unsafe[0]} is a pickle file, which can run code when opened; refused",
                hint=CONVERT_HINT.replace("AutoModelForCausalLM", "AutoPeftModelForCausalLM"),
            )
        raise NotFoundError(
            f"{folder} holds no weights: {WEIGHTS_FILE} is missing", hint="copy or download the folder again"
        )
    check_safetensors(path)
    return path


def read_form(folder: Path) -> LoraForm:
    """Return how the weights of the adapter in ``folder`` are used.

    Raises:
        UsageError: It is no LoRA adapter, or uses a part of peft that is not supported.
        DataError: A value has another type.
    """
    path = folder / CONFIG_FILE
    config = read_json(path)
    if config.get("peft_type") != "LORA":
        raise UsageError(
            f"{path}: peft_type is {_shown(config.get('peft_type'))}, and only LORA is supported",
            hint="merge the adapter with the program that made it, and name the merged folder",
        )
    for key, value in config.items():
        if key not in _READ | _WITHOUT_MEANING and value not in (None, False, [], {}):
            raise _unsupported(path, key, value)
    if (start := config.get("init_lora_weights", True)) is not None and start not in _STARTS:
        raise _unsupported(path, "init_lora_weights", start)
    alpha = config.get("lora_alpha", 8)
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha < 1e9:
        raise DataError(f"{path}: lora_alpha is {_shown(alpha)}, expected a number above 0")
    parameters = config.get("target_parameters") or []
    if not isinstance(parameters, list) or not all(isinstance(name, str) and name for name in parameters):
        raise DataError(f"{path}: target_parameters is {_shown(parameters)}, expected a list of names")
    flags = {key: config.get(key, False) for key in ("use_rslora", "use_dora", "fan_in_fan_out", "lora_bias")}
    for key, value in flags.items():
        if not isinstance(value, bool):
            raise DataError(f"{path}: {key} is {_shown(value)}, expected true or false")
    return LoraForm(
        alpha=alpha,
        rslora=flags["use_rslora"],
        dora=flags["use_dora"],
        fan_in_fan_out=flags["fan_in_fan_out"],
        bias=flags["lora_bias"],
        parameters=tuple(parameters),
        token_ids=_token_ids(path, config.get("trainable_token_indices")),
    )


def read_shape(folder: Path) -> AdapterShape:
    """Return the shape of the adapter in ``folder``, to train it on.

    Raises:
        UsageError: It is no LoRA adapter, or has what the settings of a training cannot say.
        ConsentError, NotFoundError, DataError: Its weights are a pickle file, missing or damaged.
    """
    form, path = read_form(folder), folder / CONFIG_FILE
    config = read_json(path)
    for key, harmless in _UNTRAINED.items():
        if config.get(key) not in (None, False, [], {}, harmless):
            raise _untrained(path, key, config[key])
    if form.token_ids:
        raise _untrained(path, "trainable_token_indices", config["trainable_token_indices"])
    rank, named = config.get("r"), config.get("target_modules")
    own = BASES.find(folder / BASE_FILE)
    dropout = config.get("lora_dropout", 0.0) if own is None or own.dropout is None else own.dropout
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise DataError(f"{path}: r is {_shown(rank)}, expected a whole number above 0")
    if isinstance(dropout, bool) or not isinstance(dropout, int | float) or not 0 <= dropout <= 1:
        raise DataError(f"{folder}: its dropout is {_shown(dropout)}, expected a number from 0 to 1")
    if form.alpha != int(form.alpha):
        raise _untrained(path, "lora_alpha", form.alpha)
    header, _ = safetensors_header(check_adapter_weights(folder))
    rows = {
        name.removeprefix(PREFIX).removesuffix(_MATRIX): entry["shape"][0]
        for name, entry in header.items()
        if name.endswith(_MATRIX) and entry["shape"]
    }
    layers = [name for name, count in rows.items() if count == rank]  # of experts there are more rows
    as_parameters = [
        item.removesuffix(_WEIGHT)
        for item in form.parameters
        if item.endswith(_WEIGHT) and any(means(item.removesuffix(_WEIGHT), layer) for layer in layers)
    ]
    targets = layers
    if isinstance(named, list) and all(isinstance(name, str) for name in named) and not _narrows(config):
        targets = [*named, *as_parameters]
    if not targets:
        raise _untrained(path, "target_modules", named)
    return AdapterShape(
        kind=AdapterKind.DORA if form.dora else AdapterKind.LORA,
        rank=rank,
        alpha=int(form.alpha),
        dropout=float(dropout),
        target_modules=tuple(sorted(set(targets))),
        experts=len(as_parameters) < len(form.parameters),
        rslora=form.rslora,
    )


def means(item: str, name: str) -> bool:
    """Return whether ``item``, a name or the end of one, means ``name``, as peft reads it."""
    return name == item or name.endswith(f".{item}")


def _narrows(config: Mapping[str, object]) -> bool:
    """Return whether not all layers of the names that ``config`` has are meant."""
    return any(config.get(key) for key in ("exclude_modules", "layers_to_transform", "layers_pattern"))


def _token_ids(path: Path, value: object) -> dict[str, tuple[int, ...]]:
    """Return the tokens with rows of their own by layer; "" stands for the token embeddings."""
    layers = {"": value} if isinstance(value, list) else value or {}
    if not isinstance(layers, dict) or not all(map(_are_ids, layers.values())):
        raise DataError(
            f"{path}: trainable_token_indices is {_shown(value)}, expected ids of tokens by layer"
        )
    return {str(name): tuple(ids) for name, ids in layers.items() if ids}


def _are_ids(value: object) -> bool:
    return isinstance(value, list) and all(type(token) is int and token >= 0 for token in value)


def write_adapter_config(folder: Path, config: Mapping[str, object], base: AdapterBase) -> None:
    """Write what says how the weights are meant, which model they belong to, and with which dropout they were trained.

    peft takes no dropout on parameters, where it is told of some, and needs none to read an adapter.
    """
    dropout = config.get("lora_dropout", 0.0)
    assert isinstance(dropout, int | float)
    shown = {"lora_dropout": 0.0} if config.get("target_parameters") else {}
    write_json(folder / CONFIG_FILE, {**config, **shown})
    storage.write_file(folder / BASE_FILE, [BASES.text(replace(base, dropout=float(dropout))).encode()])


def _unsupported(path: Path, key: str, value: object) -> UsageError:
    return UsageError(
        f"{path}: {key} is {_shown(value)}, which is not supported",
        hint="merge the adapter with the program that made it, and name the merged folder",
    )


def _untrained(path: Path, key: str, value: object) -> UsageError:
    return UsageError(
        f"{path}: {key} is {_shown(value)}, and an adapter with that is not trained on here",
        hint=f"merge it first, sft export {path.parent} --to hf --out MERGED, and train on that: --model MERGED",
    )


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
