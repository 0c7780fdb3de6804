"""How much the keys of each layer change when far tokens are out of sight, and the shares that follow (EpiCache).

Layers whose keys depend on what stands far away need more of it (arXiv 2509.17396, section 3.3). With sigma a layer's
similarity of keys with and without far tokens, its sensitivity is 1 - sigma and its share in proportion to the
sensitivity to the power ALPHA: the paper's formula. The released code takes 1 - the min-max normalised sigma, with
other exponents, and so gives the most similar layer nothing; that is not done here.

Letters: L layers, H KV heads, n tokens, D head_dim.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from kvchat.compress.evolve import Shares, complete
from kvchat.engine import Engine
from kvchat.errors import InputError
from kvchat.events import Listener, Progress

ALPHA = 2.0
"""The paper finds 2 to 4 best and 8 harmful."""
SINKS, WINDOW = 128, 100
"""First tokens that every block sees, and tokens whose keys are compared together."""


def similarities(engine: Engine, ids: Sequence[int], block: int, listener: Listener) -> list[float]:
    """sigma of each layer (L,): how alike its keys are when a block sees all before it, and when only a little.

    That is the first SINKS tokens, half a block before it, and itself. The first block sees the same, and is left out.

    Raises:
        InputError: the text is not longer than a block, or keys cannot be turned back to position 0.
    """
    if len(ids) <= block or block <= SINKS:
        raise InputError(
            f"{len(ids)} tokens are too few to be measured in blocks of {block}; give a longer conversation"
        )
    whole, found = _keys(engine, ids), list[Tensor]()
    for start in range(block, len(ids), block):
        first, end = max(SINKS, start - block // 2), min(start + block, len(ids))
        part = _keys(engine, [*ids[:SINKS], *ids[first:end]])
        pairs = zip(whole, part, strict=True)
        found += _windows([(full[:, start:end], own[:, start - end :]) for full, own in pairs])
        listener(Progress("evaluate", end, len(ids)))
    sigmas: list[float] = torch.stack(found).mean(0).tolist()
    return sigmas


def shares_of(sigmas: Sequence[float], alpha: float = ALPHA) -> Shares:
    """The layers' shares, of mean 1."""
    sensitivity = [max(1 - sigma, 1e-6) ** alpha for sigma in sigmas]
    return complete(sensitivity, float(len(sigmas)))


def _keys(engine: Engine, ids: Sequence[int]) -> list[Tensor]:
    """Keys (H, n, D) of every layer before RoPE, float32; in chunks, for memory's sake."""
    cache = engine.new_cache()
    for start in range(0, len(ids), engine.chunk_size):
        engine.forward(cache, ids[start : start + engine.chunk_size])
    keys, _ = cache.tail(0, len(ids))
    back = -torch.arange(len(ids), device=keys[0].device)
    return [engine.anatomy.rotate(layer, back) for layer in keys]


def _windows(layers: Sequence[tuple[Tensor, Tensor]]) -> Iterator[Tensor]:
    """For each window of tokens the cosine (L,) of its keys, laid out as one vector a head, averaged over the heads."""
    length = layers[0][0].shape[1]
    for start in range(0, length, WINDOW):
        part = slice(start, start + WINDOW)
        cosines = [
            torch.nn.functional.cosine_similarity(full[:, part].flatten(1), own[:, part].flatten(1), dim=-1).mean()
            for full, own in layers
        ]
        yield torch.stack(cosines).cpu()
