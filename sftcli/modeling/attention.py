"""The attention that a user names, and the one that a model uses.

A named one is what computes: kernels that take over otherwise leave a model with it alone, and where it cannot be used that
is an error.
"""

from transformers import PretrainedConfig, PreTrainedModel

from sftcli.config.schema.run import Attention
from sftcli.errors import Location, UsageError

_NAMED = "_named_attention"  # attribute of a model
_FLAGS = {Attention.SDPA: "_supports_sdpa", Attention.FLEX: "_supports_flex_attn"}
_FLASH_BYTES = 2  # of a number
_FLASH_FLAG = "_supports_flash_attn"


def attention_of(model: PreTrainedModel) -> str:
    """Return what transformers calls the attention that the decoder of ``model`` uses."""
    return str(model.config.get_text_config()._attn_implementation)


def is_named(model: PreTrainedModel) -> bool:
    """Return whether a user named the attention of ``model``, so that nothing else may compute it."""
    return _NAMED in vars(model)


def in_text(config: PretrainedConfig, name: str) -> str | dict[str, str]:
    """Return what transformers is told so that the decoder of a model uses the attention ``name``, and no tower does."""
    text = config.get_text_config()
    key = next((key for key in config.sub_configs if getattr(config, key, None) is text), None)
    return name if key is None else {"": name, key: name}


def set_attention(model: PreTrainedModel, name: str) -> None:
    """Let the decoder of ``model`` use the attention ``name``.

    Raises:
        ImportError, ValueError: It cannot.
    """
    model.set_attn_implementation(in_text(model.config, name))


def check_known(kind: type[PreTrainedModel], name: Attention) -> None:
    """Make sure that models of a class know an attention.

    Raises:
        UsageError: They do not.
    """
    flag = _FLASH_FLAG if name.is_flash else _FLAGS.get(name)
    kernels = getattr(
        kind, "_compatible_flash_implementations", None
    )  # others are not used with it, for a reason
    if (flag and not getattr(kind, flag, False)) or (name.is_flash and kernels and name not in kernels):
        raise cannot_use(name, f"{kind.__name__} does not know it")


def name_attention(model: PreTrainedModel, name: Attention) -> None:
    """Note that ``name`` is what a user wants ``model`` to use."""
    if name is not Attention.AUTO:
        vars(model)[_NAMED] = name


def use_named_attention(model: PreTrainedModel) -> None:
    """Let ``model`` use the attention that a user named for it, if any; its weights are in 16 bits where that asks for it.

    Raises:
        UsageError: It cannot.
    """
    name = vars(model).get(_NAMED)
    if name is None or attention_of(model) == name:
        return
    if name.is_flash and model.dtype.itemsize > _FLASH_BYTES:
        raise cannot_use(name, "it computes in 16 bits, and the model in 32: training.precision=bf16")
    try:
        set_attention(model, name)
    except (ImportError, ValueError) as error:
        raise cannot_use(name, str(error)) from error
    if attention_of(model) != name:
        raise cannot_use(name, f"{type(model).__name__} keeps {attention_of(model)}")


def cannot_use(name: Attention, why: str) -> UsageError:
    """Return the error for an attention that was named and cannot be used here."""
    return UsageError(
        f"attention {str(name)!r} cannot be used here: {why}",
        hint="leave model.attention out: auto takes the best that the model and this machine have",
        location=Location(key="model.attention"),
    )
