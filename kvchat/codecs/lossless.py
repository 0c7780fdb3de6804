"""Method `raw`: the exact bits of keys or values, whatever they are.

A word is rotated left by one bit: its top byte is then the exponent (bfloat16, float32), the sign joins the mantissa.
Each byte of the words becomes a plane. Exponents shrink to about a third, mantissas hardly at all.

Letters: L layers, H KV heads, T tokens, N rows of a frame, D head_dim.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvchat.codecs.codec import Exact, FrameRows, Take, Takes, Tensors
from kvchat.codecs.frame import Planes, expect

_INTEGERS: dict[int, tuple[torch.dtype, np.dtype[Any]]] = {
    2: (torch.int16, np.dtype(np.uint16)),
    4: (torch.int32, np.dtype(np.uint32)),
}


@dataclass(frozen=True, slots=True)
class Raw:
    """Lossless; planes key0, key1, ... or value0, value1, ... (N, D) uint8, byte 0 the lowest."""

    side: str

    @property
    def bars(self) -> Mapping[str, float]:
        """The usual one."""
        return {}

    def layer_bytes(self, rows: FrameRows, scale_bytes: int) -> npt.NDArray[np.int64]:
        """Plain bytes of the numbers."""
        return rows.per_layer * (rows.head_dim * rows.dtype.itemsize)

    def param_shapes(self, layers: int, heads: int, head_dim: int) -> dict[str, tuple[int, ...]]:
        """None: every row stands for itself."""
        return {}

    def read(self, exact: Exact) -> tuple[Tensors, Takes]:
        """Nothing yet: rows are cut into bytes when they are taken."""

        def takes(first: int, last: int) -> Take:
            group = exact.of_layers(first, last)

            def take(rows: FrameRows, index: Tensor) -> Tensors:
                words = _words(group.pick(rows, index))
                return {f"{self.side}{byte}": (words >> 8 * byte).to(torch.uint8) for byte in range(words.itemsize)}

            return take

        return {}, takes

    def decode(self, planes: Planes, params: Planes, rows: FrameRows, device: torch.device) -> Tensor:
        """The rows (N, D), bit for bit what was written."""
        _, unsigned = _INTEGERS[rows.dtype.itemsize]
        of_byte = [expect(planes, f"{self.side}{byte}", rows.shape, "|u1") for byte in range(rows.dtype.itemsize)]
        words = np.zeros(rows.shape, unsigned)
        for byte, plane in enumerate(of_byte):
            words |= plane.astype(unsigned) << 8 * byte
        words = (words >> 1) | (words << (8 * words.itemsize - 1))
        return torch.from_numpy(words).view(rows.dtype).to(device)


def _words(rows: Tensor) -> Tensor:
    """Rows (N, D) as words of as many bits, rotated left by one."""
    signed, _ = _INTEGERS[rows.dtype.itemsize]
    words = rows.view(signed)
    # A shift to the right copies the sign to every bit that it frees; the lowest is the one that counts.
    return (words << 1).bitwise_or_((words >> 8 * words.itemsize - 1).bitwise_and_(1))
