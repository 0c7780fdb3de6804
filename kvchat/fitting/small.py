"""The small gate of Fast KVzip (arXiv 2601.17668): binary cross entropy against KVzip's scores themselves.

A layer at a time, since layers share nothing: a stopped fit goes on at the layer where it was. AdamW in place of the
paper's SGD, which wants ten times as many steps. It wants much text: from 3700 tokens of one conversation its rank
correlation with KVzip on others is 0.74 for the built-in model (0.90 on its own), where ridge has 0.82 (0.87).

Letters: L layers, H KV heads, G query heads per KV head, n width of the states, N tokens, R rank, S sinks.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvchat.compress.gates import SmallGate, small_scores
from kvchat.events import Progress
from kvchat.fitting.checkpoint import Checkpoint
from kvchat.fitting.collecting import Segment

RANK = 16
SINKS = 16
BATCH = 1000
"""Tokens of one step."""
RATE = 3e-3
DECAY = 1e-2
WARM = 50
"""Steps in which the rate rises."""


@dataclass(frozen=True, slots=True)
class Shape:
    """What a gate is made for."""

    layers: int
    heads: int
    groups: int


def fitted(
    segments: Sequence[Segment], shape: Shape, steps: int, seed: int, point: Checkpoint, device: torch.device
) -> Generator[Progress, None, dict[str, Tensor]]:
    """The weights of a `SmallGate`; progress is counted in layers, and kept in the checkpoint after each."""
    done, found = point.load()
    free = [segment.candidates for segment in segments]
    for layer in range(done, shape.layers):
        pairs = list(zip(segments, free, strict=True))
        states = torch.cat([one.tensor("states", layer)[flags] for one, flags in pairs]).to(device).float()
        scores = torch.cat([one.tensor("kvzip", layer)[:, flags] for one, flags in pairs], dim=1).to(device)
        source = torch.Generator().manual_seed(seed * 1_000_003 + layer)
        weights = _layer(states, scores, shape, steps, source)
        found = {name: torch.cat([*([found[name]] if layer else []), part[None]]) for name, part in weights.items()}
        point.save(layer + 1, found)
        yield Progress("fit", layer + 1, shape.layers)
    return found


def _layer(states: Tensor, scores: Tensor, shape: Shape, steps: int, source: torch.Generator) -> dict[str, Tensor]:
    """One layer's weights, on the CPU, of states (N, n) and scores (H, N)."""
    scale = states.square().mean(0).clamp_min(1e-12).rsqrt()
    weights = _begun(states.shape[1], shape, source)
    weights = {name: part.to(states.device).requires_grad_() for name, part in weights.items()}
    optimizer = torch.optim.AdamW(weights.values(), lr=RATE, weight_decay=DECAY)
    scaled = states * scale
    for step in range(steps):
        chosen = torch.randint(len(states), [min(BATCH, len(states))], generator=source).to(states.device)
        told = small_scores(weights, scaled[chosen]).clamp(1e-6, 1 - 1e-6)
        loss = torch.nn.functional.binary_cross_entropy(told, scores[:, chosen].clamp(0, 1)) * shape.heads
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.param_groups[0]["lr"] = RATE * rate(step, steps, min(WARM, steps // 4 + 1))
        optimizer.step()
    return _unscaled(weights, scale)


def _begun(width: int, shape: Shape, source: torch.Generator) -> dict[str, Tensor]:
    """Weights to begin with."""
    heads, groups = shape.heads, shape.groups

    def noise(*size: int) -> Tensor:
        return torch.randn(*size, generator=source)

    return {
        "query": noise(heads, groups, RANK, width) * width**-0.5,
        "query_bias": torch.zeros(heads, groups, RANK),
        "key": noise(heads, RANK, width) * width**-0.5,
        "query_norm": torch.ones(RANK),
        "key_norm": torch.ones(RANK),
        "sinks": noise(heads, SINKS, RANK),
        "sink_bias": torch.zeros(heads, groups),
    }


def _unscaled(weights: Mapping[str, Tensor], scale: Tensor) -> dict[str, Tensor]:
    """Weights for the states as they are."""
    parts = {name: weights[name].detach() for name in sorted(SmallGate.NAMES)}
    return {name: (part * scale if name in ("query", "key") else part).cpu() for name, part in parts.items()}


def rate(step: int, steps: int, warm: int) -> float:
    """Part of the full learning rate: rises in `warm` steps, then falls as half a cosine."""
    if step < warm:
        return (step + 1) / warm
    return 0.5 + 0.5 * math.cos(math.pi * min(1.0, (step - warm) / max(1, steps - warm)))
