"""Learned policies (KVP, arXiv 2602.10238): a small network for each KV head says which pairs later turns will read.

It sees keys, values and the place in the segment only, so a segment can be ranked wherever its KV comes from. Keys have
their RoPE turned back: a segment is judged alike wherever in the conversation it stands.

Letters: L layers, H KV heads, T tokens of the segment, D head_dim, P numbers that tell the place, F = 2 D + P, h hidden
units.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from kvchat.errors import InputError

NAMES = frozenset({"hidden", "hidden_bias", "out", "out_bias"})
WAVES = (1, 2)
"""Fourier features of the place: sine and cosine, so many times over the segment."""
PLACES = 4 + 2 * len(WAVES)

Rotate = Callable[[Tensor, Tensor], Tensor]
"""RoPE of (H, q, D) states by (q,) positions; negative ones turn back."""


class Policies:
    """All heads' policies: two layers of weights, ReLU between.

    Args:
        weights: `hidden` (L, H, F, h), `hidden_bias` (L, H, h), `out` (L, H, h), `out_bias` (L, H).

    Raises:
        InputError: these are other tensors.
    """

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        if weights.keys() != NAMES:
            raise InputError("the file of policies holds other tensors than they have; run `kvchat fit kvp` again")
        self._weights = {name: part.float() for name, part in weights.items()}

    def __call__(self, layer: int, keys: Tensor, values: Tensor, start: int, rotate: Rotate) -> Tensor:
        """Scores (H, T) float32, higher = keep, of a segment's keys (H, T, D) with their RoPE and values."""
        weights = {name: part[layer] for name, part in self._weights.items()}
        return policy_scores(weights, features(keys, values, start, rotate))


def policy_scores(weights: Mapping[str, Tensor], inputs: Tensor) -> Tensor:
    """Scores (H, T) of inputs (H, T, F); weights as `Policies` without L, or with L and H in one."""
    hidden = torch.baddbmm(weights["hidden_bias"][:, None], inputs, weights["hidden"]).relu()
    return torch.baddbmm(weights["out_bias"][:, None, None], hidden, weights["out"][:, :, None])[:, :, 0]


def features(keys: Tensor, values: Tensor, start: int, rotate: Rotate) -> Tensor:
    """What policies see (H, T, F) float32 of keys (H, T, D) with their RoPE, whose first stands at `start`."""
    heads, tokens, _ = keys.shape
    positions = torch.arange(start, start + tokens, device=keys.device)
    place = places(tokens, keys.device).expand(heads, -1, -1)
    return torch.cat([rotate(keys, -positions).float(), values.float(), place], dim=2)


def places(tokens: int, device: torch.device) -> Tensor:
    """Where in its segment each token stands (T, P): as a fraction, from both ends, as waves; and the length."""
    index = torch.arange(tokens, dtype=torch.float32, device=device)
    share = (index + 0.5) / tokens
    ends = [torch.log1p(index), torch.log1p(tokens - 1 - index), torch.log(torch.full_like(index, tokens))]
    waves = [wave(2 * torch.pi * times * share) for times in WAVES for wave in (torch.sin, torch.cos)]
    return torch.stack([share, *(end / 8 for end in ends), *waves], dim=1)
