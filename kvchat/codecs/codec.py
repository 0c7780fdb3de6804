"""What a codec is: how the KV pairs of a frame become planes of bytes, and back.

Letters: L layers, H KV heads, T tokens, N rows of a frame, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvchat.codecs.frame import Planes

Take = Callable[[npt.NDArray[np.int64]], Planes]
"""Flat row indices into (L, H, T), ascending, to the planes of these rows."""


@dataclass(frozen=True, slots=True)
class FrameRows:
    """The rows of a frame: `counts` (layers, H) in (layer, head, time) order, each of `head_dim` numbers of `dtype`."""

    counts: npt.NDArray[np.int64]
    head_dim: int
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, int]:
        """(N, D)."""
        return int(self.counts.sum()), self.head_dim


class Codec(Protocol):
    """One way to write KV. Stateless; decoding is a pure function of bytes, equal on every device and thread count."""

    bars: Mapping[str, float]
    """For `frame.pack`: how far zstd must shrink a plane to be worth its time."""

    def row_bytes(self, head_dim: int, dtype: torch.dtype) -> int:
        """Most bytes one pair takes before zstd."""

    def param_shapes(self, layers: int, heads: int, head_dim: int) -> dict[str, tuple[int, ...]]:
        """Float32 planes that serve the whole segment and lie in its header; the first axis is L."""

    def read(self, keys: Sequence[Tensor], values: Sequence[Tensor]) -> tuple[Planes, Take]:
        """Parameters and rows of L layers of (H, T, D). Raises CodecError for values that it cannot write."""

    def decode(self, planes: Planes, params: Planes, rows: FrameRows, device: torch.device) -> tuple[Tensor, Tensor]:
        """Keys and values (N, D); `params` are those of the frame's layers. Raises CorruptFrame."""
