"""What kvchat is compared with, under the same harness and at equal bytes.

Every baseline is a `Residence`: the session feeds it the same tokens at the same moments, and it keeps as many pairs
as the session's own method would. It holds all sealed KV densely and shows the network the pairs of a mask: slow and
plain, which is what a baseline should be. Nothing is saved. Those that score are in `rescoring.py`.

    Full         no compression
    Window       the protected prefix and the newest rows (StreamingLLM, arXiv 2309.17453)

Letters: L layers, H KV heads, T sealed tokens, D head_dim.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass

import torch
from torch import Tensor

from kvchat.cache.layer import Piece
from kvchat.cache.segment import LayerKV, Ranking
from kvchat.codecs import SegmentHeader, decode_frame, encode_segment, packed_bytes, param_bytes
from kvchat.compress.compressor import rank
from kvchat.config import Config
from kvchat.engine import Engine
from kvchat.errors import CodecError
from kvchat.residence.residence import Residence, Steps
from kvchat.residence.sealing import cuts_of, prefix_length, protected_tokens
from kvchat.store.store import Message, Store

Rows = list[tuple[Tensor, Tensor]]
"""Keys and values (H, T, D) a layer."""


def held_bytes(residence: Residence) -> int:
    """Bytes of the KV that stands for the history: sealed rows as encoded before zstd, the tail as it is.

    Positions and rankings are not counted, which attention does not read.
    """
    if isinstance(residence, Unsaved):
        sealed = residence.sealed_bytes
    else:
        residents = residence.tiers.residents
        sealed = sum(encoded_bytes(one.header, range(one.chunks)) for one in residents)
    return sealed + residence.cache.tail_length * residence.engine.model.bf16_bytes_per_token


def encoded_bytes(header: SegmentHeader, chunks: Iterable[int]) -> int:
    """Bytes of some rank chunks, with what serves the whole segment; plain numbers count as bfloat16."""
    exact = torch.bfloat16.itemsize / header.dtype.itemsize
    sizes = (packed_bytes(header, chunk) * (exact if header.codec(chunk) == "raw" else 1) for chunk in chunks)
    return param_bytes(header) + round(sum(sizes))


class Unsaved(Residence):
    """A residence that writes nothing."""

    @property
    def sealed_bytes(self) -> int:
        """Encoded bytes of sealed rows."""
        return 0

    def _save_waiting(self, path: Sequence[Message]) -> Steps:
        """Nothing is saved."""
        yield from ()


class Full(Unsaved):
    """Every pair, exactly, in the tail."""

    def __init__(self, store: Store, engine: Engine, config: Config, pool: Executor) -> None:
        # No tail is long enough to be sealed, and none is too long.
        whole = {"compress.segment_min": sys.maxsize, "compress.kv_budget": ""}
        super().__init__(store, engine, config.replaced(whole), pool)


@dataclass(frozen=True, slots=True)
class Block:
    """The tokens of one segment: where it begins and ends, and what the session would hold of it."""

    start: int
    end: int
    ranking: Ranking
    params: int
    """Encoded bytes that serve all pairs."""
    nbytes: int
    """Encoded bytes of all pairs."""


class Masked(Unsaved):
    """Sealed KV, dense, and a mask (L, H, T) of the pairs that the network sees."""

    def __init__(self, store: Store, engine: Engine, config: Config, pool: Executor) -> None:
        super().__init__(store, engine, config, pool)
        model = engine.model
        shape = (model.num_hidden_layers, model.num_key_value_heads, 0)
        self.rows = [layer.tail() for layer in self.cache.layers]
        self.mask = torch.ones(shape, dtype=torch.bool, device=model.device)
        self.blocks: list[Block] = []
        self.quota: list[int] = []
        """Pairs that the session would hold of each block."""

    def spare(self) -> bool:
        """What was taken in half-way cannot be tried again."""
        self.let_go()
        return False

    @property
    def sealed_bytes(self) -> int:
        """Encoded bytes of the pairs in the mask."""
        pairs, nbytes = self.mask.numel(), sum(block.nbytes for block in self.blocks)
        share = int(self.mask.sum()) / pairs if pairs else 0
        return sum(block.params for block in self.blocks) + round(nbytes * share)

    def _seal(self, path: Sequence[Message], last: int) -> Steps:
        """Take the tail up to message `last` in, whole, as the codec gives it back."""
        yield from ()
        bounds, start = self.bounds(path), self.cache.tail_start
        tokens, protected = bounds[last] - start, protected_tokens(path, self.config.compress)
        tail = [layer.tail() for layer in self.cache.layers]
        rows, header = self._stored([(keys[:, :tokens], values[:, :tokens]) for keys, values in tail], start)
        shape = (len(rows), len(rows[0][0]), tokens)
        ranking = any_ranking(self, protected, start, bounds[last])
        params = param_bytes(header)
        nbytes = encoded_bytes(header, [0]) - params
        self.blocks.append(Block(start, bounds[last], ranking, params, nbytes))
        self.rows = [
            (torch.cat([keys, more[0]], dim=1), torch.cat([values, more[1]], dim=1))
            for (keys, values), more in zip(self.rows, rows, strict=True)
        ]
        self.cache.drop_tail(tokens)
        self.show(torch.cat([self.mask, torch.ones(shape, dtype=torch.bool, device=self.mask.device)], dim=2))
        self.hold(path[:last])

    def _stored(self, rows: Rows, start: int) -> tuple[Rows, SegmentHeader]:
        """KV after a round trip through the codec, and its header."""
        tokens, name = rows[0][0].shape[1], self.config.codec.name
        keys, values = ([side[index] for side in rows] for index in (0, 1))
        single = Ranking.single(start, len(keys), len(keys[0]), tokens)
        try:
            header, frames = encode_segment(name, keys, values, single)
        except CodecError:  # as the session does
            header, frames = encode_segment("raw", keys, values, single)
        device = self.engine.model.device
        decoded = [kv for _, group, blob in frames for kv in decode_frame(header, 0, group, blob, device)]
        shape = keys[0].shape
        return [(kv.keys.view(shape), kv.values.view(shape)) for kv in decoded], header

    def show(self, mask: Tensor) -> None:
        """Let the network see the pairs of `mask`."""
        self.mask = mask
        self.cache.keep([])
        counts = mask.sum(2).cpu()
        bounds = torch.nn.functional.pad(counts.cumsum(1), (1, 0)).int()
        chosen = mask.flatten(1).nonzero()[:, 1].split_with_sizes(counts.sum(1).tolist())
        layers = [
            LayerKV(keys.flatten(0, 1)[rows], values.flatten(0, 1)[rows], (rows % mask.shape[2]).int(), cu_seqlens)
            for (keys, values), rows, cu_seqlens in zip(self.rows, chosen, bounds, strict=True)
        ]
        self.cache.attach({Piece(0, 0): layers}, mask.shape[2])

    def hold(self, path: Sequence[Message]) -> None:
        """Choose anew when the budget has changed."""
        quota = self.quotas(path)
        if quota != self.quota:
            self.quota = quota
            self.show(self.choose(path))

    def quotas(self, path: Sequence[Message]) -> list[int]:
        """What the session would hold of each block; of all the same part less, if the cap has no room for that."""
        chunks = self.budgets([(block.ranking, block.end) for block in self.blocks], path)
        pairs = [int(block.ranking.sizes[:count].sum()) for block, count in zip(self.blocks, chunks, strict=True)]
        if not self.config.compress.kv_budget:
            return pairs
        room = max(0, rows_a_head(self, path) - self.cache.tail_length) * self.engine.model.pairs_per_token
        return [count * room // total for count in pairs] if (total := sum(pairs)) > room else pairs

    def choose(self, path: Sequence[Message]) -> Tensor:
        """The new mask, of as many pairs as `quota`."""
        raise NotImplementedError


def any_ranking(residence: Residence, protected: Sequence[bool], start: int, end: int) -> Ranking:
    """A ranking of these tokens: counts do not depend on scores, so the budget is that of any."""
    model, config = residence.engine.model, residence.config.compress
    shape = (model.num_hidden_layers, model.num_key_value_heads, end - start)
    return rank(torch.zeros(shape), protected[start:end], cuts_of(config), start)


def rows_a_head(residence: Residence, path: Sequence[Message]) -> int:
    """Rows that stand for a path, of a head on average: the cap, else what the session would hold at its end."""
    config, model = residence.config.compress, residence.engine.model
    if config.kv_budget:
        return config.budget_rows or config.budget_bytes // model.bf16_bytes_per_token
    bounds, start, segments = residence.bounds(path), 0, list[tuple[Ranking, int]]()
    protected = protected_tokens(path, config)
    for end in bounds[1:]:
        if end - start >= config.segment_min:
            segments.append((any_ranking(residence, protected, start, end), end))
            start = end
    chunks = residence.budgets(segments, path)
    sealed = sum(int(ranking.sizes[:count].sum()) for (ranking, _), count in zip(segments, chunks, strict=True))
    return sealed // model.pairs_per_token + bounds[-1] - start


class Window(Masked):
    """The protected prefix, and the newest rows of every head."""

    def choose(self, path: Sequence[Message]) -> Tensor:
        layers, heads, tokens = self.mask.shape
        prefix = prefix_length(path, self.config.compress.num_sink_tokens)
        each = sum(self.quota) // (layers * heads)
        mask = torch.zeros_like(self.mask)
        mask[:, :, :prefix] = True
        mask[:, :, max(prefix, tokens - (each - prefix)) :] = True
        return mask
