"""Trials that leave a model, and the random numbers after them, as they were."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from sftcli.training.random_streams import capture_rng, restore_rng


@contextmanager
def left_as_it_was(model: torch.nn.Module) -> Iterator[None]:
    """Put random numbers, buffers, gradients and mode of ``model`` back behind the block."""
    random, was_training = capture_rng(), model.training
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    try:
        yield
    finally:
        model.train(was_training)
        for module, name, buffer, content in buffers:
            module._buffers[name] = buffer.copy_(content)
        for weight in model.parameters():
            weight.grad = None
        restore_rng(random)
