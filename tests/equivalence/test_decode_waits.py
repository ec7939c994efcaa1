"""How often a token waits for the device, counted on tensors without numbers."""

from functools import partial

import pytest
import torch

from benchmarks.gpu.counter import DeviceCounter
from sftcli.config.schema.run import SamplingSettings
from sftcli.events import NeverStop
from sftcli.modeling.decoding import sampling
from sftcli.modeling.decoding.decode import decode
from sftcli.modeling.decoding.decoder import Decoder
from sftcli.modeling.decoding.fused_decode import FusedRows, fuse
from sftcli.modeling.decoding.kv_cache import CachedRows
from tests.support.architectures import build_architecture

PROMPTS = [[9, 10, 11], [40, 41], [7, 8, 9, 10, 11], [3]]
SETTINGS = [
    {},
    {"temperature": 0.8, "top_p": 0.9, "top_k": 40},
    {"temperature": 1.0, "min_p": 0.1, "repetition_penalty": 1.2},
]


def decoder_of(name: str) -> Decoder:
    model = build_architecture(name).eval().to("meta")
    fused = fuse(model)
    make_rows = (
        (lambda count, _prefix: CachedRows(model, count)) if fused is None else partial(FusedRows, fused)
    )
    # In inference mode torch shows operations before it takes them apart, which is not what is counted.
    return Decoder(model=model, make_rows=make_rows, goes_on_training=True)


def asked_of_device(decoder: Decoder, tokens: int, **settings) -> DeviceCounter:
    """Return what answers of so many tokens ask of the device; those of other lengths leave in between."""
    with DeviceCounter() as counter:
        for row in decode(
            decoder, PROMPTS, settings=SamplingSettings(max_new_tokens=tokens, **settings), stop_ids=frozenset(),
            stop=NeverStop(),
        ):  # fmt: skip
            if row.index == 1 and len(row.ids) == 3:
                row.end()
    return counter


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3"])
def test_a_step_waits_once_whatever_its_rows_and_sends_nothing(name, settings, monkeypatch):
    monkeypatch.setattr(sampling, "_generator", lambda _seed, _device: torch.Generator())
    decoder = decoder_of(name)
    short, long = (asked_of_device(decoder, tokens, **settings).counts for tokens in (4, 9))
    more = long.waits - short.waits
    assert more.total() == 5, more
    assert all("copies.py" in place for place in more)
    assert long.uploads == short.uploads
