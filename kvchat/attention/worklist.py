"""Which program of the decode kernel reads which rows: made on the CPU once a seal, read by every token.

Rows of a head are cut into tiles that share a key scale, or in 4 bits into tiles of whole groups, and tiles are dealt
to programs evenly; a program serves one head. The number of programs is given and never changes, so that a captured
CUDA graph stays valid.

Letters: H KV heads, R runs, T tiles, P programs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvchat.cache.coded import FIRST, GROUP, HEAD, ROWS, UNIT, CodedKV

Table = npt.NDArray[np.int32]


@dataclass(frozen=True)
class WorkList:
    """Tables of one form.

    programs  (P, 3): first tile, one past the last, head; the tiles both 0 for a program without work
    tiles     (T, 3): first row, rows, first unit of the key scale
    spans     (H, 2): first program of the head, and how many it has
    tile      the most rows of a tile
    """

    tile: int
    programs: Table
    tiles: Table
    spans: Table

    @classmethod
    def build(cls, part: CodedKV, programs: int, tile: int) -> WorkList:
        """Tiles of at most `tile` rows, dealt to `programs`, of which every head that has rows needs one."""
        tiles, per_head = _tiles(part, tile)
        shares = _shares(per_head, programs)
        first_tile, spans = per_head.cumsum() - per_head, np.stack([shares.cumsum() - shares, shares], axis=1)
        head = np.repeat(np.arange(part.num_heads), shares)
        place = np.arange(len(head)) - spans[head, 0]
        bounds = [first_tile[head] + (place + more) * per_head[head] // shares[head] for more in (0, 1)]
        table = np.zeros((programs, 3), np.int32)
        table[: len(head)] = np.stack([*bounds, head], axis=1)
        return cls(tile, table, tiles.astype(np.int32), spans.astype(np.int32))

    def bounds(self, key_bits: int) -> Table:
        """`programs` as the kernel wants them: rows, not tiles, where keys have 16 bits and so lie without gaps."""
        if key_bits < 16 or not len(self.tiles):
            return self.programs
        first, last, head = self.programs.T
        start, stop = self.tiles[first, 0], self.tiles[last - 1, :2].sum(axis=1)
        return np.stack([start, np.where(first < last, stop, start), head], axis=1).astype(np.int32)

    def words(self) -> npt.NDArray[np.int64]:
        """A number for each tile: first row from bit 32 on, unit from bit 8 on, below these the number of rows."""
        tiles = self.tiles.astype(np.int64)
        assert self.tile < 1 << 8 and int(tiles[:, 2].max(initial=0)) < 1 << 24
        words: npt.NDArray[np.int64] = tiles[:, 0] << 32 | tiles[:, 2] << 8 | tiles[:, 1]
        return words


def _tiles(part: CodedKV, tile: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """First row, rows and first unit of every tile, and how many each head has."""
    runs = _merged(part)
    counts = -(-runs[:, ROWS] // tile)
    run = np.repeat(np.arange(len(runs)), counts)
    place = np.arange(len(run)) - np.repeat(counts.cumsum() - counts, counts)
    unit = runs[run, UNIT]
    if part.form.key_bits == 4:
        assert tile % GROUP == 0
        unit = unit + place * (tile // GROUP)
    rows = np.minimum(runs[run, ROWS] - place * tile, tile)
    per_head = np.bincount(runs[run, HEAD], minlength=part.num_heads)
    return np.stack([runs[run, FIRST] + place * tile, rows, unit], axis=1), per_head


def _merged(part: CodedKV) -> npt.NDArray[np.int64]:
    """Runs, neighbours of one head and unit joined; groups of 4 bits begin anew with every run."""
    runs = part.runs.copy()
    if part.form.key_bits == 16:
        runs[:, UNIT] = 0
    if part.form.key_bits == 4 or not len(runs):
        return runs
    new = np.ones(len(runs), bool)
    new[1:] = (runs[1:, [HEAD, UNIT]] != runs[:-1, [HEAD, UNIT]]).any(axis=1)
    merged = runs[new]
    merged[:, ROWS] = np.add.reduceat(runs[:, ROWS], np.flatnonzero(new))
    return merged


def _shares(tiles: npt.NDArray[np.int64], programs: int) -> npt.NDArray[np.int64]:
    """Programs of each head, so that the longest program is as short as can be."""
    assert np.count_nonzero(tiles) <= programs, (tiles, programs)
    low, high = 1, max(1, int(tiles.max(initial=0)))
    while low < high:
        longest = (low + high) // 2
        low, high = (low, longest) if int((-(-tiles // longest)).sum()) <= programs else (longest + 1, high)
    shares: npt.NDArray[np.int64] = -(-tiles // low)
    return shares
