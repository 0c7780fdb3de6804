"""Keys or values within a stated error: uniform steps of a unit's range, whose codes zstd makes small (KVComp).

After KVComp (arXiv 2509.00579), with zstd's Huffman codes in place of its own. In a unit from min to max the step is
`rel` of max - min, rounded down; a number is read within half a step of what it was, but for rounding to its dtype.

    q = round((x - min) / step)      x is read as q * step + min in float32; q * step is exact, as in 8 bits

Units: a key channel within up to 64 rows of one head of a frame, in time order; a value's row. Never a token's keys
together: a constant bias of some channels would then widen the range of all. And the min is subtracted as a number: as
a code of its own, min / step would leave any integer of few bits where a bias is large against its range.

The same `rel` serves keys and values: finer keys beside coarser values were no closer at equal bytes (built-in model,
4.6 bits an element: KL .0030 with .05 and .05, .0032 with .03 and .08, .0034 with .04 and .065). Codes lie row by row,
which zstd's level 1 shrinks as far as any other order; bytes of steps and mins lie apart, high ones after low ones.

Planes: key or value (N, D) uint8; key_step, key_min (B, U, D) and value_step, value_min (B, N, 1) uint8, the B = 2 or 4
bytes of float16, or of float32 where float16 would not keep the bound.

Letters: L layers, H KV heads, T tokens, N rows of a frame, U units, D head_dim.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvchat.codecs.channel import padded_groups, row_groups
from kvchat.codecs.codec import Exact, FrameRows, Take, Takes, Tensors
from kvchat.codecs.frame import Planes, expect
from kvchat.codecs.quant import blocks, largest_fitting, or_one, round_down_half, to_tensor
from kvchat.errors import CorruptFrame

UNIT = 64
"""Most rows of a unit of keys."""

_LEVELS = 255


@dataclass(frozen=True, slots=True)
class Bounded:
    """Keys or values in steps of `rel` of their unit's range; `rel` is at least 1 / 250."""

    side: Literal["key", "value"]
    rel: float

    @property
    def bars(self) -> Mapping[str, float]:
        """The usual one: without zstd this codec has no point."""
        return {}

    def layer_bytes(self, rows: FrameRows, scale_bytes: int) -> npt.NDArray[np.int64]:
        """Codes, and a step and min for each unit."""
        units = rows.per_layer
        if self.side == "key":
            units = (-(-rows.counts // UNIT)).sum(axis=1) * rows.head_dim
        layer_bytes: npt.NDArray[np.int64] = rows.per_layer * rows.head_dim + units * (2 * scale_bytes)
        return layer_bytes

    def param_shapes(self, layers: int, heads: int, head_dim: int) -> dict[str, tuple[int, ...]]:
        """None: a frame stands for itself."""
        return {}

    def read(self, exact: Exact) -> tuple[Tensors, Takes]:
        """Nothing yet: which rows make a unit is known when they are taken."""
        largest_fitting(f"{self.side}s", exact)

        def takes(first: int, last: int) -> Take:
            group = exact.of_layers(first, last)
            return lambda rows, index: self._planes(group.pick(rows, index), rows.counts.reshape(-1))

        return {}, takes

    def decode(self, planes: Planes, params: Planes, rows: FrameRows, device: torch.device) -> Tensor:
        """The rows (N, D), computed in float32."""
        codes = to_tensor(expect(planes, self.side, rows.shape, "|u1"), device)
        units = self._units(rows.counts.reshape(-1))
        shape = (int(units[-1]) + 1 if len(units) else 0, rows.head_dim if self.side == "key" else 1)
        step, low = (
            torch.from_numpy(_bytes_together(planes, f"{self.side}_{name}", shape)).to(device)
            for name in ("step", "min")
        )
        unit = torch.from_numpy(units).to(device)
        out = torch.empty(rows.shape, dtype=rows.dtype, device=device)
        for part in blocks(rows.shape, device):
            of = unit[part]
            out[part] = codes[part].float().mul_(step.index_select(0, of)).add_(low.index_select(0, of))
        return out

    def _planes(self, numbers: Tensor, counts: npt.NDArray[np.int64]) -> Tensors:
        """Planes of the rows (N, D) of heads with `counts` rows."""
        step, low = step_and_min(*self._bounds(numbers, counts), self.rel)
        unit = torch.from_numpy(self._units(counts)).to(numbers.device)
        codes = torch.empty(numbers.shape, dtype=torch.uint8, device=numbers.device)
        for part in blocks(codes.shape, numbers.device):
            of = unit[part]
            steps = numbers[part].float().sub_(low.index_select(0, of)).div_(step.index_select(0, of)).round_()
            codes[part] = steps.clamp_(0, _LEVELS)
        return {self.side: codes, f"{self.side}_step": _bytes_apart(step), f"{self.side}_min": _bytes_apart(low)}

    def _units(self, counts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The unit of each row, (N,), of heads with `counts` rows."""
        return row_groups(counts, UNIT) if self.side == "key" else np.arange(counts.sum())

    def _bounds(self, numbers: Tensor, counts: npt.NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Least and greatest number of each unit, (U, D) or (N, 1) float32."""
        if self.side == "value":
            low, high = numbers.aminmax(dim=1, keepdim=True)
        else:
            padded = torch.from_numpy(padded_groups(counts, UNIT)[0]).to(numbers.device)
            low, high = numbers.index_select(0, padded).view(-1, UNIT, numbers.shape[1]).aminmax(dim=1)
        return low.float(), high.float()


def step_and_min(low: Tensor, high: Tensor, rel: float) -> tuple[Tensor, Tensor]:
    """Steps of at most `rel` * (high - low), and mins at or below `low`: numbers of float16 if all fit, in float32.

    A min rounded to float16 lies below `low`, so codes rise; where they would pass 255, as where a bias is thousands of
    times its range, float16 does not fit. A constant unit is its min and one step, if float16 has numbers so small.
    """
    extent = high - low
    low16 = round_down_half(low)
    above = high - low16.float()
    step16 = torch.where(extent == 0, above.half(), round_down_half(rel * extent)).float()
    constant = (low16.float() + step16 - low).abs() <= 2.0**-21 * low.abs()
    fits = torch.where(extent == 0, constant, above <= _LEVELS * step16) & (step16 + low16).isfinite()
    if bool(fits.all()):
        return or_one(step16).half(), low16
    # Cut to 16 significant bits, so that a code times its step is exact.
    step = ((rel * extent).view(torch.int32) & ~0xFF).view(torch.float32)
    return or_one(step), low


def _bytes_apart(plane: Tensor) -> Tensor:
    """(U, ...) numbers as their lowest bytes, then the next, (B, U, ...) uint8: the high ones shrink well."""
    words = plane.view({2: torch.int16, 4: torch.int32}[plane.itemsize])
    return torch.stack([(words >> 8 * byte).to(torch.uint8) for byte in range(words.itemsize)])


def _bytes_together(planes: Planes, name: str, shape: tuple[int, int]) -> npt.NDArray[np.float32]:
    """What `_bytes_apart` took apart, as float32. Raises CorruptFrame."""
    size = planes[name].shape[0] if name in planes and planes[name].ndim == 3 else 2
    if size not in (2, 4):
        raise CorruptFrame(f"plane {name!r} has numbers of {size} bytes, expected 2 or 4")
    apart = expect(planes, name, (size, *shape), "|u1")
    together = np.ascontiguousarray(np.moveaxis(apart, 0, -1)).view(f"<f{size}").reshape(shape)
    return expect({name: together}, name, shape, f"<f{size}").astype(np.float32)
