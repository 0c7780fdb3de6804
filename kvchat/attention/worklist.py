"""Which program of the decode kernel reads which rows: made on the CPU once a seal, read by every token.

Rows of a head are cut into tiles that share a key scale, or in 4 bits into tiles of whole groups, and tiles are dealt
to programs evenly; a program serves one head and one variant of its queries (`turned`). The number of programs is given
and changes only where it does not suffice, so that a captured CUDA graph stays valid.

Letters: H KV heads, R runs, T tiles, P programs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from kvchat.cache.coded import FIRST, GROUP, HEAD, ROWS, START, UNIT, CodedKV

Table = npt.NDArray[np.int32]
Numbers = npt.NDArray[np.int64]

UNMOVED: Mapping[int, int] = MappingProxyType({})
"""No segment has another variant than 0."""


@dataclass(frozen=True)
class WorkList:
    """Tables of one form.

    programs  (P, 4): first tile, one past the last, head, variant; the tiles both 0 for a program without work
    tiles     (T, 3): first row, rows, first unit of the key scale
    spans     (H, 2): first program of the head, and how many it has
    tile      the most rows of a tile
    """

    tile: int
    programs: Table
    tiles: Table
    spans: Table

    @classmethod
    def build(cls, part: CodedKV, programs: int, tile: int, variants: Mapping[int, int] = UNMOVED) -> WorkList:
        """Tiles of at most `tile` rows, dealt to `programs`, or to more where groups of tiles are more.

        A group has one head and one variant; `variants` gives that of segments by their start, 0 of any other.
        """
        tiles, of = _tiles(part, tile, variants)
        first = np.flatnonzero(np.diff(of, prepend=-1))
        sizes = np.diff(first, append=len(of))
        if len(sizes) > programs:
            programs = 1 << (len(sizes) - 1).bit_length()  # the next seal needs a few more
        shares = _shares(sizes, programs)
        group = np.repeat(np.arange(len(sizes)), shares)
        place = np.arange(len(group)) - (shares.cumsum() - shares)[group]
        bounds = [first[group] + (place + more) * sizes[group] // shares[group] for more in (0, 1)]
        head, variant = of[first[group]] >> 32, of[first[group]] & 0xFFFFFFFF
        table = np.zeros((programs, 4), np.int32)
        table[: len(group)] = np.stack([*bounds, head, variant], axis=1)
        counts = np.bincount(head, minlength=part.num_heads)
        spans = np.stack([counts.cumsum() - counts, counts], axis=1)
        return cls(tile, table, tiles.astype(np.int32), spans.astype(np.int32))

    def bounds(self, key_bits: int) -> Table:
        """`programs` as the kernel wants them: rows, not tiles, where keys have 16 bits and so lie without gaps.

        (P, 3): head and variant become the number of the head's queries among those of all variants.
        """
        first, last, head, variant = self.programs.T
        queries = variant * len(self.spans) + head
        if key_bits < 16 or not len(self.tiles):
            return np.stack([first, last, queries], axis=1)
        start, stop = self.tiles[first, 0], self.tiles[last - 1, :2].sum(axis=1)
        return np.stack([start, np.where(first < last, stop, start), queries], axis=1).astype(np.int32)

    def words(self) -> Numbers:
        """A number for each tile: first row from bit 32 on, unit from bit 8 on, below these the number of rows."""
        tiles = self.tiles.astype(np.int64)
        assert self.tile < 1 << 8 and int(tiles[:, 2].max(initial=0)) < 1 << 24
        words: Numbers = tiles[:, 0] << 32 | tiles[:, 2] << 8 | tiles[:, 1]
        return words


def _tiles(part: CodedKV, tile: int, variants: Mapping[int, int]) -> tuple[Numbers, Numbers]:
    """First row, rows and first unit of every tile, and its head from bit 32 on, below it its variant.

    Those of one head and variant stand together, but for rows that programs read without tiles.
    """
    runs, of = _merged(part, variants)
    counts = -(-runs[:, ROWS] // tile)
    run = np.repeat(np.arange(len(runs)), counts)
    place = np.arange(len(run)) - np.repeat(counts.cumsum() - counts, counts)
    unit = runs[run, UNIT]
    if part.form.key_bits == 4:
        assert tile % GROUP == 0
        unit = unit + place * (tile // GROUP)
    rows = np.minimum(runs[run, ROWS] - place * tile, tile)
    tiles, of = np.stack([runs[run, FIRST] + place * tile, rows, unit], axis=1), of[run]
    if part.form.key_bits < 16 and variants:
        order = np.argsort(of, kind="stable")
        tiles, of = tiles[order], of[order]
    return tiles, of


def _merged(part: CodedKV, variants: Mapping[int, int]) -> tuple[Numbers, Numbers]:
    """Runs, neighbours of one head, variant and unit joined, and head and variant of each as in `_tiles`.

    Groups of 4 bits begin anew with every run.
    """
    runs = part.runs.copy()
    of = runs[:, HEAD] << 32
    if variants:
        starts, index = np.unique(runs[:, START], return_inverse=True)
        of |= np.array([variants.get(start, 0) for start in starts.tolist()], np.int64)[index]
    if part.form.key_bits == 16:
        runs[:, UNIT] = 0
    if part.form.key_bits == 4 or not len(runs):
        return runs, of
    new = np.ones(len(runs), bool)
    new[1:] = (of[1:] != of[:-1]) | (runs[1:, UNIT] != runs[:-1, UNIT])
    merged = runs[new]
    merged[:, ROWS] = np.add.reduceat(runs[:, ROWS], np.flatnonzero(new))
    return merged, of[new]


def _shares(tiles: Numbers, programs: int) -> Numbers:
    """Programs of each group, so that the longest program is as short as can be."""
    assert np.count_nonzero(tiles) <= programs, (tiles, programs)
    low, high = 1, max(1, int(tiles.max(initial=0)))
    while low < high:
        longest = (low + high) // 2
        low, high = (low, longest) if int((-(-tiles // longest)).sum()) <= programs else (longest + 1, high)
    shares: Numbers = -(-tiles // low)
    return shares
