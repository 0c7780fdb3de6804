"""The basis of a conversation's archive: principal components, means and steps from its own segments.

Sums are taken segment by segment, so that no more than one is in memory. Steps are as large as the bytes allow: every
unit loses the same share of its variance, keys half as much as values, because their errors cost more.

Letters: L layers, H KV heads, T tokens of a segment, D head_dim, P pairs, S shifts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from math import erf, log2, sqrt
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvchat.cache.segment import Ranking
from kvchat.codecs.archive import LEVELS, NUM_SINKS, ONE, RISE, UNIT_LEVEL, Side, shifts
from kvchat.codecs.frame import Planes, pack
from kvchat.errors import CodecError

SHARE = 0.12
"""Bytes of an archived conversation against those of its KV in bfloat16."""

# What zstd stores beyond the entropy of a Gaussian, and what headers and exact rows take.
_MARGIN = 0.93
_KEY_STEP = 0.7
# RoPE's base in the models that there are; that which leaves keys the least volume is the model's.
_BASES = (1e4, 1e5, 5e5, 1e6, 5e6, 1e7)


class Part(NamedTuple):
    """One segment: keys and values (L, H, T, D), its ranking, and which pairs are there, (L, H, T) bool."""

    keys: Tensor
    values: Tensor
    ranking: Ranking
    present: Tensor


def fit_basis(parts: Iterator[Part], share: float = SHARE) -> bytes:
    """One frame: the basis with which these segments take about `share` of their bytes in bfloat16, all told.

    One of less than some 2000 tokens takes more: the basis alone has D ** 2 bytes for each unit and side.

    Raises:
        CodecError: there is no segment, or its numbers are not finite.
    """
    part = next(parts, None)
    if part is None:
        raise CodecError("there is no sealed segment to make a basis of")
    turn = _find_turn(part)
    keys, values = _Moments(part.keys.shape), _Moments(part.values.shape)
    while part is not None:
        keys.add(part.keys, part, turn)
        values.add(part.values, part, None)
        del part  # or two segments would be in memory while the next is read
        part = next(parts, None)
    spectra: dict[Side, _Spectrum] = {"key": keys.spectrum(), "value": values.spectrum()}
    steps = _steps(spectra, keys.sizes, _code_bits(spectra["key"].rows, keys.sizes, share))
    planes: Planes = {"turn": turn.astype("<f4")}
    for side, spectrum in spectra.items():
        planes |= spectrum.planes(side, steps[side])
    return pack({"kind": "basis"}, planes)


@dataclass(frozen=True, slots=True)
class _Spectrum:
    """rows (L, H, D, D) uint8, mean (L, H, D) float32, deviation (L, H, D) of each component, the largest first."""

    rows: npt.NDArray[np.uint8]
    mean: npt.NDArray[np.float32]
    deviation: npt.NDArray[np.float64]

    @property
    def spread(self) -> npt.NDArray[np.float64]:
        """Root of the mean variance of a unit's numbers, (L, H), never quite nothing."""
        least = 1e-6 * np.abs(self.mean).max(2) + 1e-30
        spread: npt.NDArray[np.float64] = np.maximum(np.sqrt(np.square(self.deviation).mean(2)), least)
        return spread

    def levels(self, step: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
        """(L, H, D) for steps (L, H)."""
        level = UNIT_LEVEL + 2 * np.log2(np.maximum(self.deviation / step[:, :, None], 1e-9))
        rounded: npt.NDArray[np.int64] = np.rint(level).clip(0, LEVELS[-1] + 2 * RISE).astype(np.int64)
        return rounded

    def planes(self, side: Side, step: npt.NDArray[np.float32]) -> Planes:
        """Those of the basis; components that no chunk keeps are zeros."""
        level = self.levels(step)
        rows = np.where((level >= LEVELS[0])[..., None], self.rows, ONE + 1).astype(np.uint8)
        named: Planes = {"rows": rows, "mean": self.mean, "step": step, "level": level.astype(np.uint8)}
        return {f"{side}_{name}": plane for name, plane in named.items()}


class _Moments:
    """Sums over the pairs of a side that are there, less the conversation's first tokens, which are like no others."""

    def __init__(self, shape: torch.Size) -> None:
        layers, heads, _, dim = shape
        self.count = torch.zeros(layers, heads, 1, dtype=torch.float64)
        self.sum = torch.zeros(layers, heads, dim, dtype=torch.float64)
        self.square = torch.zeros(layers, heads, dim, dim, dtype=torch.float64)
        self.sizes = np.zeros((layers, heads, 2 * RISE + 1))
        """Pairs of each unit by the shift of their chunk, (L, H, S)."""

    def add(self, rows: Tensor, part: Part, frequency: npt.NDArray[np.float64] | None) -> None:
        """Count a segment's rows (L, H, T, D) on any device in, RoPE undone by `frequency` (D // 2,)."""
        ranking, tokens = part.ranking, rows.shape[2]
        first = ranking.position
        late = torch.arange(first, first + tokens) >= min(NUM_SINKS, first + tokens - 1)
        shift = torch.from_numpy(shifts(ranking)[ranking.chunk_of])
        for layer, on_device in enumerate(rows):
            layer_rows = on_device.cpu()
            unturned = layer_rows.double() if frequency is None else unturn(layer_rows, first, frequency)
            there = part.present[layer] & late
            kept = unturned * there.unsqueeze(2)
            self.count[layer] += there.sum(1, keepdim=True)
            self.sum[layer] += kept.sum(1)
            self.square[layer] += kept.transpose(1, 2) @ kept
        for moved in range(2 * RISE + 1):
            self.sizes[:, :, moved] += ((shift == moved) & part.present).sum(2).numpy()

    def covariance(self) -> tuple[Tensor, Tensor]:
        """Mean (L, H, D), and covariance (L, H, D, D). Raises CodecError."""
        count = self.count.clamp(min=1)
        mean = self.sum / count
        covariance = self.square / count.unsqueeze(3) - mean.unsqueeze(3) * mean.unsqueeze(2)
        if not bool(covariance.isfinite().all()):
            raise CodecError("KV that is not finite cannot be archived")
        return mean, covariance

    def spectrum(self) -> _Spectrum:
        """Raises CodecError."""
        mean, covariance = self.covariance()
        variance, vectors = torch.linalg.eigh(covariance)
        rows = (vectors.flip(3).transpose(2, 3) * ONE).round() + (ONE + 1)
        deviation = variance.flip(2).clamp(min=0).sqrt()
        return _Spectrum(rows.byte().numpy(), mean.float().numpy(), deviation.numpy())


def unturn(keys: Tensor, start: int, frequency: npt.NDArray[np.float64]) -> Tensor:
    """Keys (H, T, D) without RoPE, in float64, whose first token stands at position `start`."""
    half = len(frequency)
    angle = torch.arange(start, start + keys.shape[1], dtype=torch.float64).unsqueeze(1) * torch.from_numpy(frequency)
    one, other, rest = keys.double().tensor_split([half, 2 * half], 2)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([one * cos + other * sin, other * cos - one * sin, rest], 2)


def _find_turn(part: Part) -> npt.NDArray[np.float64]:
    """RoPE's frequencies (D // 2,): of the known ones those that leave the least volume, zeros if none beats none.

    Any would do, for what is undone is done again; the right ones make keys of like tokens alike, wherever they stand.
    """
    half, dim = part.keys.shape[3] // 2, part.keys.shape[3]
    # As the basis keeps them: float32.
    known = [(base ** (-2 * np.arange(half) / dim)).astype(np.float32).astype(np.float64) for base in _BASES]
    found: list[npt.NDArray[np.float64]] = [np.zeros(half), *known]
    volumes = []
    for frequency in found:
        moments = _Moments(part.keys.shape)
        moments.add(part.keys, part, frequency)
        _, covariance = moments.covariance()
        variance = torch.linalg.eigvalsh(covariance)
        floor = 1e-3 * variance.mean(2, keepdim=True) + 1e-30
        volumes.append(float((variance.clamp(min=0) + floor).log().mean()))
    return found[int(np.argmin(volumes))]


def _code_bits(rows: npt.NDArray[np.uint8], sizes: npt.NDArray[np.float64], share: float) -> float:
    """Bits that all codes may take: of the share what bases and rankings leave, or three quarters if that is more."""
    pairs = float(sizes.sum())
    whole: float = share * 16 * 2 * rows.shape[3] * pairs
    left = whole - 2 * 8 * rows.nbytes - 3 * pairs
    return max(_MARGIN * left, 0.75 * whole)


def _steps(
    spectra: dict[Side, _Spectrum], sizes: npt.NDArray[np.float64], bits: float
) -> dict[Side, npt.NDArray[np.float32]]:
    """Steps (L, H) of both sides with which the codes of all pairs take `bits`, by halving."""
    entropy = np.array([_entropy(level) for level in range(-2 * RISE, LEVELS[-1] + 2 * RISE + 1)])
    low, high = 1e-3, 1e3
    for _ in range(40):
        middle = sqrt(low * high)
        steps = {
            # Five deviations of the largest component are within reach.
            side: np.maximum(middle * part * spectrum.spread, spectrum.deviation[:, :, 0] * 5 / ONE).astype(np.float32)
            for (side, spectrum), part in zip(spectra.items(), (_KEY_STEP, 1), strict=True)
        }
        needed = 0.0
        for side, spectrum in spectra.items():
            level = spectrum.levels(steps[side])[:, :, None] - np.arange(2 * RISE + 1)[:, None]
            needed += float((entropy[level + 2 * RISE].sum(3) * sizes).sum())
        low, high = (middle, high) if needed > bits else (low, middle)
    return steps


def _entropy(level: int) -> float:
    """Bits of one Gaussian number of that level in whole steps."""
    if level < LEVELS[0]:
        return 0.0
    deviation = 2.0 ** ((min(level, LEVELS[-1]) - UNIT_LEVEL) / 2)
    bounds = [erf((q - 0.5) / deviation / sqrt(2)) for q in range(int(6 * deviation) + 3)]
    middle, others = bounds[1], [(high - low) / 2 for low, high in pairwise(bounds[1:])]
    return -sum(count * p * log2(p) for count, p in [(1, middle), *((2, p) for p in others)] if p > 0)
