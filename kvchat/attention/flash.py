"""Variable-length flash attention on a CUDA device, with log-sum-exp: flash-attn-4's where it is faster, or torch's.

Torch's own is flash-attn 2, so that package would add nothing. Both align a causal mask with the last key of every
sequence, so a tail that is longer than its new tokens needs no parts. float16 and bfloat16 only.

Letters: S sequences, Q query rows of all sequences, N key rows of all sequences, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module

import torch
from torch import Tensor

from kvchat.attention.merge import Partial

LAUNCH_ROWS = 128
"""With fewer query rows flash-attn-4 takes longer to launch than to compute."""


Varlen = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, int, int, float, bool], Partial]
"""`varlen` and functions equal to it."""


def varlen(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float,
    causal: bool,
) -> Partial:
    """Softmax attention of every sequence's query rows over its key rows.

    Args:
        query: (Q, heads, D). keys, values: (N, KV heads, D), whose number divides that of the heads. Views are welcome
            if elements of a row lie side by side.
        cu_seqlens_q, cu_seqlens_k: (S + 1,) int32 on the device, where each sequence's rows begin and the last ends.
        max_seqlen_q, max_seqlen_k: rows of the longest sequence.
        scale: factor on the logits.
        causal: row i of a sequence's last n query rows does not see its last n - 1 - i keys.

    Returns:
        Output (Q, heads, D) and log-sum-exp (Q, heads) float32. A sequence without keys has a log-sum-exp of plus or
        minus infinity.
    """
    tall = max_seqlen_q >= LAUNCH_ROWS and query.shape[-1] in (64, 96, 128)
    newer = tall and flash_attn_4(torch.cuda.get_device_capability(query.device)[0]) is not None
    given = query, keys, values, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale, causal
    return by_flash_attn_4(*given) if newer else by_torch(*given)


def by_torch(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float,
    causal: bool,
) -> Partial:
    """`varlen` by torch's own kernel."""
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        *(query, keys, values, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k),
        *(0.0, causal, False),
        scale=scale,
    )
    return out, lse.T


def by_flash_attn_4(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float,
    causal: bool,
) -> Partial:
    """`varlen` by flash-attn-4's kernel, which must be installed."""
    kernel = flash_attn_4(torch.cuda.get_device_capability(query.device)[0])
    assert kernel is not None
    with torch.cuda.device_of(query):  # type: ignore[no-untyped-call]
        out, lse = kernel(
            *(query, keys, values),
            cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_k=cu_seqlens_k,
            max_seqlen_q=max_seqlen_q,
            max_seqlen_k=max_seqlen_k,
            softmax_scale=scale,
            causal=causal,
            return_lse=True,
        )
    return out, lse.T


@cache
def flash_attn_4(major: int) -> Callable[..., Partial] | None:
    """Its function if it is installed and made for devices of compute capability `major`."""
    if major not in (9, 10):
        return None
    try:
        kernel: Callable[..., Partial] = import_module("flash_attn.cute").flash_attn_varlen_func
    except ImportError:
        return None
    return kernel
