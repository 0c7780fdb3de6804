"""Join attention over disjoint sets of keys by their log-sum-exp: exact, in float32."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Partial = tuple[Tensor, Tensor]
"""Output (..., D) over some keys and the log-sum-exp (...,) float32 of its logits; no keys: zeros and -inf."""


def merge(parts: Sequence[Partial]) -> Partial:
    """The joint result over all keys, in the parts' dtype. At least one part must have keys for every query."""
    (out, lse), *rest = parts
    for other, other_lse in rest:
        # sigmoid(a - b) = exp(a) / (exp(a) + exp(b)); -inf on one side gives exactly 0 or 1.
        weight = torch.sigmoid(other_lse - lse)[..., None]
        out = torch.lerp(out.to(lse.dtype), other.to(lse.dtype), weight).to(other.dtype)
        lse = torch.logaddexp(lse, other_lse)
    return out, lse
