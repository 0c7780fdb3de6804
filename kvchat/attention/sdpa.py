"""Attention over sealed rows and tail on a CPU, through torch's own flash kernel, which also gives log-sum-exp.

Many new tokens: three parts are attended to and merged, sealed rows (no mask), the tail before the new tokens (no
mask) and the new tokens themselves (causal). One new token: every head's rows are cut into as many parts as there are
threads, for the kernel works on one head with one thread. No mask is built but for a part's few rows that another
part has too, and the query heads of a group are rows of one KV head: nothing is expanded but the new tokens.

Letters: H KV heads, G query heads per KV head, q new tokens, T tail tokens, N sealed rows, S parts of a run, D
head_dim.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from kvchat.attention.merge import Partial, merge
from kvchat.cache.segment import LayerKV

SPLIT_ROWS = 256
"""Runs of fewer rows per part are not worth cutting."""


def attend(query: Tensor, sealed: LayerKV | None, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """As `reference.attend`, in the dtype of the inputs with float32 accumulators."""
    num_heads, q, dim = query.shape
    if q == 1:
        return decode(query.view(keys.shape[0], -1, dim), sealed, keys, values, scale).view(num_heads, 1, dim)
    grouped = query.reshape(keys.shape[0], -1, dim)
    past = keys.shape[1] - q
    out, lse = causal(query, keys[:, past:], values[:, past:], scale)
    parts = [(out.reshape(grouped.shape), lse.reshape(grouped.shape[:2]))]
    if past:
        parts.append(dense(grouped, keys[:, :past], values[:, :past], scale))
    if sealed is not None and sealed.num_kept:
        parts.append(ragged(grouped, sealed, scale))
    return merge(parts)[0].reshape(num_heads, q, dim)


def decode(query: Tensor, sealed: LayerKV | None, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """One new token: (H, G, D) queries over sealed rows and the (H, T, D) tail; output (H, G, D)."""
    out, lse = split(query, keys, values, scale)
    if sealed is not None and sealed.num_kept:
        more, more_lse = split_ragged(query, sealed, scale)
        out, lse = torch.cat([out, more], 1), torch.cat([lse, more_lse], 1)
    elif out.shape[1] == 1:
        return out[:, 0]
    return (lse.softmax(1)[..., None] * out).sum(1).to(query.dtype)


def dense(query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Partial:
    """(H, R, D) query rows over all of (H, T, D) keys: output (H, R, D), log-sum-exp (H, R)."""
    out, lse = _flash(query[None], keys[None], values[None], scale)
    return out[0], lse[0]


def causal(query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Partial:
    """(H * G, q, D) queries over the (H, q, D) keys of the same tokens, causally."""
    groups = query.shape[0] // keys.shape[0]
    wide_keys, wide_values = (part.repeat_interleave(groups, 0)[None] for part in (keys, values))
    out, lse = _flash(query[None], wide_keys, wide_values, scale, is_causal=True)
    return out[0], lse[0]


def ragged(query: Tensor, sealed: LayerKV, scale: float) -> Partial:
    """(H, R, D) query rows over sealed rows."""
    if sealed.even_rows is not None:
        return dense(query, *_by_head(sealed), scale)
    wide = torch.promote_types(query.dtype, torch.float32)
    out, lse = torch.zeros_like(query), query.new_full(query.shape[:2], -torch.inf, dtype=wide)
    for head, (low, high) in enumerate(pairwise(sealed.bounds)):
        if low < high:
            one = slice(head, head + 1)
            out[one], lse[one] = dense(query[one], sealed.keys[None, low:high], sealed.values[None, low:high], scale)
    return out, lse


def split(query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Partial:
    """(H, G, D) queries over (H, T, D) keys in S parts: outputs (H, S, G, D), log-sum-exps (H, S, G)."""
    heads, rows, dim = keys.shape
    threads = torch.get_num_threads()
    parts = threads if heads % threads and rows >= SPLIT_ROWS * threads else 1
    # Parts of one size at one distance, as few rows as can be in two parts: those are masked in the later one.
    shared = rows % parts
    size = (rows + (parts - 1) * shared) // parts
    mask = None
    if shared:
        mask = query.new_zeros(1, parts, 1, size)
        mask[:, 1:, :, :shared] = -torch.inf
    keys, values = (
        part.as_strided((heads, parts, size, dim), (part.stride(0), (size - shared) * dim, dim, 1))
        for part in (keys, values)
    )
    return _flash(query[:, None].expand(-1, parts, -1, -1), keys, values, scale, mask=mask)


def split_ragged(query: Tensor, sealed: LayerKV, scale: float) -> Partial:
    """As `split` over sealed rows; a head with fewer parts than others has parts of no weight."""
    if sealed.even_rows is not None:
        return split(query, *_by_head(sealed), scale)
    heads, groups, dim = query.shape
    parts = torch.get_num_threads()
    wide = torch.promote_types(query.dtype, torch.float32)
    out = query.new_zeros(heads, parts, groups, dim)
    lse = query.new_full((heads, parts, groups), -torch.inf, dtype=wide)
    for head, (low, high) in enumerate(pairwise(sealed.bounds)):
        if low < high:
            one = slice(head, head + 1)
            some, some_lse = split(query[one], sealed.keys[None, low:high], sealed.values[None, low:high], scale)
            out[one, : some.shape[1]], lse[one, : some.shape[1]] = some, some_lse
    return out, lse


def _by_head(sealed: LayerKV) -> tuple[Tensor, Tensor]:
    """Keys and values of heads that hold as many rows each, as (H, N / H, D) views."""
    heads, dim = len(sealed.bounds) - 1, sealed.keys.shape[1]
    return sealed.keys.view(heads, -1, dim), sealed.values.view(heads, -1, dim)


def _flash(
    query: Tensor, keys: Tensor, values: Tensor, scale: float, is_causal: bool = False, mask: Tensor | None = None
) -> Partial:
    # The operator behind torch's scaled_dot_product_attention on CPUs: the public function does not return log-sum-exp.
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out, lse = kernel(query, keys, values, 0.0, is_causal, attn_mask=mask, scale=scale)
    return out, lse


def log_normaliser(query: Tensor, past: Tensor, own: Tensor, scale: float) -> Tensor:
    """As `reference.log_normaliser`."""
    heads, _, dim = own.shape
    _, lse = causal(query, own, own, scale)
    if past.shape[1]:
        _, seen = dense(query.reshape(heads, -1, dim), past, past, scale)
        lse = torch.logaddexp(lse, seen.reshape(lse.shape))
    return lse
