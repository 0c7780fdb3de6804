"""What values can add to the network's states, which is how much it would matter to attend to them.

Letters: H KV heads, G query heads per KV head, M tokens, D head_dim, n width of the network's states.
"""

from __future__ import annotations

import torch
from torch import Tensor


def output_norms(values: Tensor, weight: Tensor, order: int) -> Tensor:
    """The norm of each value (H, M, D) behind W_o (H * G, D, n) in every query head, (H, G, M) float32."""
    groups = weight.reshape(len(values), -1, *weight.shape[1:]).float()
    # One query head at a time: (M, n) numbers, never (H, G, M, n).
    heads = [
        torch.stack([(own.float() @ part).norm(order, dim=-1) for part in group])
        for own, group in zip(values, groups, strict=True)
    ]
    return torch.stack(heads).nan_to_num(posinf=1e30)


def value_share(values: Tensor, weight: Tensor) -> Tensor:
    """Each head's part, (H, M), of a token's values behind W_o (CriticalKV, DefensiveKV): mean L1 norms of its group.

    Arguments as for `output_norms`.
    """
    norms = output_norms(values, weight, 1).mean(1)
    return norms / norms.sum(0, keepdim=True).clamp_min(1e-12)
