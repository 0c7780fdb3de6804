"""Say which old turns of a conversation have to do with a question.

Every selector gives a number to each turn: its order says which come, and where several are joined, by how much. Turns
with the least number do not come. Equal inputs give equal numbers in every process; of turns with equal numbers the
newer comes first, as `best` has it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import numpy as np

from kvchat.cache.ragged import SegmentedCache
from kvchat.engine import Engine
from kvchat.episodes.attending import attended
from kvchat.episodes.embedder import Embedder
from kvchat.episodes.vectors import Array, Spread, Vectors, steps
from kvchat.errors import InputError
from kvchat.store.store import Message, Store


@dataclass(frozen=True, slots=True)
class Candidate:
    """An old turn of a path: places of its tokens, and index of its first message and one past its last."""

    start: int
    end: int
    first: int
    last: int


def turns_between(path: Sequence[Message], bounds: Sequence[int], first: int, last: int) -> list[Candidate]:
    """The turns of messages [first, last) of a path whose messages begin at `bounds`; the first may be part of one."""
    begins = [at for at in range(first, last) if at == first or path[at].role == "user"]
    return [Candidate(bounds[low], bounds[high], low, high) for low, high in pairwise([*begins, last])]


class Selector(Protocol):
    """One way to say it."""

    def scores(self, question: Message, path: Sequence[Message], candidates: Sequence[Candidate]) -> list[float]:
        """A number for each candidate; the higher, the more it has to do with the question."""


@dataclass(frozen=True, slots=True)
class Sources:
    """What selectors look into; none looks into all of it."""

    store: Store
    engine: Engine
    cache: SegmentedCache
    embedder: Embedder


class Recency:
    """The newer, the higher."""

    def __init__(self, _: Sources) -> None:
        pass

    def scores(self, question: Message, path: Sequence[Message], candidates: Sequence[Candidate]) -> list[float]:
        """Where each candidate ends."""
        return [float(candidate.end) for candidate in candidates]


class Text:
    """Words that a turn shares with the question and few others do, the rarest most: see `Store.matches`."""

    def __init__(self, sources: Sources) -> None:
        self._store = sources.store
        self._numbers: dict[str, int] = {}

    def scores(self, question: Message, path: Sequence[Message], candidates: Sequence[Candidate]) -> list[float]:
        """The best message of each candidate; 0 where nothing matches."""
        ids = [[message.id for message in path[one.first : one.last]] for one in candidates]
        new = [identity for part in ids for identity in part if identity not in self._numbers]
        self._numbers |= {identity: number for number, identity in self._store.numbered(new).items()} if new else {}
        numbers = [[self._numbers[identity] for identity in part if identity in self._numbers] for part in ids]
        hits = self._store.matching(question.content, {number for part in numbers for number in part})
        return [max((hits.get(number, 0.0) for number in part), default=0.0) for part in numbers]


class Embedding:
    """The sentence of each turn that is nearest to the question, by the angle of their vectors (see `Spread`).

    How vectors lie is found from the path's first messages, as many as `steps` gives, and kept until that is more.
    """

    def __init__(self, sources: Sources) -> None:
        self._vectors, self._whiten = Vectors(sources.store, sources.embedder), sources.embedder.whiten
        self._from = ""
        """The last of the messages that `_spread` is from."""
        self._spread: Spread | None = None
        self._turned: dict[str, Array] = {}

    def scores(self, question: Message, path: Sequence[Message], candidates: Sequence[Candidate]) -> list[float]:
        """The largest cosine of each candidate's sentences; -1 where it has no text."""
        parts = [path[one.first : one.last] for one in candidates]
        rows = self._vectors.question(question)
        if not candidates or not len(rows):
            return [-1.0] * len(candidates)
        spread = self._of(path[: steps(max(one.last for one in candidates))])
        if spread is None:
            return [-1.0] * len(candidates)
        messages = [message for part in parts for message in part]
        self._turn(spread, messages)
        found = [self._turned[message.id] for message in messages]
        stacked = np.concatenate([np.zeros((0, rows.shape[1]), np.float32), *(one for one in found if len(one))])
        cosines = iter((stacked @ spread.directions(rows).T).max(1))
        nearest = iter([max((float(next(cosines)) for _ in one), default=-1.0) for one in found])
        return [max((next(nearest) for _ in part), default=-1.0) for part in parts]

    def _of(self, messages: Sequence[Message]) -> Spread | None:
        """How the vectors of a path's first messages lie; None if none has text."""
        if messages[-1].id != self._from:
            rows = [found for found in self._vectors.of(messages) if len(found)]
            self._from, self._spread, self._turned = messages[-1].id, None, {}
            if rows:
                self._spread = Spread.over(np.concatenate(rows)) if self._whiten else Spread.none(rows[0].shape[1])
        return self._spread

    def _turn(self, spread: Spread, messages: Sequence[Message]) -> None:
        """Turn the vectors of messages that are new."""
        new = [message for message in messages if message.id not in self._turned]
        for message, found in zip(new, self._vectors.of(new), strict=True):
            self._turned[message.id] = spread.directions(found) if len(found) else found


class Attention:
    """What the question's own queries read of the rows that memory holds, in one pass over the question.

    Only turns with rows in memory can be judged; the others get the lowest number, 0.
    """

    def __init__(self, sources: Sources) -> None:
        self._engine, self._cache = sources.engine, sources.cache

    def scores(self, question: Message, path: Sequence[Message], candidates: Sequence[Candidate]) -> list[float]:
        """The part of attention that each candidate's rows get, as `attended` has it."""
        spans = [(one.start, one.end) for one in candidates]
        return attended(self._engine, self._cache, question.token_ids, spans)


class Fused:
    """Several selectors by the sum of their scores, each selector's as parts of its best: CombSUM (Fox and Shaw, 1994).

    Sums of places, as of reciprocal rank fusion, find less on LoCoMo: that a turn is first by far is then lost.
    """

    def __init__(self, selectors: Sequence[Selector]) -> None:
        self._selectors = selectors

    def scores(self, question: Message, path: Sequence[Message], candidates: Sequence[Candidate]) -> list[float]:
        """The sum for each candidate; a score below 0 counts as 0."""
        total = np.zeros(len(candidates))
        for selector in self._selectors:
            scores = np.maximum(selector.scores(question, path, candidates), 0)
            total += scores / max(scores.max(initial=0), 1e-9)
        return [float(score) for score in total]


SELECTORS: dict[str, Callable[[Sources], Selector]] = {
    "recency": Recency,
    "text": Text,
    "embedding": Embedding,
    "attention": Attention,
}
"""Name to selector, as `recall.by` says it."""


def find_selector(name: str, sources: Sources) -> Selector:
    """The selector of a name, or of several joined with +.

    Raises:
        InputError: no such selector.
    """
    names = [part.strip() for part in name.split("+")]
    if unknown := [part for part in names if part not in SELECTORS]:
        known = ", ".join(SELECTORS)
        raise InputError(f"there is no selector {unknown[0]!r}; known are {known}, and several joined with +")
    selectors = [SELECTORS[part](sources) for part in dict.fromkeys(names)]
    return selectors[0] if len(selectors) == 1 else Fused(selectors)


def best(scores: Sequence[float], candidates: Sequence[Candidate], most: int | None = None) -> list[int]:
    """Indices of the candidates, at most `most`, the highest score first, of equal ones the newer."""
    order = sorted(range(len(candidates)), key=lambda index: (-scores[index], -candidates[index].start))
    return order[:most]
