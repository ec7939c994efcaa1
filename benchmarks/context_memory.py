"""What a pass over one long row takes in each process, where 1, 2 and 4 processes share it.

python benchmarks/context_memory.py                 # a row of 8192 tokens, 4 documents
python benchmarks/context_memory.py --tokens 16384
"""

import argparse
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn
from transformers import LlamaConfig, LlamaForCausalLM

from sftcli.data.batches.batch import collate_packed
from sftcli.data.example import Example
from sftcli.data.reading.record import Origin
from sftcli.modeling.kernels.document_attention import attend_by_document, attend_together
from sftcli.runtime import memory_bytes, peak_memory_bytes, reset_peak_memory, stop_keeping_memory
from sftcli.training.distributed.group import Group
from sftcli.training.loss import response_nll_sum

CPU = torch.device("cpu")
CONFIG = LlamaConfig(
    vocab_size=2048,
    hidden_size=512,
    intermediate_size=1536,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=4,
    max_position_embeddings=2**20,
)


def measure(rank: int, parts: int, tokens: int, documents: int, folder: str) -> None:
    """Write what the pass of process ``rank`` of ``parts`` took beside the weights and their gradients, in bytes."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=parts)
    group = Group(rank=rank, size=parts)
    group.share_rows(parts)
    torch.manual_seed(0)
    model = LlamaForCausalLM(CONFIG).train()
    attend_by_document(model)
    attend_together(model, group)
    ids = np.random.default_rng(0).integers(0, CONFIG.vocab_size, size=tokens)
    rows = [
        Example(input_ids=part, loss_mask=np.ones(len(part), dtype=np.bool_), origin=Origin(path="", line=1))
        for part in np.array_split(ids, documents)
    ]
    batch = collate_packed([rows], example_ids=range(documents), pad_id=0).part(group.part, parts)
    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight)
    stop_keeping_memory(CPU)
    reset_peak_memory(CPU)
    before = memory_bytes(CPU)
    response_nll_sum(model, batch).backward()
    taken = peak_memory_bytes(CPU) - before
    (Path(folder) / f"{rank}").write_text(str(taken), encoding="ascii")
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    """Print a line for each number of processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--documents", type=int, default=4)
    arguments = parser.parse_args()
    print(f"one row of {arguments.tokens} tokens in {arguments.documents} documents")
    for parts in (1, 2, 4):
        with tempfile.TemporaryDirectory() as folder:
            work = partial(measure, parts=parts, tokens=arguments.tokens, documents=arguments.documents)
            spawn(partial(work, folder=folder), nprocs=parts)
            taken = [int((Path(folder) / f"{rank}").read_text(encoding="ascii")) for rank in range(parts)]
        print(f"{parts} processes: {max(taken) / 1e6:.0f} MB in the process that takes the most")


if __name__ == "__main__":
    main()
