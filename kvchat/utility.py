"""What saved KV is expected to be worth against what it costs, and which of it gives way (EVICPRESS, arXiv 2512.14946).

Every (segment, rank chunk) has a utility, in seconds times uses:

    (alpha * quality - load_s) * frequency

quality    the part of its session that it stands for; all chunks of a session, its tail too, have 1 together
load_s     until its rows are in memory: none if they are, a fixed time and bytes / bandwidth from host memory or disk
frequency  uses of its session, and recalls of its segment, each counting exp(-age / tau)
alpha      seconds that one unit of quality is worth

A chunk that is not used brings no quality and takes no time. Where only text is left, a segment is computed again: all
of its quality, and tokens / prefill rate. `make_room` lets go what loses the least utility for a byte, tier by tier.
Everything here is a function of what it is given. Needs no torch.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

ALPHA = 10.0
"""The worst third of a turn's pairs has a few hundredths of its score mass, and is back in hundredths of a second."""
TAU_S = 6 * 3600.0
"""A use counts for 1 / e after so many seconds."""

MEMORY, HOST, DISK, TEXT = range(4)
TIERS = ("memory", "host", "disk", "text")
"""Rows that attention reads; frames in host memory; frames in the store; token ids."""


class Ranked(Protocol):
    """What is asked of a `Ranking`."""

    @property
    def sizes(self) -> Sequence[int]:
        """Pairs of each chunk."""

    @property
    def scores(self) -> Sequence[float] | None:
        """The median score of each chunk, never rising."""

    @property
    def method(self) -> str:
        """How it was ranked."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """A rank chunk: its part of its session's quality, and its bytes as rows in memory and as frames."""

    quality: float
    rows: int
    frames: int


@dataclass(frozen=True, slots=True)
class Context:
    """A segment: what it is called, its tokens, how often it is used, and its chunks.

    coarser  (part of the bytes of its frames, part of its quality) with the coarser codec; None: it has that already
    """

    name: str
    tokens: int
    frequency: float
    chunks: tuple[Chunk, ...]
    coarser: tuple[float, float] | None = None


@dataclass(frozen=True, slots=True)
class Place:
    """Where a segment's chunks lie: those before `memory` in memory, those before `host` in memory or host memory.

    The store has all before `disk`, those in memory too; further ones are given up. None there: only text is left.
    """

    memory: int
    host: int
    disk: int
    coarse: bool = False

    def __post_init__(self) -> None:
        assert 0 <= self.memory <= self.host <= self.disk

    def __str__(self) -> str:
        if not self.disk:
            return "text only"
        said = f"{self.memory}/{self.host}/{self.disk}"
        return f"{said} coarser" if self.coarse else said


@dataclass(frozen=True, slots=True)
class Costs:
    """Bytes a second from disk and of decoding, seconds that every load takes, tokens a second of computing again."""

    disk: float
    decode: float
    fixed_s: float
    prefill: float
    alpha: float = ALPHA

    def load_s(self, nbytes: float, tier: int) -> float:
        """Seconds until frames of a tier are rows in memory."""
        if tier == MEMORY:
            return 0.0
        return self.fixed_s + nbytes / self.decode + (nbytes / self.disk if tier == DISK else 0.0)


@dataclass(frozen=True, slots=True)
class Decision:
    """One step of `make_room`: a context goes from a place to another, to free bytes of a tier."""

    index: int
    name: str
    tier: int
    before: Place
    after: Place
    freed: int
    drop: float
    frequency: float

    def __str__(self) -> str:
        numbers = f"frees {self.freed / 1e6:.2f} MB of {TIERS[self.tier]} for {self.drop:.3g} s of use"
        return (
            f"{self.name}: {self._what()} ({self.before} -> {self.after}): {numbers}, used {self.frequency:.3g} times"
        )

    def _what(self) -> str:
        if not self.after.disk:
            return "only text is left"
        if self.after.coarse > self.before.coarse:
            return "written with fewer bits"
        if self.after.disk < self.before.disk:
            return "its last chunk is given up"
        return f"a chunk moves to {TIERS[self.tier + 1]}"


def qualities(segments: Sequence[Ranked]) -> list[tuple[float, ...]]:
    """Each chunk's part of a session's quality, of all its segments.

    A segment has its part of the session's pairs; segments that were ranked alike have theirs together, and share it
    by score mass: a chunk's median score times its pairs. Scores that fall below 0 tell an order and no mass, and so do
    those of coverage, which are sums already; there, and without scores, a chunk counts by its place: pairs weigh from
    1 for the first down to 0.
    """
    whole = sum(sum(one.sizes) for one in segments) or 1
    alike: dict[tuple[str, bool], list[int]] = {}
    for index, one in enumerate(segments):
        alike.setdefault((one.method, _tells_mass(one)), []).append(index)
    found: dict[int, tuple[float, ...]] = {}
    for (_, told), members in alike.items():
        masses = {at: _masses(segments[at], told) for at in members}
        pairs, total = sum(sum(segments[at].sizes) for at in members), sum(map(sum, masses.values()))
        found |= {at: tuple(mass / (total or 1) * pairs / whole for mass in masses[at]) for at in members}
    return [found[index] for index in range(len(segments))]


def _tells_mass(one: Ranked) -> bool:
    return one.scores is not None and not one.method.endswith("-coverage") and min(one.scores, default=0) >= 0


def _masses(one: Ranked, told: bool) -> list[float]:
    if told and one.scores is not None:
        return [float(score) * int(size) for score, size in zip(one.scores, one.sizes, strict=True)]
    whole, before, masses = sum(one.sizes) or 1, 0, []
    for size in map(int, one.sizes):
        masses.append(size * (1 - (before + size / 2) / whole))
        before += size
    return masses


class Uses:
    """How often things were used, each use counting exp(-age / tau)."""

    def __init__(self, tau_s: float = TAU_S) -> None:
        self._tau_s = tau_s
        self._counts: dict[object, tuple[float, float]] = {}
        """Of each thing the count, and when it was that."""

    def add(self, key: object, now: float, weight: float = 1.0) -> None:
        """Count a use."""
        self._counts[key] = (self.frequency(key, now) + weight, now)

    def frequency(self, key: object, now: float) -> float:
        """Uses until now; 0 if there was none."""
        count, then = self._counts.get(key, (0.0, now))
        return count * math.exp(-max(0.0, now - then) / self._tau_s)

    def forget(self, key: object) -> None:
        """Count nothing any more."""
        self._counts.pop(key, None)


# -- what it is worth, and what it takes ----------------------------------------------------------------------------


def utility(context: Context, place: Place, costs: Costs) -> float:
    """Of all chunks together."""
    return context.frequency * (costs.alpha * quality(context, place) - load_s(context, place, costs))


def quality(context: Context, place: Place) -> float:
    """What is had when the segment is used; if only text is left all of it, for it is computed again."""
    used = context.chunks[: place.disk] if place.disk else context.chunks
    return sum(chunk.quality for chunk in used) * (_coarser(context)[1] if place.coarse else 1.0)


def load_s(context: Context, place: Place, costs: Costs) -> float:
    """Seconds until a segment that is used is in memory."""
    if not place.disk:
        return context.tokens / costs.prefill
    factor, chunks = (_coarser(context)[0] if place.coarse else 1.0), context.chunks
    from_host = sum(costs.load_s(one.frames * factor, HOST) for one in chunks[place.memory : place.host])
    return from_host + sum(costs.load_s(one.frames * factor, DISK) for one in chunks[place.host : place.disk])


def taken(context: Context, place: Place, tier: int) -> int:
    """Bytes of a tier."""
    if tier == MEMORY:
        return sum(chunk.rows for chunk in context.chunks[: place.memory])
    first, last = (place.memory, place.host) if tier == HOST else (0, place.disk)
    factor = _coarser(context)[0] if place.coarse else 1.0
    return sum(int(chunk.frames * factor) for chunk in context.chunks[first:last])


def _coarser(context: Context) -> tuple[float, float]:
    assert context.coarser
    return context.coarser


def options(context: Context, place: Place, tier: int, moving: bool = False) -> Iterator[Place]:
    """What a context could be instead: fewer chunks, coarser once, the last chunk one tier lower, text only.

    moving: only the third.
    """
    if not place.disk:
        return
    if (last := place.disk - 1) > 0 and not moving:
        yield Place(min(place.memory, last), min(place.host, last), last, place.coarse)
    if context.coarser and not place.coarse and not moving:
        yield replace(place, coarse=True)
    if tier == MEMORY and place.memory:
        yield replace(place, memory=place.memory - 1)
    if tier == HOST and place.host > place.memory:
        yield replace(place, host=place.host - 1)
    if not moving:
        yield Place(0, 0, 0)


# -- making room ------------------------------------------------------------------------------------------------------


def make_room(
    contexts: Sequence[Context],
    places: Sequence[Place],
    caps: Mapping[int, float],
    costs: Costs,
    moving: bool = False,
) -> tuple[list[Place], list[Decision]]:
    """Until each tier keeps to its cap, let go what loses the least utility a byte that it frees, the first of equals.

    First memory, then host memory, then disk, so that what moves down is part of what the next tier decides on. A tier
    without a cap has room for all. A smaller cap takes the same steps and then more, so that what it leaves in a tier
    is part of what a larger one does. Where nothing frees any more, what is left stays. `moving`: as of `options`.
    """
    now, decisions = list(places), list[Decision]()
    for tier in (MEMORY, HOST, DISK):
        used = sum(taken(context, place, tier) for context, place in zip(contexts, now, strict=True))
        if used <= caps.get(tier, math.inf):
            continue
        steps = [_best(context, now[index], tier, costs, index, moving) for index, context in enumerate(contexts)]
        heap = [(step.drop / step.freed, step.index, step) for step in steps if step]
        heapq.heapify(heap)
        while heap and used > caps[tier]:
            _, index, step = heapq.heappop(heap)
            decisions.append(step)
            now[index], used = step.after, used - step.freed
            if further := _best(contexts[index], now[index], tier, costs, index, moving):
                heapq.heappush(heap, (further.drop / further.freed, index, further))
    return now, decisions


def _best(context: Context, place: Place, tier: int, costs: Costs, index: int, moving: bool) -> Decision | None:
    """The option that loses the least for a byte that it frees, the first of equals; None if none frees any."""
    before, held, best = utility(context, place, costs), taken(context, place, tier), None
    for option in options(context, place, tier, moving):
        freed = held - taken(context, option, tier)
        if freed <= 0:
            continue
        drop = before - utility(context, option, costs)
        if best is None or drop / freed < best.drop / best.freed:
            best = Decision(index, context.name, tier, place, option, freed, drop, context.frequency)
    return best
