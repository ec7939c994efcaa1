"""A model is tried on a few tokens before it is trained: its class may fail, or see what it is to predict."""

import pytest
import torch
from transformers import LlamaForCausalLM

from sftcli.errors import UsageError
from sftcli.modeling.architecture import require_causal
from tests.support.tiny_model import tiny_config


@pytest.mark.parametrize(
    "error", [RuntimeError, AssertionError, KeyError, ZeroDivisionError, NotImplementedError]
)
def test_an_error_of_the_models_class_is_told_with_its_name(error: type[Exception]):
    model = LlamaForCausalLM(tiny_config())

    def broken(*_: object, **__: object) -> None:
        raise error("sizes 4 and 2")

    model.model.layers[1].forward = broken
    with pytest.raises(
        UsageError, match=rf"LlamaForCausalLM of transformers .* {error.__name__}: .*sizes 4 and 2"
    ):
        require_causal(model)


def test_memory_that_is_out_is_no_error_of_the_class():
    model = LlamaForCausalLM(tiny_config())

    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("no room")

    model.model.layers[1].forward = full
    with pytest.raises(torch.OutOfMemoryError):
        require_causal(model)
