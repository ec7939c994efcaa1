"""Speed of decoding against ``transformers`` ``generate`` and against the time to read the weights once per token.

Both decode the same prompts with the same model in bfloat16, one after the other in one process::

    OMP_NUM_THREADS=2 python benchmarks/generate.py

``file`` is 200 prompts whose answers have lengths between 8 and 128, 32 at once: ``transformers`` decodes them in groups of 32
until the longest of each is done, and here a row that ends makes room for the next. Answers end at their given length in both,
so that the work is the same whatever the model says.
"""

import argparse
import json
import os
import random
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as `sft` does, before torch is imported
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks.device import seconds_of
from sftcli.config.schema.run import SamplingSettings
from sftcli.data.conversations.messages import Message
from sftcli.data.rendering.encode import encode_prompt
from sftcli.events import NeverStop
from sftcli.modeling.decoding.decode import decode
from sftcli.modeling.decoding.decoder import Decoder, choose_decoder
from sftcli.modeling.load import load_model
from sftcli.modeling.locate.locate import locate_model
from sftcli.modeling.tokenizer.chat_tokenizer import load_chat_tokenizer
from sftcli.runtime import choose_device

ROWS = Path(__file__).parents[1] / "presets" / "quick" / "train.jsonl"
Prompts = Sequence[Sequence[int]]


def main() -> None:
    """Print a line per case."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m", help="any name that sft takes")
    parser.add_argument("--cases", default="1,8,32,file", help="batch sizes, and `file`")
    parser.add_argument("--tokens", type=int, default=64, help="tokens per answer where all are equally long")
    parser.add_argument("--prompts", type=int, default=200, help="prompts of the file")
    flags = parser.parse_args()
    folder = locate_model(flags.model, revision=None, emit=lambda _event: None).folder
    device = choose_device()
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(device).eval()
    ours = load_model(folder, dtype=torch.bfloat16, device=device)
    decoder = choose_decoder(ours)
    prompts = prompts_of(folder, flags.prompts)
    weights = sum(parameter.numel() for parameter in theirs.parameters()) * 2
    rate = read_rate()
    bound = rate / weights
    print(
        f"{flags.model}, bfloat16, {torch.get_num_threads()} threads; memory is read at {rate / 1e9:.1f} GB/s, "
        f"so weights allow {bound:.0f} steps/s"
    )
    print(f"{'case':<10}{'transformers':>14}{'sft':>10}{'ratio':>8}{'share of the bound':>22}")
    for case in flags.cases.split(","):
        if case == "file":
            lengths = [random.Random(number).randint(8, 128) for number in range(len(prompts))]
            chosen, most = prompts, 32
        else:
            most = int(case)
            chosen, lengths = prompts[:most], [flags.tokens] * most
        tokens = sum(lengths)
        decode_ours(decoder, chosen[:most], [4] * most, most)
        decode_theirs(theirs, chosen[:most], [4] * most, most)
        slow = tokens / seconds_of(lambda: decode_theirs(theirs, chosen, lengths, most))  # noqa: B023
        fast = tokens / seconds_of(lambda: decode_ours(decoder, chosen, lengths, most))  # noqa: B023
        print(
            f"{case:<10}{slow:>10.1f} t/s{fast:>6.1f} t/s{fast / slow:>8.2f}{fast / (bound * most):>21.0%}",
            flush=True,
        )


def prompts_of(folder: Path, count: int) -> list[list[int]]:
    """Return prompts of the embedded rows as ids, with the model's template."""
    tokenizer = load_chat_tokenizer(folder)
    rows = [json.loads(line) for line in ROWS.read_text(encoding="utf-8").splitlines()[:count]]
    return [
        encode_prompt(tokenizer, [Message(role="user", content=next(iter(row.values())))]) for row in rows
    ]


def decode_ours(decoder: Decoder, prompts: Prompts, lengths: Sequence[int], most: int) -> int:
    """Return how many tokens were made."""
    made = 0
    for row in decode(
        decoder,
        prompts,
        settings=SamplingSettings(max_new_tokens=max(lengths)),
        stop_ids=frozenset(),
        stop=NeverStop(),
        max_rows=most,
    ):
        made += 1
        if len(row.ids) >= lengths[row.index]:
            row.end()
    assert made == sum(lengths)
    return made


@torch.inference_mode()
def decode_theirs(model: PreTrainedModel, prompts: Prompts, lengths: Sequence[int], most: int) -> int:
    """Return how many tokens were asked for; the others of a group are waited for."""
    for begin in range(0, len(prompts), most):
        group, wanted = prompts[begin : begin + most], max(lengths[begin : begin + most])
        width = max(map(len, group))
        ids = torch.tensor([[2] * (width - len(prompt)) + list(prompt) for prompt in group])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in group])
        model.generate(
            ids.to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=wanted,
            min_new_tokens=wanted,
            do_sample=False,
            pad_token_id=2,
        )  # type: ignore[operator]
    return sum(lengths)


def read_rate() -> float:
    """Return bytes a second at which all threads together read memory: the best of ten passes over a gigabyte."""
    block = torch.ones(1 << 28, dtype=torch.float32, device=choose_device())
    best = min(seconds_of(block.sum) for _ in range(10))
    return block.numel() * 4 / best


if __name__ == "__main__":
    main()
