"""Codec `archive`: transform coding for conversations that are put away (after KVTC, arXiv 2511.01815).

What tells pairs apart lies in few directions. For each layer, head and side, a *basis* holds the principal components
of the conversation's own KV (keys with RoPE undone), its mean, and one step for all components; it is stored once for
all segments (`kvchat.codecs.fit` makes it). A row is its components in whole steps:

    q = round(component / step)       x is read as (q @ basis) * (step / 127) + mean, and then RoPE is applied again

KVTC gives component i b_i bits so that the sum of variance_i / 4^b_i is least. Steps of one size do that without a
number of bits: a component takes as many as zstd's entropy coding needs for log2(deviation / step), and one far below a
step is dropped. What is more, KVTC knows no ranking. Here rank chunk by rank chunk steps grow, by 2^5 over the whole
ranking: at 1.75 bits an element that takes the KL of the built-in model from .047 to .003 (1600 tokens).

Basis and q are integers of at most 7 bits and a sign. So every sum of q @ basis is exact in float32, in any order; all
else is done number by number, each operation rounded by itself: decoding gives the same bits whatever the threads.

Rows that this suits badly are stored exactly, and so are those of attention sinks (KL .006 in place of .072 on 1600
tokens). Planes, for side key or value:

    {side}_shift  (1,) uint8           steps are 2^(shift / 2) times those of the basis
    {side}_{v}    all q of level v (below), component by component, each of all rows that have it so, several a byte
    {side}_exact  (E,) uint32          rows that are stored exactly; {side}_words (E, D) their bits

The level of a component is 8 + 2 log2(deviation / step), rounded; it says how far q goes, and how many q a byte takes.

Letters: L layers, H KV heads, U = L * H units, T tokens, N rows of a frame, E exact rows, D head_dim.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvchat.cache.segment import Ranking
from kvchat.codecs.bits import digit_table, pack_digits
from kvchat.codecs.codec import Codec, Exact, FrameRows, Take, Takes, Tensors
from kvchat.codecs.frame import Planes, expect, unpack
from kvchat.codecs.quant import largest_fitting
from kvchat.errors import CorruptFrame

Side = Literal["key", "value"]

UNIT_LEVEL = 8
"""Level of a component whose deviation is one step."""
LEVELS = range(4, 32)
"""Levels below are dropped, levels above count as the last."""
ONE = 127
"""A basis holds its components in so many parts of one."""
RISE = 5
"""Octaves by which steps grow from the first pair of a ranking to its last."""

NUM_SINKS = 4
"""The conversation's first tokens, which are like no others and to which all attend: their rows are exact."""

# One row of so many may be exact, or the frame's sinks if these are more.
_MOST_EXACT = 4
_BADLY = 16.0
_MOST_BYTES = 256 * 1024 * 1024
_WORDS = {2: torch.int16, 4: torch.int32}


def reach(level: int) -> tuple[int, int]:
    """The greatest |q| of a level, about five deviations, and how many q make a byte, (2 reach + 1) ** n <= 256."""
    if level < 5:
        return 1, 5
    if level < 7:
        return 2, 3
    return (7, 2) if level < 10 else (ONE, 1)


def shifts(ranking: Ranking) -> npt.NDArray[np.int64]:
    """For each rank chunk, half octaves by which its steps are larger than the basis's, (C,)."""
    sizes = ranking.sizes
    middle = (np.cumsum(sizes) - sizes / 2) / max(1, sizes.sum())
    shift: npt.NDArray[np.int64] = np.rint(2 * RISE * middle).astype(np.int64)
    return shift


@dataclass(frozen=True, slots=True, eq=False)
class Basis:
    """What the archived segments of a conversation share; `identity` tells one basis from another.

    Planes, for side key or value: {side}_rows (L, H, D, D) uint8, a component a row, 128 is zero; {side}_mean (L, H, D)
    and {side}_step (L, H) float32; {side}_level (L, H, D) uint8. turn (D // 2,) float32: RoPE's frequencies, or zeros.
    """

    planes: Planes
    identity: str

    @classmethod
    def from_bytes(cls, blob: bytes, layers: int, heads: int, head_dim: int) -> Basis:
        """The basis in a frame. Raises CorruptFrame if it is missing, damaged or of another geometry."""
        units = layers * heads
        limit = 2 * units * (head_dim * (head_dim + 5) + 4) + 4 * head_dim
        head, planes = unpack(blob, limit=min(limit, _MOST_BYTES))
        if head != {"kind": "basis"}:
            raise CorruptFrame(f"not a basis: {str(head)[:120]}")
        expected: dict[str, tuple[tuple[int, ...], str]] = {"turn": ((head_dim // 2,), "<f4")}
        for side in ("key", "value"):
            expected[f"{side}_rows"] = (layers, heads, head_dim, head_dim), "|u1"
            expected[f"{side}_mean"] = (layers, heads, head_dim), "<f4"
            expected[f"{side}_step"] = (layers, heads), "<f4"
            expected[f"{side}_level"] = (layers, heads, head_dim), "|u1"
        checked = {name: expect(planes, name, shape, dtype) for name, (shape, dtype) in expected.items()}
        if min(float(checked[f"{side}_step"].min()) for side in ("key", "value")) <= 0:
            raise CorruptFrame("the basis has steps that are not above zero")
        return cls(checked, blake2b(blob, digest_size=16).hexdigest())

    def of_layers(self, first: int, last: int) -> Planes:
        """The planes of layers [first, last)."""
        return {name: plane if name == "turn" else plane[first:last] for name, plane in self.planes.items()}

    def codec(self, ranking: Ranking) -> Codec:
        """The codec that writes and reads segments of that ranking."""
        return Codec(Archive("key", self, ranking), Archive("value", self, ranking))


@dataclass(frozen=True, slots=True, eq=False)
class Archive:
    """One side of a segment, by the conversation's basis."""

    side: Side
    basis: Basis
    ranking: Ranking

    @property
    def bars(self) -> Mapping[str, float]:
        """The usual one: zstd is the entropy coding."""
        return {}

    def layer_bytes(self, rows: FrameRows, scale_bytes: int) -> npt.NDArray[np.int64]:
        """The most that a layer can take: a byte a component, the rows that may be exact, and the shift."""
        sinks = np.minimum(rows.counts, max(0, NUM_SINKS - self.ranking.position)).sum(axis=1)
        exact = np.maximum(-(-rows.per_layer // _MOST_EXACT), sinks) * (4 + rows.head_dim * rows.dtype.itemsize)
        layer_bytes: npt.NDArray[np.int64] = rows.per_layer * rows.head_dim + exact + 1
        return layer_bytes

    def param_shapes(self, layers: int, heads: int, head_dim: int) -> dict[str, tuple[int, ...]]:
        """None: they are the basis."""
        return {}

    def read(self, exact: Exact) -> tuple[Tensors, Takes]:
        """Nothing yet: rows are coded when they are taken, on the CPU."""
        largest_fitting(f"{self.side}s", exact)
        heads, tokens = exact.layers[0].shape[:2]
        units = _Units(self.side, self.basis.planes)
        # The rows of a basis are not quite orthogonal, once they are integers: this undoes them exactly.
        project = torch.linalg.pinv(units.rows.double() / ONE).float()
        chunk_of, shift = self.ranking.chunk_of.reshape(-1), shifts(self.ranking)

        def takes(first: int, last: int) -> Take:
            group = exact.of_layers(first, last)

            def take(rows: FrameRows, index: Tensor) -> Tensors:
                flat = index.cpu().numpy() + first * heads * tokens
                positions, unit = self.ranking.position + flat % tokens, flat // tokens
                frame = _Frame(units, unit, int(shift[chunk_of[flat[0]]]) if len(flat) else 0)
                taken = group.pick(rows, index).cpu()
                planes = frame.code(units.turn(taken.float(), positions, -1), project, taken, positions < NUM_SINKS)
                return {name: torch.from_numpy(plane) for name, plane in planes.items()}

            return take

        return {}, takes

    def decode(self, planes: Planes, params: Planes, rows: FrameRows, device: torch.device) -> Tensor:
        """The rows (N, D), computed in float32 on the CPU."""
        assert rows.positions is not None
        units = _Units(self.side, params)
        shift = int(expect(planes, f"{self.side}_shift", (1,), "|u1")[0])
        if shift > 2 * RISE:
            raise CorruptFrame(f"the frame's steps are 2^({shift} / 2) times those of the basis, at most 2^{RISE}")
        counts = rows.counts.reshape(-1)
        frame = _Frame(units, np.repeat(np.arange(len(counts)), counts), shift)
        decoded = units.turn(frame.back(frame.unpack(planes)), rows.positions - self.ranking.offset, 1).to(rows.dtype)
        _restore_exact(decoded, planes, self.side)
        return decoded.to(device)


class _Units:
    """A basis's planes of one side, by unit."""

    def __init__(self, side: Side, planes: Planes) -> None:
        def flat(name: str, keep: int) -> npt.NDArray[Any]:
            plane = planes[f"{side}_{name}"]
            return plane.reshape(-1, *plane.shape[plane.ndim - keep :])

        self.side = side
        self.rows = torch.from_numpy(flat("rows", 2).astype(np.float32)) - (ONE + 1)
        self.mean, self.step = (torch.from_numpy(flat(*plane).copy()) for plane in (("mean", 1), ("step", 0)))
        self.level = flat("level", 1).astype(np.int64)
        self.frequency = planes["turn"].astype(np.float64) if side == "key" else np.zeros(0)

    def turn(self, rows: Tensor, positions: npt.NDArray[Any], sign: int) -> Tensor:
        """Rows (N, D) float32 with RoPE applied, or undone where `sign` is -1. Channel d pairs with d + D // 2."""
        if not self.frequency.any() or not len(rows):
            return rows
        first = int(positions.min())
        angle = np.arange(first, int(positions.max()) + 1)[:, None] * self.frequency
        index, half = torch.from_numpy(positions - first).long(), len(self.frequency)
        # numpy's float64 functions run in one thread, so their bits do not depend on the number of threads.
        cos = torch.from_numpy(np.cos(angle)).float().index_select(0, index)
        sin = torch.from_numpy(sign * np.sin(angle)).float().index_select(0, index)
        one, other = rows[:, :half], rows[:, half : 2 * half]
        return torch.cat([one * cos - other * sin, other * cos + one * sin, rows[:, 2 * half :]], 1)


class _Frame:
    """Where the numbers of a frame's rows belong: `unit` (N,) rising, and steps larger by `shift` half octaves."""

    def __init__(self, units: _Units, unit: npt.NDArray[np.int64], shift: int) -> None:
        self.units, self.shift = units, shift
        self.runs = list(_runs(np.bincount(unit, minlength=len(units.level))))
        level = np.clip(units.level - shift, LEVELS[0] - 1, LEVELS[-1]).astype(np.uint8)
        self.level = np.ascontiguousarray(level[unit].T)
        """The level of each number, (D, N)."""
        by_row = torch.from_numpy(unit)
        self.mean = units.mean.index_select(0, by_row)
        self.step = units.step.index_select(0, by_row).mul_(2.0 ** (shift / 2)).unsqueeze(1)

    def back(self, q: Tensor) -> Tensor:
        """Rows (N, D) of q (N, D), both float32. Products are exact; the other operations round, each by itself."""
        return self._by_unit(q, self.units.rows).mul_(self.step / ONE).add_(self.mean)

    def code(self, rows: Tensor, project: Tensor, exact: Tensor, sinks: npt.NDArray[np.bool_]) -> Planes:
        """Planes of rows (N, D) float32 with RoPE undone; sinks and what comes out badly are stored exactly."""
        most = torch.from_numpy(_REACHES[self.level].T.copy())
        q = self._by_unit(rows - self.mean, project).div_(self.step).round_()
        q = torch.minimum(torch.maximum(q, -most), most)
        error = (self.back(q) - rows).square_().sum(1) / self.step.squeeze(1).square()
        badness = error / torch.from_numpy(_EXPECTED[self.level].sum(0))
        badness[torch.from_numpy(sinks)] = torch.inf
        most_exact = max(-(-len(badness) // _MOST_EXACT), int(sinks.sum()))
        worst = badness.argsort(descending=True, stable=True)[:most_exact]
        index = worst[badness[worst] > _BADLY].sort().values
        codes, words = q.T.contiguous().to(torch.int8).numpy(), exact[index].view(_WORDS[exact.dtype.itemsize])
        planes: Planes = {
            str(level): pack_digits(codes[self.level == level], *reach(level)) for level in self._levels()
        }
        planes |= {"shift": np.array([self.shift], np.uint8), "exact": index.numpy().astype("<u4")}
        planes["words"] = words.numpy().view(f"<u{words.itemsize}")
        return {f"{self.units.side}_{name}": plane for name, plane in planes.items()}

    def unpack(self, planes: Planes) -> Tensor:
        """q (N, D) float32. Raises CorruptFrame."""
        q = np.zeros(self.level.shape, np.int8)
        for level in self._levels():
            here = self.level == level
            count, (most, per_byte) = int(np.count_nonzero(here)), reach(level)
            packed = expect(planes, f"{self.units.side}_{level}", (-(-count // per_byte),), "|u1")
            q[here] = digit_table(most, per_byte)[packed].reshape(-1)[:count]
        return torch.from_numpy(q).T.float()

    def _levels(self) -> list[int]:
        """The levels that the frame has numbers of."""
        found = np.unique(self.units.level[[unit for unit, _ in self.runs]] - self.shift)
        return sorted({min(level, LEVELS[-1]) for level in found.tolist() if level >= LEVELS[0]})

    def _by_unit(self, rows: Tensor, matrices: Tensor) -> Tensor:
        """Each row (N, D) times the matrix of its unit, (U, D, D)."""
        product = torch.empty(rows.shape)
        for unit, part in self.runs:
            product[part] = rows[part] @ matrices[unit]
        return product


def _restore_exact(decoded: Tensor, planes: Planes, side: Side) -> None:
    """Put the rows that are stored exactly in their places. Raises CorruptFrame."""
    count = planes[f"{side}_exact"].size if f"{side}_exact" in planes else 0
    index = expect(planes, f"{side}_exact", (count,), "<u4")
    size = decoded.dtype.itemsize
    words = expect(planes, f"{side}_words", (count, decoded.shape[1]), f"<u{size}")
    if count and int(index.max()) >= len(decoded):
        raise CorruptFrame(f"the frame stores row {int(index.max())} exactly, of {len(decoded)}")
    exact = torch.from_numpy(words.view(f"<i{size}").copy())
    decoded.view(_WORDS[size])[torch.from_numpy(index.astype(np.int64))] = exact


def _runs(counts: npt.NDArray[np.int64]) -> Iterator[tuple[int, slice]]:
    """Each unit that has rows, and which they are."""
    end = 0
    for unit, count in enumerate(counts.tolist()):
        if count:
            yield unit, slice(end, end + count)
        end += count


# By level: how far q goes, and the square of what is lost, in steps.
_REACHES = np.array([reach(one)[0] if one in LEVELS else 0 for one in range(LEVELS.stop)], np.float32)
_LOST = [1 / 12 if one in LEVELS else 2.0 ** (one - UNIT_LEVEL) for one in range(LEVELS.stop)]
_EXPECTED = np.array(_LOST, np.float32)
