"""Attention over sealed rows and tail on a CUDA device, through torch's own variable-length flash attention.

Each KV head is one "sequence" whose G query heads share one KV head, so ragged rows are read as they lie and nothing is
expanded or re-packed. float16 and bfloat16 only.

Letters: H KV heads, G query heads per KV head, q new tokens, T tail tokens, N sealed rows, D head_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention.varlen import AuxRequest, varlen_attn

from kvchat.attention.merge import Partial, merge
from kvchat.cache.segment import LayerKV


def attend(query: Tensor, sealed: LayerKV | None, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """As `reference.attend`, in float16 or bfloat16 with float32 accumulators."""
    num_heads, q, dim = query.shape
    heads, tail, _ = keys.shape
    # Kernels of torch 2.11 take no scale: fold it into the query.
    factor = scale * dim**0.5
    query = query if factor == 1.0 else query * factor
    packed = query.view(heads, -1, q, dim).transpose(1, 2).reshape(heads * q, -1, dim)
    bounds = torch.arange(heads + 1, dtype=torch.int32) * tail
    tail_keys, tail_values = (part.reshape(heads * tail, dim) for part in (keys, values))
    parts = [_varlen(packed, tail_keys, tail_values, bounds, q, tail, causal=q > 1)]
    if sealed is not None and sealed.num_kept:
        longest = int(sealed.cu_seqlens.diff().max())
        parts.append(_varlen(packed, sealed.keys, sealed.values, sealed.cu_seqlens, q, longest, causal=False))
    out, _ = merge(parts)
    return out.view(heads, q, -1, dim).transpose(1, 2).reshape(num_heads, q, dim)


def _varlen(query: Tensor, keys: Tensor, values: Tensor, bounds: Tensor, q: int, longest: int, causal: bool) -> Partial:
    """(H * q, G, D) queries over (N, D) rows: output (H * q, G, D), log-sum-exp (H * q, G); a head may have no rows."""
    groups, device = query.shape[1], query.device
    steps = torch.arange(len(bounds), dtype=torch.int32, device=device) * q
    wide_keys, wide_values = (part[:, None].expand(-1, groups, -1) for part in (keys, values))
    window = (-1, 0) if causal else (-1, -1)
    result = varlen_attn(
        query,
        wide_keys,
        wide_values,
        steps,
        bounds.to(device),
        q,
        longest,
        return_aux=AuxRequest(lse=True),
        window_size=window,
    )
    assert isinstance(result, tuple)
    out, lse = result[0], result[1].T
    # The kernel writes +inf where there are no keys.
    lse = lse.masked_fill(lse == torch.inf, -torch.inf)
    return out.masked_fill(lse[..., None] == -torch.inf, 0), lse
