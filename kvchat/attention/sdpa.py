"""Attention over sealed rows and tail on a CPU, through torch's own flash kernel, which also gives log-sum-exp.

Three parts are attended to and merged: sealed rows (no mask), the tail before the new tokens (no mask), the new tokens
themselves (causal). So no mask is ever built, and the query heads of a group are rows of one KV head: nothing is expanded
but the new tokens.

Letters: H KV heads, G query heads per KV head, q new tokens, T tail tokens, N sealed rows, D head_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvchat.attention.merge import Partial, merge
from kvchat.cache.segment import LayerKV


def attend(query: Tensor, sealed: LayerKV | None, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """As `reference.attend`, in the dtype of the inputs with float32 accumulators."""
    num_heads, q, dim = query.shape
    grouped = query.reshape(keys.shape[0], -1, dim)
    past = keys.shape[1] - q if q > 1 else keys.shape[1]
    parts = []
    if q > 1:
        out, lse = causal(query, keys[:, past:], values[:, past:], scale)
        parts.append((out.reshape(grouped.shape), lse.reshape(grouped.shape[:2])))
    if past:
        parts.append(dense(grouped, keys[:, :past], values[:, :past], scale))
    if sealed is not None and sealed.num_kept:
        parts.append(ragged(grouped, sealed, scale))
    return merge(parts)[0].reshape(num_heads, q, dim)


def dense(query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Partial:
    """(H, R, D) query rows over all of (H, T, D) keys: output (H, R, D), log-sum-exp (H, R)."""
    out, lse = _flash(query[None], keys[None], values[None], False, scale)
    return out[0], lse[0]


def causal(query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Partial:
    """(H * G, q, D) queries over the (H, q, D) keys of the same tokens, causally."""
    groups = query.shape[0] // keys.shape[0]
    wide = (part.repeat_interleave(groups, 0)[None] for part in (keys, values))
    out, lse = _flash(query[None], *wide, True, scale)
    return out[0], lse[0]


def ragged(query: Tensor, sealed: LayerKV, scale: float) -> Partial:
    """(H, R, D) query rows over sealed rows."""
    heads, rows, dim = query.shape
    bounds = sealed.cu_seqlens.tolist()
    if all(low * heads == head * bounds[-1] for head, low in enumerate(bounds)):  # every head holds as many rows
        return dense(query, sealed.keys.view(heads, -1, dim), sealed.values.view(heads, -1, dim), scale)
    wide = torch.promote_types(query.dtype, torch.float32)
    out, lse = torch.zeros_like(query), query.new_full((heads, rows), -torch.inf, dtype=wide)
    for head in range(heads):
        part = slice(bounds[head], bounds[head + 1])
        if part.start < part.stop:
            one = slice(head, head + 1)
            out[one], lse[one] = dense(query[one], sealed.keys[None, part], sealed.values[None, part], scale)
    return out, lse


def _flash(query: Tensor, keys: Tensor, values: Tensor, is_causal: bool, scale: float) -> Partial:
    # The operator behind torch's scaled_dot_product_attention on CPUs: the public function does not return log-sum-exp.
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out, lse = kernel(query, keys, values, 0.0, is_causal, scale=scale)
    return out, lse


def log_normaliser(query: Tensor, past: Tensor, own: Tensor, scale: float) -> Tensor:
    """As `reference.log_normaliser`."""
    heads, rows, dim = own.shape
    _, lse = causal(query, own, own, scale)
    if past.shape[1]:
        _, seen = dense(query.reshape(heads, -1, dim), past, past, scale)
        lse = torch.logaddexp(lse, seen.reshape(lse.shape))
    return lse
