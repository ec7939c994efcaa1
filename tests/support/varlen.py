"""Stand-ins on a CPU for torch's kernel for packed rows, one for each form in which releases have it."""

import torch
from torch.nn import functional

from sftcli.modeling.kernels.varlen import Varlen, signature_of

EXACT = frozenset({torch.float32, torch.bfloat16})  # what a stand-in can do, so that rounding hides nothing


class Calls:
    """Counts what a stand-in was asked for."""

    def __init__(self):
        self.windows = []


def attend_strictly(query, key, value, bounds, key_bounds, longest, longest_key, *, scale, window):
    """Attend document by document, and refuse what torch's kernel refuses."""
    assert query.ndim == key.ndim == value.ndim == 3
    assert query.dtype == key.dtype == value.dtype
    assert all(part.stride(-1) == 1 and part.shape[-1] % 8 == 0 for part in (query, key, value))
    assert query.shape[-1] == key.shape[-1] == value.shape[-1] <= 256
    assert query.shape[1] % key.shape[1] == 0
    assert key.shape[1] == value.shape[1]
    assert bounds.dtype == key_bounds.dtype == torch.int32
    assert bounds.is_contiguous()
    lengths = bounds.diff().tolist()
    assert type(longest) is type(longest_key) is int
    assert longest == longest_key >= max(lengths)
    assert (int(bounds[0]), sum(lengths)) == (0, len(query))
    parts = zip(query.split(lengths), key.split(lengths), value.split(lengths), strict=True)
    return torch.cat([_document(*part, scale, window) for part in parts]).to(query.dtype)


def _document(query, key, value, scale, window):
    left, right = window
    place = torch.arange(len(query))
    back = place[:, None] - place[None]
    seen = ((back >= -right) | (right < 0)) & ((back <= left) | (left < 0))
    query, key, value = (part.transpose(0, 1)[None].float() for part in (query, key, value))
    attended = functional.scaled_dot_product_attention(
        query, key, value, attn_mask=seen, scale=scale, enable_gqa=True
    )
    return attended[0].transpose(0, 1)


def kernel_of(release: str, calls: Calls | None = None, **changed) -> Varlen:
    """Return the kernel of a ``release`` of torch, with its signature, on a card that can do all."""
    calls = calls or Calls()

    def attend(*rows, scale, window):
        calls.windows.append(window)
        return attend_strictly(*rows, scale=scale, window=window)

    def first(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
        window = (-1, 0) if is_causal else (-1, -1)
        return attend(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale=None, window=window)

    def second(
        query,
        key,
        value,
        cu_seq_q,
        cu_seq_k,
        max_q,
        max_k,
        *,
        return_aux=None,
        scale=None,
        window_size=(-1, -1),
    ):
        return attend(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale, window=window_size)

    def third(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1),
        enable_gqa=False, seqused_k=None, block_table=None, num_splits=None,
    ):  # fmt: skip
        assert enable_gqa or query.shape[1] == key.shape[1]
        return attend(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale, window=window_size)

    function = {"2.10": first, "2.11": second, "2.12": third}[release]
    made = {
        "function": function,
        "signature": signature_of(function),
        "capability": (9, 0),
        "release": release,
    }
    return Varlen(**({**made, "dtypes": EXACT} | changed))
