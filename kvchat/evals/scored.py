"""One prefill of which anything can be kept: exact KV, and of each segment the scores that each scorer gave it.

A conversation is fed once with nothing evicted, and segments are scored when they are complete, as a session does while
it has their exact KV. Which pairs are shown to the network is then only a matter of selecting, by the same functions in
the same order as `sealing.rank_turns` and `Holding.budgets` do: a mask takes hundredths of a second, a prefill minutes.

Letters: L layers, H KV heads, T tokens of a block, S sealed tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvchat.cache.segment import Ranking
from kvchat.codecs import SegmentHeader
from kvchat.compress.aggregate import AGGREGATORS
from kvchat.compress.allocate import chunks_held
from kvchat.config import Config
from kvchat.engine import Engine
from kvchat.errors import InputError
from kvchat.evals.baselines import Masked, Rows
from kvchat.evals.cases import Case, Question
from kvchat.evals.feeding import about, feed, holding, new_conversation
from kvchat.evals.measures import Truth, fidelity, truth
from kvchat.events import Notice
from kvchat.residence.residence import Steps
from kvchat.residence.sealing import Ranker, describe, protected_tokens, ranked, score, way
from kvchat.sections import CompressConfig
from kvchat.session import Conversation
from kvchat.store.records import num_answered
from kvchat.store.store import Message, Store

Way = Callable[[Tensor], Tensor]
"""How pairs of different layers and heads compare: see `kvchat.compress.order`."""


def named(scorer: str) -> tuple[str, str]:
    """The values of `compress.scorer` and `compress.aggregate` that NAME or NAME.AGGREGATE stands for."""
    name, _, aggregate = scorer.rpartition(".")
    return (name, aggregate) if aggregate in AGGREGATORS else (scorer, "own")


class Scored(Masked):
    """Everything is held, exactly; of each block the scores (L, H, T) of several scorers.

    Args:
        ways: settings whose scorers are wanted; what else they say is not looked at.

    Raises:
        ConfigError, InputError: segments cannot be ranked as one of them asks.
    """

    def __init__(
        self, store: Store, engine: Engine, config: Config, pool: Executor, ways: Sequence[CompressConfig]
    ) -> None:
        super().__init__(store, engine, config, pool)
        for wanted in ways:
            way(engine.model, wanted)
        wanted_scores = {wanted.scored_by: wanted for wanted in ways}
        self.rankers = {name: Ranker(engine.model, wanted) for name, wanted in wanted_scores.items()}
        self.cache.marks = self.rankers["gate"].marks() if "gate" in self.rankers else None
        self.scores: list[dict[str, Tensor]] = []
        """By name, of each block."""
        self._coded: list[Rows] = []

    def hold(self, path: Sequence[Message]) -> None:
        """Everything, whatever the budget."""

    def _seal(self, path: Sequence[Message], last: int) -> Steps:
        """As ever, scored first."""
        first, found = self.bounds(path).index(self.cache.tail_start), dict[str, Tensor]()
        for name, ranker in self.rankers.items():
            subject = describe(self.engine.model.template, self.cache, path, first, last, ranker.config)
            found[name] = yield from score(self.engine, self.cache, subject, ranker)
        yield from super()._seal(path, last)
        self.scores.append(found)

    def _stored(self, rows: Rows, start: int) -> tuple[Rows, SegmentHeader]:
        """The exact rows, for the full cache's answers; what the codec makes of them waits for `encode`."""
        coded, header = super()._stored(rows, start)
        if self.config.codec.name != "raw":
            self._coded.append(coded)
        return rows, header

    def encode(self) -> None:
        """From now on all rows are as the codec gives them back."""
        if self._coded:
            layers = [[*zip(*layer, strict=True)] for layer in zip(*self._coded, strict=True)]
            self.rows = [(torch.cat(keys, dim=1), torch.cat(values, dim=1)) for keys, values in layers]
            self._coded = []

    def choose_by(self, path: Sequence[Message], config: CompressConfig, order: Way) -> Tensor:
        """The pairs that a session with these settings would hold now, (L, H, S) bool on the CPU."""
        flags, rankings = protected_tokens(path, config), list[Ranking]()
        for block, found in zip(self.blocks, self.scores, strict=True):
            shielded = flags[block.start : block.end]
            scores = found[config.scored_by]
            ranking, _ = ranked(scores, shielded, block.start, config, order)
            rankings.append(replace(ranking, method=config.method()))
        segments = [(ranking, block.end) for ranking, block in zip(rankings, self.blocks, strict=True)]
        newest = self.bounds(path)[num_answered(path)]
        held = chunks_held(config, segments, [ranking.num_chunks for ranking in rankings], newest)
        parts = [ranking.chunk_of < count for ranking, count in zip(rankings, held, strict=True)]
        return torch.from_numpy(np.concatenate(parts, axis=2))


class Prefill:
    """A conversation that was fed once, its questions, and what the full cache answers to them.

    Args:
        case: the conversation; all questions are asked at its end.
        conversation: it, empty still.
        step: turns fed at once.

    Raises:
        InputError: nothing of it is long enough to be sealed, or something went wrong with it on the way.
    """

    def __init__(self, case: Case, conversation: Conversation, residence: Scored, step: int) -> None:
        self.conversation, self.residence = conversation, residence
        self.truths: list[tuple[Question, Truth]] = []
        self._known: dict[tuple[bytes, str], dict[str, Any]] = {}
        self._shown = b""
        told: list[Notice] = []
        with torch.inference_mode():
            for question in feed(conversation, case, told.append, step):
                self.truths.append((question, truth(conversation, question)))
            residence.encode()
        if not residence.blocks or told:
            raise InputError(f"{case.name}: {told[0].text if told else 'no segment is complete; use more of it'}")

    def choose(self, config: CompressConfig, order: Way | None = None) -> Tensor:
        """The mask (L, H, S) of these settings; `order` in place of what they say of layers and heads."""
        order = order or way(self.residence.engine.model, config)
        return self.residence.choose_by(self.conversation.path, config, order)

    @torch.inference_mode()
    def measure(self, mask: Tensor, ids: frozenset[str] | None = None) -> list[dict[str, Any]]:
        """Figures of all questions, or of those with these ids, when the network sees the pairs of `mask` (L, H, S)."""
        seen = blake2b(np.packbits(mask.numpy()).tobytes(), digest_size=16).digest()
        found = []
        for question, told in self.truths:
            if ids is None or question.id in ids:
                if (seen, question.id) not in self._known:
                    self._show(seen, mask)
                    figures = about(question) | holding(self.residence)
                    self._known[seen, question.id] = figures | fidelity(self.conversation, question, told)
                found.append(self._known[seen, question.id])
        return found

    def _show(self, seen: bytes, mask: Tensor) -> None:
        if seen != self._shown:
            self.residence.show(mask.to(self.residence.engine.model.device))
            self._shown = seen


@contextmanager
def prefilled(
    engine: Engine, config: Config, case: Case, ways: Sequence[CompressConfig], step: int = 1
) -> Iterator[Prefill]:
    """The case fed once, scored in all these ways. Raises what `Scored` and `Prefill` do."""
    with new_conversation(engine, config, partial(Scored, ways=ways)) as conversation:
        residence = conversation.residence
        assert isinstance(residence, Scored)
        yield Prefill(case, conversation, residence, step)
