"""What a gate says of every token while it is computed, so that sealing needs no pass.

Letters: L layers, H KV heads, q tokens of a forward pass, T tokens, n width of the network's states.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class Marks:
    """Scores of the tail's tokens, by position; of tokens that came another way there are none.

    Args:
        gate: a layer and the states (q, n) that enter its attention to scores (H, q).
    """

    def __init__(self, gate: Callable[[int, Tensor], Tensor]) -> None:
        self._gate = gate
        self._layers: list[Tensor] = []
        self._blocks: list[tuple[int, Tensor]] = []

    def enter(self, layer: int, states: Tensor) -> None:
        """Take one layer of the running pass."""
        if layer == 0:
            self._layers = []  # of a pass that failed
        self._layers.append(self._gate(layer, states))

    def add(self, start: int) -> None:
        """The running pass was of tokens from position `start` on."""
        self._blocks.append((start, torch.stack(self._layers)))
        self._layers = []

    def crop(self, position: int) -> None:
        """Forget the tokens from `position` on."""
        kept = [(start, block) for start, block in self._blocks if start < position]
        self._blocks = [(start, block[..., : position - start]) for start, block in kept]

    def take(self, start: int, end: int, blank: Tensor) -> Tensor:
        """Scores of tokens start .. end, over `blank` (L, H, T) where there are none; those before are forgotten."""
        self._blocks = [(first, block) for first, block in self._blocks if first + block.shape[2] > start]
        for first, block in self._blocks:
            low, high = max(first, start), min(first + block.shape[2], end)
            if low < high:
                blank[..., low - start : high - start] = block[..., low - first : high - first]
        return blank
