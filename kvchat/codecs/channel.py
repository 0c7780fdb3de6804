"""Keys in 4, 3 or 2 bits: per channel, in groups of 32 rows (KIVI, arXiv 2402.02750).

Each head's rows of a frame, in time order, form groups of 32; its last group may be shorter. In each group every
channel has a scale and a min of its own, so a strong channel or a huge constant bias costs its neighbours nothing. (One
scale a token, or a rotation over channels, loses such keys altogether.)

Planes: key (N, W) uint8, packed as `bits` says; key_scale, key_min (G, D) float16, or float32 if float16 would
overflow; groups stand in (layer, head, time) order. A key is q * scale + min in float32; q * scale is exact, as in 8
bits.

Letters: L layers, H KV heads, T tokens, N rows of a frame, G groups, D head_dim, W bytes of a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvchat.cache.coded import GROUP
from kvchat.codecs.bits import expand, level_table, pack_codes, row_bytes
from kvchat.codecs.codec import Exact, FrameRows, Take, Takes, Tensors
from kvchat.codecs.frame import Planes, expect
from kvchat.codecs.quant import SURE_OF_HALF, blocks, by_unit, largest_fitting, scale_and_min, to_tensor


@dataclass(frozen=True, slots=True)
class ChannelKeys:
    """Keys in `bits` bits."""

    bits: int

    @property
    def bars(self) -> Mapping[str, float]:
        """Codes cannot be shrunk."""
        return {"key": 0}

    def layer_bytes(self, rows: FrameRows, scale_bytes: int) -> npt.NDArray[np.int64]:
        """Codes, and a scale and min for each group and channel."""
        groups: npt.NDArray[np.int64] = (-(-rows.counts // GROUP)).sum(axis=1)
        return rows.per_layer * row_bytes(rows.head_dim, self.bits) + groups * (2 * rows.head_dim * scale_bytes)

    def param_shapes(self, layers: int, heads: int, head_dim: int) -> dict[str, tuple[int, ...]]:
        """None: a frame stands for itself."""
        return {}

    def read(self, exact: Exact) -> tuple[Tensors, Takes]:
        """Nothing yet: which rows make a group is known when they are taken."""
        small = largest_fitting("keys", exact) <= SURE_OF_HALF

        def takes(first: int, last: int) -> Take:
            group = exact.of_layers(first, last)

            def take(rows: FrameRows, index: Tensor) -> Tensors:
                padded, real = padded_groups(rows.counts.reshape(-1))
                picked, device = group.pick(rows, index), index.device
                keys = picked.index_select(0, torch.from_numpy(padded).to(device)).float()
                codes, scale, low = self._quantise(keys.view(-1, GROUP, rows.head_dim), small)
                codes = codes.flatten(0, 1).index_select(0, torch.from_numpy(np.flatnonzero(real)).to(device))
                return {"key": pack_codes(codes, self.bits), "key_scale": scale, "key_min": low}

            return take

        return {}, takes

    def decode(self, planes: Planes, params: Planes, rows: FrameRows, device: torch.device) -> Tensor:
        """Keys (N, D), computed in float32."""
        num_rows, head_dim = rows.shape
        group = torch.from_numpy(row_groups(rows.counts.reshape(-1))).to(device)
        num_groups = int(group[-1]) + 1 if num_rows else 0
        packed = to_tensor(expect(planes, "key", (num_rows, row_bytes(head_dim, self.bits)), "|u1"), device)
        scale, low = (
            to_tensor(expect(planes, name, (num_groups, head_dim), "<f2", "<f4"), device).float()
            for name in ("key_scale", "key_min")
        )
        return self.dequantise(packed, group, scale, low, rows.dtype)

    def dequantise(self, packed: Tensor, unit: Tensor, scale: Tensor, low: Tensor, dtype: torch.dtype) -> Tensor:
        """As `by_unit`, of codes (N, W) uint8; a unit is a group."""
        levels = torch.arange(1 << self.bits, dtype=torch.float32, device=packed.device)
        table, head_dim = level_table(levels, self.bits), scale.shape[1]
        return by_unit(lambda part: expand(packed[part], table, self.bits, head_dim), unit, scale, low, dtype)

    def _quantise(self, keys: Tensor, small: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Codes (G, 32, D) uint8, scale and min (G, D), of groups of keys (G, 32, D); `small` ones fit float16.

        From min to max, although less would lower the squared error: it moves the keys that stand out, which attention
        looks for (choosing of 1 and .9 of the range on real KV: KL .0060 in place of .0029 in 4 bits).
        """
        low, high = keys.aminmax(dim=1)
        scale, low = scale_and_min(low, high - low, (1 << self.bits) - 1, small)
        codes = torch.empty(keys.shape, dtype=torch.uint8, device=keys.device)
        for part in blocks((len(keys), GROUP * keys.shape[2]), keys.device):
            steps = (keys[part] - low[part].float().unsqueeze(1)).div_(scale[part].float().unsqueeze(1))
            codes[part] = steps.round_()
        return codes, scale, low


def row_groups(counts: npt.NDArray[np.int64], size: int = GROUP) -> npt.NDArray[np.int64]:
    """The group of each row, (N,), of heads with `counts` rows, if a group has `size`."""
    groups = -(-counts // size)
    first_row, first_group = np.cumsum(counts) - counts, np.cumsum(groups) - groups
    head = np.repeat(np.arange(len(counts)), counts)
    group: npt.NDArray[np.int64] = first_group[head] + (np.arange(len(head)) - first_row[head]) // size
    return group


def padded_groups(
    counts: npt.NDArray[np.int64], size: int = GROUP
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """`size` rows for every group, the last row of a short one repeated, and which of these rows are no repetition."""
    sizes = np.bincount(row_groups(counts, size))
    first, place = np.cumsum(sizes) - sizes, np.arange(size)
    index = first[:, None] + np.minimum(place, sizes[:, None] - 1)
    return index.reshape(-1), (place < sizes[:, None]).reshape(-1)
