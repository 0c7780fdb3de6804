"""Attention over sealed rows and tail on a CUDA device, through variable-length flash attention.

Two parts are attended to and merged. The tail is one sequence with grouped heads, causal, read where it lies in its
larger room. The sealed rows are as many sequences as KV heads, each with the group's G query heads and one KV head, so
ragged rows are read as they lie, too. Only the query is packed. float16 and bfloat16 only.

Letters: H KV heads, G query heads per KV head, q new tokens, T tail tokens, N sealed rows, D head_dim.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from kvchat.attention import flash
from kvchat.attention.merge import Partial, merge
from kvchat.cache.segment import LayerKV

WANTED_BLOCKS = 264
"""Two for each multiprocessor of the devices that this was measured on."""


def attend(
    query: Tensor,
    sealed: LayerKV | None,
    keys: Tensor,
    values: Tensor,
    scale: float,
    kernel: flash.Varlen = flash.varlen,
) -> Tensor:
    """As `reference.attend`, in float16 or bfloat16 with float32 accumulators."""
    out, lse = dense(query, keys, values, scale, True, kernel)
    if sealed is None or not sealed.num_kept:
        return out
    shape = (keys.shape[0], -1, query.shape[1])
    tail = out.view(*shape, query.shape[2]), lse.view(shape)
    return merge([tail, ragged(query, sealed, scale, kernel)])[0].reshape(query.shape)


def dense(
    query: Tensor, keys: Tensor, values: Tensor, scale: float, causal: bool, kernel: flash.Varlen = flash.varlen
) -> Partial:
    """(H * G, q, D) queries over (H, T, D) keys, of which the last q are their own if `causal`.

    Returns:
        Output (H * G, q, D) and log-sum-exp (H * G, q) float32.
    """
    q, rows = query.shape[1], keys.shape[1]
    query, keys, values = (part.transpose(0, 1) for part in (query, keys, values))
    steps = _steps(1, q, query.device), _steps(1, rows, query.device)
    out, lse = kernel(query, keys, values, *steps, q, rows, scale, causal)
    return out.transpose(0, 1), lse.T


def ragged(query: Tensor, sealed: LayerKV, scale: float, kernel: flash.Varlen = flash.varlen) -> Partial:
    """(H * G, q, D) queries over sealed rows: output (H, G, q, D), log-sum-exp (H, G, q); a head may have no rows."""
    heads, (num_heads, q, dim) = len(sealed.bounds) - 1, query.shape
    parts = _parts(num_heads, q)
    packed = query.view(heads, 1, -1, q, dim).transpose(2, 3).expand(-1, parts, -1, -1, -1)
    bounds = [[low + (high - low) * i // parts for i in range(parts)] for low, high in pairwise(sealed.bounds)]
    flat = [*(low for lows in bounds for low in lows), sealed.bounds[-1]]
    longest = max(high - low for low, high in pairwise(flat))
    # Not to wait for the device: the numbers are copied before the call returns.
    cu_seqlens = torch.tensor(flat, dtype=torch.int32).to(query.device, non_blocking=True)
    keys, values = sealed.keys[:, None], sealed.values[:, None]
    steps = _steps(heads * parts, q, query.device), cu_seqlens
    out, lse = kernel(packed.flatten(0, 2), keys, values, *steps, q, longest, scale, False)
    out, lse = out.view(heads, parts, q, -1, dim).transpose(2, 3), lse.view(heads, parts, q, -1).transpose(2, 3)
    # The kernel writes plus infinity where there are no keys.
    lse = lse.masked_fill(lse == torch.inf, -torch.inf)
    out = out.masked_fill(lse[..., None] == -torch.inf, 0)
    if parts == 1:
        return out[:, 0], lse[:, 0]
    whole = lse.logsumexp(1)
    weights = (lse - whole[:, None]).exp().nan_to_num(0.0)
    return (out * weights[..., None]).sum(1).to(query.dtype), whole


def _parts(num_heads: int, q: int) -> int:
    """Into how many parts to cut every head's rows, so that a short prompt too occupies the device.

    The kernel starts a block for 128 rows of each query head; for one row it cuts the keys itself.
    """
    blocks = num_heads * -(-q // 128)
    return 1 if q == 1 else max(1, min(16, WANTED_BLOCKS // blocks))


def log_normaliser(
    query: Tensor, past: Tensor, own: Tensor, scale: float, kernel: flash.Varlen = flash.varlen
) -> Tensor:
    """As `reference.log_normaliser`."""
    _, lse = dense(query, own, own, scale, True, kernel)
    if past.shape[1]:
        lse = torch.logaddexp(lse, dense(query, past, past, scale, False, kernel)[1])
    return lse


def _steps(sequences: int, rows: int, device: torch.device) -> Tensor:
    """`cu_seqlens` of sequences of equal length, made on the device."""
    return torch.arange(0, (sequences + 1) * rows, rows, dtype=torch.int32, device=device)
