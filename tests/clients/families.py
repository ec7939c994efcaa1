"""llama.cpp computes what transformers does, of a tiny random model of every family that GGUF is written for.

    python -m tests.clients.families --environments DIR

Takes the environment of llama.cpp that ``tests.clients.run`` makes. Prints how far logits are apart for each family and each way
of scaling positions, as a part of their spread; exits with 1 if one is further than rounding. llama.cpp looks GELU up in a
table of float16, so that Gemma is further away: without the output of its MLP it is as near as the others.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from sftcli.events import NeverStop, Session
from sftcli.modeling.formats.gguf.gguf_export import ModelFacts, write_gguf
from sftcli.modeling.tokenizer.chat_tokenizer import load_chat_tokenizer
from tests.clients.run import ENVIRONMENTS, home_of_environments, make_environment
from tests.support.gguf_families import build_gguf_family

LIMITS = {"gemma2": 5e-3, "gemma3_text": 5e-3}
LIMIT = 1e-4
TOKENS = 90
_LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
           "original_max_position_embeddings": 64}  # fmt: skip
_YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
_LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
_LOCAL = {"rope_type": "default", "rope_theta": 10000.0}
_GLOBAL = {"rope_type": "linear", "rope_theta": 1000000.0, "factor": 8.0}
_BIASES = {"attention_bias": True}
CASES: dict[str, list[dict[str, object]]] = {
    "llama": [{}, *({"rope_parameters": rope} for rope in (_LLAMA3, _YARN, _LINEAR)), {"head_dim": 16},
              _BIASES | {"mlp_bias": True}],
    "mistral": [{}, *({"rope_parameters": rope} for rope in (_LLAMA3, _YARN, _LINEAR)), {"sliding_window": 100}],
    "qwen2": [{}, {"rope_parameters": _YARN}],
    "qwen3": [{}, {"rope_parameters": _YARN}],
    "qwen3_moe": [{}, {"rope_parameters": _YARN}],
    "gemma2": [{}],
    "gemma3_text": [{}, {"rope_parameters": {"sliding_attention": _LOCAL, "full_attention": _GLOBAL}}],
    "phi3": [{}, {"rope_parameters": _LOCAL | {"partial_rotary_factor": 0.5}}],
    "smollm3": [{}, {"rope_parameters": _YARN}],
    "granite": [{}, _BIASES | {"mlp_bias": True}],
    "olmo2": [{}, {"tie_word_embeddings": True}],
}  # fmt: skip
_ASK = """
import json, sys, llama_cpp, numpy
ids = json.loads(sys.argv[2])
model = llama_cpp.Llama(
    sys.argv[1], n_ctx=128, n_batch=128, logits_all=True, verbose=False, swa_full=True,
    type_k=llama_cpp.GGML_TYPE_F32, type_v=llama_cpp.GGML_TYPE_F32,
)
model.eval(ids)
numpy.save(sys.argv[3], numpy.array(model.scores[: len(ids)]))
"""


def main() -> int:
    """Try all of it and return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--environments", type=Path, default=home_of_environments())
    folder = parser.parse_args().environments.absolute() / "llama.cpp"
    make_environment(folder, ENVIRONMENTS["llama.cpp"])
    worst = 0.0
    for family, cases in CASES.items():
        for changes in cases:
            with tempfile.TemporaryDirectory() as scratch:
                apart = distance(family, changes, Path(scratch), folder / "bin" / "python")
            limit = LIMITS.get(family, LIMIT)
            worst = max(worst, apart / limit)
            print(
                f"{family:12} {apart:.1e} {'' if apart <= limit else 'DIFFERS '}{json.dumps(changes)}",
                flush=True,
            )
    return int(not worst <= 1)


def distance(family: str, changes: dict[str, object], work: Path, python: Path) -> float:
    """Return how far the logits of llama.cpp are from those of transformers, where they are furthest."""
    import numpy

    model = build_gguf_family(family, work / "model", **changes)
    session = Session(emit=lambda _event: None, stop=NeverStop())
    write_gguf(
        work / "a.gguf", model, load_chat_tokenizer(work / "model"), source=work / "model", kind="f32",
        facts=ModelFacts(name=family), session=session,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(10, model.config.vocab_size, (1, TOKENS), generator=generator)
    with torch.no_grad():
        ours = model(input_ids=ids, use_cache=False).logits[0].double()
    subprocess.run(
        [python, "-c", _ASK, work / "a.gguf", json.dumps(ids[0].tolist()), work / "logits.npy"], check=True
    )
    theirs = torch.from_numpy(numpy.load(work / "logits.npy")).double()
    spread = (ours - ours.mean(-1, keepdim=True)).norm(dim=-1)
    return float(((theirs - ours).norm(dim=-1) / spread).max())


if __name__ == "__main__":
    sys.exit(main())
