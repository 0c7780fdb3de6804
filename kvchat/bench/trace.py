"""A made-up day with many sessions: which is used when, who stays in memory, and what waiting that comes to.

Everything here is figures: no model, no store.
"""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean

from kvchat.utility import MEMORY, Context, Costs, Place, Uses, load_s, make_room, taken


def zipf(count: int, steps: int, seed: int, exponent: float = 1.0) -> list[int]:
    """Which of `count` things is used at each step: the nth most popular has 1 / n ** exponent of the first's uses."""
    source = random.Random(seed)
    order = source.sample(range(count), count)
    return source.choices(order, [1 / (place + 1) ** exponent for place in range(count)], k=steps)


class Recent:
    """The least recently used goes whole, until the rest fits."""

    def __init__(self, cap: float) -> None:
        self._cap = cap
        self._sizes: OrderedDict[int, int] = OrderedDict()

    def use(self, index: int, size: int) -> tuple[bool, list[int]]:
        """Whether it was there, and what goes for it."""
        hit = index in self._sizes
        self._sizes[index] = size
        self._sizes.move_to_end(index)
        gone = []
        while sum(self._sizes.values()) > self._cap and len(self._sizes) > 1:
            gone.append(self._sizes.popitem(last=False)[0])
        return hit, gone


@dataclass(frozen=True, slots=True)
class Simulated:
    """Mean seconds to the first token, and the part of uses that had all in memory."""

    ttft_s: float
    hits: float


def by_recency(
    trace: Sequence[int], sizes: Sequence[int], misses_s: Sequence[float], cap: float, question_s: float
) -> Simulated:
    """Whole sessions by recency; one that is not in memory takes so long to come back."""
    recent = Recent(cap)
    hits = [recent.use(index, sizes[index])[0] for index in trace]
    waits = [question_s + (0.0 if hit else misses_s[index]) for index, hit in zip(trace, hits, strict=True)]
    return Simulated(mean(waits), mean(hits))


def by_utility(
    trace: Sequence[int],
    sessions: Sequence[Sequence[tuple[Context, Place]]],
    caps: Mapping[int, float],
    costs: Costs,
    question_s: float,
) -> Simulated:
    """As `utility` decides what stays in memory of sessions whose segments lie at these places, use by use."""
    flat = [(number, context) for number, segments in enumerate(sessions) for context, _ in segments]
    contexts, places = [context for _, context in flat], [place for segments in sessions for _, place in segments]
    uses, waits, hits = Uses(), list[float](), 0
    for now, used in enumerate(trace):
        uses.add(used, float(now))
        mine = [at for at, (number, _) in enumerate(flat) if number == used]
        waits.append(question_s + sum(load_s(contexts[at], places[at], costs) for at in mine))
        hits += all(places[at].memory == places[at].disk for at in mine)
        places = [_whole(place) if at in set(mine) else place for at, place in enumerate(places)]
        rated = [_rated(context, uses.frequency(number, float(now))) for number, context in flat]
        others = [at for at in range(len(flat)) if at not in set(mine)]
        room = caps[MEMORY] - sum(taken(contexts[at], places[at], MEMORY) for at in mine)
        some, before = [rated[at] for at in others], [places[at] for at in others]
        moved, _ = make_room(some, before, {MEMORY: max(0.0, room)}, costs, moving=True)
        for at, place in zip(others, moved, strict=True):
            places[at] = Place(place.memory, place.memory, places[at].disk, places[at].coarse)
    return Simulated(mean(waits), hits / len(trace))


def _whole(place: Place) -> Place:
    return Place(place.disk, place.disk, place.disk, place.coarse)


def _rated(context: Context, frequency: float) -> Context:
    return Context(context.name, context.tokens, frequency, context.chunks, context.coarser)
