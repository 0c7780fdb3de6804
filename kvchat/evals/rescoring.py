"""Baselines that score the whole history again, at equal bytes.

    Recompress   whenever a segment is compressed, the whole cache is, from what is left of it: what FlowKV (arXiv
                 2505.15347) argues against, with the session's own scorer, KVzip
    SnapRecompress   the same with SnapKV (arXiv 2404.14469), which scores by the attention of the newest tokens, as
                 compressors of a prompt do
    OneShot      KVzip (arXiv 2505.23416) over the whole history at once, from its exact KV, when a question comes

Letters: L layers, H KV heads, G query heads per KV head, T sealed tokens, W window tokens, D head_dim.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from kvchat.compress.compressor import rank
from kvchat.compress.scorers.base import Subject
from kvchat.compress.scorers.kvzip import KVzip, attention_received
from kvchat.config import Config
from kvchat.engine import Engine
from kvchat.evals.baselines import Masked, Rows
from kvchat.events import Notice, Progress
from kvchat.residence.sealing import describe, pass_length, protected_tokens, run_passes
from kvchat.store.store import Message, Store

WINDOW = 32
POOL = 5


class Recompress(Masked):
    """All pairs still held compete again, but for the newest tokens; what was lost stays lost."""

    def choose(self, path: Sequence[Message]) -> Tensor:
        whole = [count == int(block.ranking.sizes.sum()) for block, count in zip(self.blocks, self.quota, strict=True)]
        competing = whole.index(True) if True in whole else len(whole)
        mask = self.mask.clone()
        if competing:
            end = self.blocks[competing - 1].end
            mask[:, :, :end] = self._best(path, mask[:, :, :end], sum(self.quota[:competing]))
        return mask

    def _best(self, path: Sequence[Message], mask: Tensor, count: int) -> Tensor:
        """The `count` best pairs of the first tokens of the history, of those in `mask` (L, H, tokens)."""
        config, bounds, end = self.config.compress, self.bounds(path), mask.shape[2]
        first, last = int(path[0].role == "system"), bounds.index(end)
        subject = describe(self.engine.model.template, self.cache, path, first, last, config)
        most = pass_length(self.engine, self.cache, config)
        scorer = KVzipOverRows(subject, most, self.rows, mask, bounds[first])
        list(run_passes(self.engine, self.cache, scorer, subject.token_ids))
        # Protected pairs win, then scores; what was evicted earlier has none.
        scores = torch.nn.functional.pad(scorer.scores(), (bounds[first], 0), value=1.0).masked_fill(~mask, -1.0)
        flags = protected_tokens(path, config)[:end]
        chosen = rank(scores, flags, [count / scores.numel(), 1.0], 0).chunk_of == 0
        return torch.from_numpy(chosen).to(mask.device)


class OneShot(Recompress):
    """Nothing is evicted before a question comes; then everything is scored at once."""

    def hold(self, path: Sequence[Message]) -> None:
        """Between questions everything is held."""
        self.quota = self.quotas(path)

    @contextmanager
    def asked(self, path: Sequence[Message]) -> Iterator[None]:
        """Inside, questions can be asked of what is left after compressing; outside everything is held."""
        whole = self.mask
        self.show(self.choose(path))
        yield
        self.show(whole)


class SnapRecompress(Recompress):
    """SnapKV: mean attention of the newest queries, smoothed over neighbours; every head keeps as many pairs."""

    def __init__(self, store: Store, engine: Engine, config: Config, pool: Executor) -> None:
        super().__init__(store, engine, config, pool)
        self.newest = NewestQueries(engine.model.num_hidden_layers)

    def prefill(self, *given: Any, **named: Any) -> Generator[Progress | Notice, None, Tensor | None]:
        """As ever, with the queries kept."""
        self.cache.tap = self.newest
        logits = yield from super().prefill(*given, **named)
        self.cache.tap = None
        return logits

    def _best(self, path: Sequence[Message], mask: Tensor, count: int) -> Tensor:
        flags = torch.tensor(protected_tokens(path, self.config.compress)[: mask.shape[2]])
        chosen, each = torch.zeros_like(mask), count // (mask.shape[0] * mask.shape[1])
        for layer, left in enumerate(mask):
            scores = snapkv(
                self.newest.queries[layer], self.rows[layer][0][:, : mask.shape[2]], left, self.newest.scale
            )
            scores[:, flags.to(mask.device)] = torch.inf
            chosen[layer].scatter_(1, scores.masked_fill(~left, -1.0).topk(each, dim=1).indices, True)
        return chosen & mask


class NewestQueries:
    """A tap that keeps the last queries of every layer, (H * G, W, D)."""

    def __init__(self, num_layers: int) -> None:
        self.queries: list[Tensor] = [torch.empty(0)] * num_layers
        self.scale = 1.0

    def observe(self, layer: int, query: Tensor, keys: Tensor, values: Tensor, scale: float) -> None:
        """Keep this pass's last ones, and of earlier passes as many as are wanted still."""
        before = self.queries[layer]
        self.queries[layer] = (
            torch.cat([before, query], dim=1)[:, -WINDOW:] if len(before) else query[:, -WINDOW:].clone()
        )
        self.scale = scale


def snapkv(query: Tensor, keys: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Scores (H, T) float32 of keys (H, T, D) under queries (H * G, W, D); pairs outside `mask` (H, T) get none."""
    grouped = query.reshape(len(keys), -1, query.shape[-1]).float()
    logits = (grouped @ keys.float().mT * scale).masked_fill(~mask[:, None], -torch.inf)
    return torch.nn.functional.avg_pool1d(logits.softmax(-1).mean(1), POOL, 1, POOL // 2)


class KVzipOverRows(KVzip):
    """KVzip's scores for KV that is sealed already, and of which a part may be gone.

    Args:
        rows: all sealed KV, dense.
        mask: (L, H, tokens), the pairs that are left.
        start: position of the subject's first token.
    """

    def __init__(self, subject: Subject, chunk_size: int, rows: Rows, mask: Tensor, start: int) -> None:
        super().__init__(subject, chunk_size)
        self._rows, self._mask, self._start = rows, mask, start

    def observe(self, layer: int, query: Tensor, keys: Tensor, values: Tensor, scale: float) -> None:
        """Head by head, for each has its own keys left."""
        low, high = self._chunk.start + self._start, self._chunk.stop + self._start
        past, own = self._rows[layer][0][:, low:high], keys[:, keys.shape[1] - query.shape[1] :]
        scores = torch.zeros(past.shape[:2], device=past.device)
        for head, (left, group) in enumerate(zip(self._mask[layer, :, low:high], query.chunk(len(past)), strict=True)):
            prefix, alone = self.subject.prefix_keys[layer][head, None], own[head, None]
            scores[head, left] = attention_received(
                group, prefix, past[head, None][:, left], alone, self._skipped, scale
            )[0]
        self._scores[layer].append(scores)
