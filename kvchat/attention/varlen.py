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


def attend(query: Tensor, sealed: LayerKV | None, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """As `reference.attend`, in float16 or bfloat16 with float32 accumulators."""
    out, lse = dense(query, keys, values, scale, causal=True)
    if sealed is None or not sealed.num_kept:
        return out
    shape = (keys.shape[0], -1, query.shape[1])
    tail = out.view(*shape, query.shape[2]), lse.view(shape)
    return merge([tail, ragged(query, sealed, scale)])[0].reshape(query.shape)


def dense(query: Tensor, keys: Tensor, values: Tensor, scale: float, causal: bool) -> Partial:
    """(H * G, q, D) queries over (H, T, D) keys, of which the last q are their own if `causal`.

    Returns:
        Output (H * G, q, D) and log-sum-exp (H * G, q) float32.
    """
    q, rows = query.shape[1], keys.shape[1]
    query, keys, values = (part.transpose(0, 1) for part in (query, keys, values))
    steps = _steps(1, q, query.device), _steps(1, rows, query.device)
    out, lse = flash.varlen(query, keys, values, *steps, q, rows, scale, causal)
    return out.transpose(0, 1), lse.T


def ragged(query: Tensor, sealed: LayerKV, scale: float) -> Partial:
    """(H * G, q, D) queries over sealed rows: output (H, G, q, D), log-sum-exp (H, G, q); a head may have no rows."""
    lengths = [high - low for low, high in pairwise(sealed.bounds)]
    heads, (_, q, dim) = len(lengths), query.shape
    packed = query.view(heads, -1, q, dim).transpose(1, 2).reshape(heads * q, -1, dim)
    # Not to wait for the device: the numbers are copied before the call returns.
    cu_seqlens = sealed.cu_seqlens.to(query.device, non_blocking=True)
    keys, values = sealed.keys[:, None], sealed.values[:, None]
    steps = _steps(heads, q, query.device)
    out, lse = flash.varlen(packed, keys, values, steps, cu_seqlens, q, max(lengths), scale, causal=False)
    out, lse = out.view(heads, q, -1, dim), lse.view(heads, q, -1)
    for head in (head for head, length in enumerate(lengths) if not length):
        out[head], lse[head] = 0, -torch.inf
    return out.transpose(1, 2), lse.transpose(1, 2)


def log_normaliser(query: Tensor, past: Tensor, own: Tensor, scale: float) -> Tensor:
    """As `reference.log_normaliser`."""
    _, lse = dense(query, own, own, scale, causal=True)
    if past.shape[1]:
        lse = torch.logaddexp(lse, dense(query, past, past, scale, causal=False)[1])
    return lse


def _steps(sequences: int, rows: int, device: torch.device) -> Tensor:
    """`cu_seqlens` of sequences of equal length, made on the device."""
    return torch.arange(0, (sequences + 1) * rows, rows, dtype=torch.int32, device=device)
