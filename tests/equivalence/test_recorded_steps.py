"""A step that is recorded once and replayed gives what a step with a growing cache gives."""

import pytest
import torch
from transformers import AutoModelForCausalLM as Auto
from transformers import Gemma2Config, MistralConfig, PretrainedConfig, Qwen2Config, Qwen3Config

from sftcli.modeling.decoding import decoder as decoder_module
from sftcli.modeling.decoding.decoder import choose_decoder
from sftcli.modeling.decoding.fused_decode import FusedRows
from sftcli.modeling.decoding.kv_cache import CachedRows
from sftcli.modeling.decoding.kv_state import KVCacheState
from sftcli.modeling.decoding.recorded import RecordedSteps
from tests.support.architectures import SMALL, build_architecture
from tests.support.decoding import answers
from tests.support.memory import FAULTS
from tests.support.recorder import ReplayingRecorder

GATED = {**SMALL, "head_dim": 8}
CONFIGS: dict[str, PretrainedConfig] = {
    "qwen3": Qwen3Config(**GATED),
    "gemma2": Gemma2Config(**GATED, sliding_window=8, query_pre_attn_scalar=8),
    "qwen2 with a window": Qwen2Config(
        **SMALL, use_sliding_window=True, sliding_window=6, max_window_layers=1
    ),
    "mistral without types": MistralConfig(**SMALL, sliding_window=7),
}
NAMES = ["llama", "qwen2", "gpt2", "mistral", "gemma3", *CONFIGS]
FUSED = {"llama", "qwen2"}
PROMPTS = [[9, 10, 11, 30], list(range(40, 52)), [7, 8], list(range(30, 44)), [100] * 27]


def build(name: str):
    if name not in CONFIGS:
        return build_architecture(name).eval()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Auto.from_config(CONFIGS[name], dtype=torch.float32).eval()


def recorded(model, monkeypatch, **how):
    """Return the decoder that is chosen where steps can be recorded, and the recorder."""
    recorder = ReplayingRecorder(**how)
    monkeypatch.setattr(decoder_module, "recorder_for", lambda _device: recorder)
    return choose_decoder(model), recorder


@pytest.mark.parametrize("name", NAMES)
def test_rows_that_come_and_go_get_the_same_tokens(name, monkeypatch):
    model = build(name)
    asked = {"max_new_tokens": 9, "stop_ids": frozenset(range(60, 90)), "max_rows": 3}
    plain = answers(choose_decoder(model), PROMPTS, **asked)
    decoder, recorder = recorded(model, monkeypatch)
    assert isinstance(decoder.make_rows(3, ()), FusedRows if name in FUSED else CachedRows)
    assert answers(decoder, PROMPTS, **asked) == plain
    assert recorder.replayed > 2 * recorder.recorded > 0
    assert decoder.note == ""


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_recordings_are_made_anew_where_the_cache_moves(name, monkeypatch):
    model = build(name)
    prompts = [[5] * 120, [6, 7]]
    asked = {"max_new_tokens": 16, "temperature": 1.0, "seed": 5}
    plain = answers(choose_decoder(model), prompts, **asked)
    decoder, _ = recorded(model, monkeypatch)
    assert answers(decoder, prompts, **asked) == plain


def test_a_step_that_cannot_be_recorded_runs_as_it_is_and_says_so(monkeypatch):
    model = build("llama")
    decoder, recorder = recorded(model, monkeypatch, fails_from=0)
    assert decoder.note.startswith("a step of LlamaForCausalLM cannot be recorded as a CUDA graph")
    assert recorder.recorded == 0
    monkeypatch.undo()
    assert answers(decoder, PROMPTS, max_new_tokens=3) == answers(
        choose_decoder(model), PROMPTS, max_new_tokens=3
    )


def test_a_later_recording_that_fails_lets_steps_run_as_they_are(monkeypatch):
    model = build("llama")
    decoder, recorder = recorded(model, monkeypatch)
    recorder.fails_from = recorder.recorded + 1
    found = answers(decoder, PROMPTS, max_new_tokens=6)
    monkeypatch.undo()
    assert found == answers(choose_decoder(model), PROMPTS, max_new_tokens=6)


def test_no_memory_for_a_recording_is_out_of_memory():
    class Full:
        def record(self, work):
            raise FAULTS["runtime"]

    state = KVCacheState(2, torch.device("cpu"))
    state.add([3])
    state.width = 4
    steps = RecordedSteps(Full(), state, lambda tokens: tokens)
    with pytest.raises(type(FAULTS["runtime"])):
        steps(torch.tensor([1]))


BAD = {
    "a number of the host": lambda state, tokens: tokens * max(state.counts),
    "a tensor that is made anew": lambda state, tokens: tokens * torch.clone(state.fresh)[: len(tokens)],
}


@pytest.mark.parametrize("what", BAD)
def test_the_stand_in_finds_a_step_that_depends_on(what):
    """So that the tests above can fail."""
    state = KVCacheState(2, torch.device("cpu"))
    state.add([3, 5])
    seen = []
    for recorder in (None, ReplayingRecorder()):
        steps = RecordedSteps(recorder, state, lambda tokens: BAD[what](state, tokens))
        found = []
        for more in range(3):
            state.fresh, state.counts = torch.tensor([more, more]), [3 + more, 5 + more]
            state.width = 9
            found.append(steps(torch.tensor([1, 2])).tolist())
        seen.append(found)
    assert seen[0] != seen[1]


def test_the_stand_in_refuses_a_step_that_reads_the_device():
    state = KVCacheState(1, torch.device("cpu"))
    state.add([3])
    state.width = 4
    steps = RecordedSteps(ReplayingRecorder(), state, lambda tokens: tokens * int(tokens.max()))
    with pytest.raises(RuntimeError, match="capturing"):
        steps(torch.tensor([1]))
