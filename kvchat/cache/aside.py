"""Rows of the open tail that are out of memory while an answer is generated, and come back to the last bit.

Letters: H KV heads, T rows of the tail, R rows that stay, E rows put aside, D head_dim.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kvchat.cache.ragged import SegmentedCache

KEY = 32
"""Bytes of the key, which is nowhere but in memory."""


class Record(NamedTuple):
    """Rows of one layer that were put aside together."""

    offset: int
    rows: int
    """Of each head."""


class Aside:
    """Rows put aside of one cache's open tail, in a file without a name, which goes with its process.

    KV tells what was said, and a store may be encrypted: so bytes in the file are masked with SHAKE256 of a key that is
    made for this file alone. Raises OSError if there can be no such file.
    """

    def __init__(self, cache: SegmentedCache) -> None:
        self._layers = cache.layers
        self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115, closed by `close`
        self._key, self._end = os.urandom(KEY), 0
        self._records: list[list[Record]] = [[] for _ in self._layers]
        self._tokens = [
            torch.empty(len(layer.keys), 0, dtype=torch.int64, device=layer.device) for layer in self._layers
        ]
        """Of each layer which tokens of the tail its first rows are, (H, R); after those none is missing."""

    def close(self) -> None:
        """Let the file go."""
        self._file.close()

    def tokens(self, index: int) -> Tensor:
        """Which token of the tail each row of a layer is, (H, T) int64."""
        layer, known = self._layers[index], self._tokens[index]
        later = torch.arange(known.shape[1] + layer.aside, layer.tail_length + layer.aside, device=layer.device)
        return torch.cat([known, later.expand(len(known), -1)], 1)

    @torch.inference_mode()
    def put(self, index: int, kept: Tensor) -> None:
        """Leave a layer only the rows `kept` of its tail, (H, R) in ascending order, and put the others aside.

        Should it fail, nothing has changed. Raises OSError: the file cannot be written.
        """
        layer, tokens = self._layers[index], self.tokens(index)
        others = torch.ones_like(tokens, dtype=torch.bool).scatter_(1, kept, False).nonzero()[:, 1].view(len(kept), -1)
        record = self._write(tokens.gather(1, others), *layer.rows(others))
        stay, known = layer.rows(kept), tokens.gather(1, kept)
        layer.hold(*stay)
        layer.aside += record.rows
        self._records[index].append(record)
        self._tokens[index] = known

    @torch.inference_mode()
    def bring_back(self, index: int) -> None:
        """Give a layer all rows of its tail again, in order. Should it fail, nothing has changed. Raises OSError."""
        layer = self._layers[index]
        parts = [(self.tokens(index), *layer.tail()), *(self._read(index, record) for record in self._records[index])]
        tokens, keys, values = (torch.cat(part, 1) for part in zip(*parts, strict=True))
        order = tokens.argsort(1)
        layer.hold(ordered(keys, order), ordered(values, order))
        layer.aside = 0
        self._records[index], self._tokens[index] = [], tokens[:, :0]

    def _write(self, tokens: Tensor, keys: Tensor, values: Tensor) -> Record:
        """Put (H, E) and twice (H, E, D) at the end of the file."""
        parts = (tokens.int(), keys, values)
        body = b"".join(part.contiguous().view(torch.uint8).cpu().numpy().tobytes() for part in parts)
        record, rest = Record(self._end, tokens.shape[1]), memoryview(self._masked(body, self._end))
        self._file.seek(self._end)
        while rest:
            rest = rest[self._file.write(rest) :]
        self._end += len(body)
        return record

    def _read(self, index: int, record: Record) -> tuple[Tensor, Tensor, Tensor]:
        """What `_write` was given."""
        layer = self._layers[index]
        heads, _, dim = layer.keys.shape
        pairs = heads * record.rows
        sizes = [pairs * 4, *[pairs * dim * layer.dtype.itemsize] * 2]
        self._file.seek(record.offset)
        body = self._file.read(sum(sizes))
        if len(body) < sum(sizes):
            raise OSError("the file of what was put aside is too short")
        plain = torch.frombuffer(bytearray(self._masked(body, record.offset)), dtype=torch.uint8).to(layer.device)
        tokens, keys, values = (plain[end - size : end] for size, end in zip(sizes, accumulate(sizes), strict=True))
        shape = heads, record.rows, dim
        return (
            tokens.view(torch.int32).view(shape[:2]).long(),
            keys.view(layer.dtype).view(shape),
            values.view(layer.dtype).view(shape),
        )

    def _masked(self, body: bytes, offset: int) -> bytes:
        """Masked if plain, plain if masked; no two places have the same mask."""
        mask = hashlib.shake_256(self._key + offset.to_bytes(8, "little")).digest(len(body))
        return (np.frombuffer(body, np.uint8) ^ np.frombuffer(mask, np.uint8)).tobytes()


def ordered(rows: Tensor, order: Tensor) -> Tensor:
    """Of rows (H, T, D) those numbered by (H, R), a copy."""
    return rows.gather(1, order[..., None].expand(-1, -1, rows.shape[-1]))
