"""How much of each sealed segment memory holds, where it cannot hold all.

A conversation may have more tokens than the model has positions, and more KV than memory may take. Then only some
segments are in memory: the newest, the first, those that the question at hand concerns, and of the others those used
last. Of a segment that is too long only the end stays, and of the first always its beginning, with the system prompt.
What is held follows from the figures in the catalogue alone, so that a resumed conversation holds what it held before.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import cast

from kvchat.cache.pack import Spans
from kvchat.compress.allocate import chunks_held
from kvchat.model import Model
from kvchat.residence.catalogue import Entry
from kvchat.sections import CompressConfig
from kvchat.store.records import Message

MOST_RESERVED = 1024
"""Tokens for which a limit of memory leaves room before they come."""
LONG = 4
"""Steps of a `Room` beyond which a segment need not stand whole or not at all."""
OUT = 0.0
NEWEST, RECALLED, ALWAYS = 2.0, 4.0, 8.0
"""What a chunk is worth beyond its place in the ranking, which is below 1, because of the segment that it is of."""


@dataclass(frozen=True, slots=True)
class Room:
    """What sealed segments may take together.

    span    positions
    prefix  tokens at the conversation's beginning that stay whatever goes
    step    where a segment stands in part, its end has a multiple of so many tokens: so it changes seldom
    units   bytes or, if `in_rows`, pairs of all layers and heads; None = no limit
    turned  whether keys that stand elsewhere than they were computed at lie in memory turned too
    """

    span: int
    prefix: int
    step: int
    units: int | None = None
    in_rows: bool = False
    turned: bool = False

    def costs(self, entry: Entry) -> Sequence[int]:
        """Of each chunk."""
        if self.in_rows:
            return cast(list[int], entry.sizes.tolist())
        return [-(-nbytes * 3 // 2) for nbytes in entry.nbytes] if self.turned else entry.nbytes


@dataclass(frozen=True, slots=True)
class Cap:
    """What all KV of a conversation in memory may take.

    units     bytes or, if `in_rows`, pairs of all layers and heads
    unit      what a token of the tail takes
    reserve   tokens for which there is always room, so that nothing must move for each
    """

    units: int
    in_rows: bool
    unit: int

    @classmethod
    def of(cls, config: CompressConfig, model: Model) -> Cap | None:
        """From the setting; None: there is no limit."""
        if config.budget_rows:
            return cls(config.budget_rows * model.pairs_per_token, True, model.pairs_per_token)
        if config.budget_bytes:
            return cls(config.budget_bytes, False, model.pairs_per_token * model.bytes_per_pair)
        return None

    @property
    def tokens(self) -> int:
        """Of the tail, if there were nothing else."""
        return self.units // self.unit

    @property
    def reserve(self) -> int:
        """As above."""
        return min(MOST_RESERVED, self.tokens // 4)


def recalls(path: Sequence[Message]) -> dict[int, int]:
    """The number of the message whose answer last brought a segment back, by the segment's start."""
    told = ((number, message.usage or {}) for number, message in enumerate(path))
    return {int(start): number for number, usage in told for start in usage.get("recalled", ())}


def chunks_wanted(
    config: CompressConfig,
    entries: Sequence[Entry],
    stored: Sequence[int],
    standing: Collection[int],
    newest: int,
    room: Room,
    recalled: Collection[int],
) -> list[int]:
    """Chunks of each segment that memory is to hold, of so many `stored` ones.

    Of those that stand what `chunks_held` says, those recalled more; and less again, the worst first, if that is too
    much.

    Args:
        standing: those that do, by number.
        newest: where the newest token stands that does not wait for its answer.
        recalled: the starts of segments that a question concerns, those that concern it most first.
    """
    held, chosen = [0] * len(entries), sorted(standing)
    some = [(entries[index], entries[index].end) for index in chosen]
    for index, count in zip(chosen, chunks_held(config, some, [stored[at] for at in chosen], newest), strict=True):
        held[index] = count
    held = [most if one.start in recalled else count for one, most, count in zip(entries, stored, held, strict=True)]
    return lessened(config, entries, held, newest, room, recalled)


def fitting(
    entries: Sequence[Entry], stored: Sequence[int], room: Room, near: int, used: Mapping[int, int]
) -> dict[int, Spans]:
    """Which tokens of which segments, by number, stand in the room's span; () = all of the segment.

    The beginning of the first; the last; all of the first, unless it is long; those after place `near`, as far as they
    take half of it; then those used last, and the newer. Of what is near or long, and does not fit, the end stands.
    """
    there = [index for index, count in enumerate(stored) if count]
    newest = [index for index in reversed(there) if entries[index].end > near]
    half = len([taken for taken in accumulate(entries[index].length for index in newest) if taken <= room.span // 2])
    long = {index for index in there if entries[index].length > LONG * room.step}
    # Of a long one it was a part that was used, which need not be what would stand.
    ages = {index: (-1 if index in long else used.get(entries[index].start, -1), index) for index in there}
    rest = sorted(there, key=ages.__getitem__, reverse=True)
    first = [index for index in there[:1] if index not in long]
    begun = {index: min(room.prefix, entries[index].length) for index in there[:1] if not entries[index].start}
    taken, left = dict(begun), room.span - sum(begun.values())
    for index in dict.fromkeys([*there[-1:], *first, *newest[:half], *rest]):
        more = entries[index].length - begun.get(index, 0)
        if more > left:
            more = max(0, left) // room.step * room.step if index in long or index in newest else 0
        taken[index] = begun.get(index, 0) + more
        left -= more
    return {index: _spans(entries[index], begun.get(index, 0), count) for index, count in taken.items() if count}


def _spans(entry: Entry, begun: int, count: int) -> Spans:
    """So many tokens of a segment: the first that stay in any case, and its last."""
    if count == entry.length:
        return ()
    both = (entry.start, entry.start + begun), (entry.end - (count - begun), entry.end)
    return tuple((low, high) for low, high in both if low < high)


def without(spans: Iterable[tuple[int, int]], others: Sequence[tuple[int, int]]) -> Spans:
    """The tokens in `spans` that are not in `others`."""
    left = sorted(spans)
    for start, end in others:
        parts = [part for low, high in left for part in ((low, min(high, start)), (max(low, end), high))]
        left = [(low, high) for low, high in parts if low < high]
    return tuple(left)


def lessened(
    config: CompressConfig,
    entries: Sequence[Entry],
    held: Sequence[int],
    newest: int,
    room: Room,
    recalled: Collection[int],
) -> list[int]:
    """`held` without the chunks of least worth, as far as they are too much together.

    The first chunk of the first segment stays; the newest segments are ranked above all but what is recalled, and as
    many of them as take half the room above that.
    """
    result = [*held]
    if room.units is None:
        return result
    costs = [list(room.costs(entry)) for entry in entries]
    excess = sum(sum(costs[index][:count]) for index, count in enumerate(held)) - room.units
    ranks = _worth(config, entries, held, costs, newest, room.units, recalled)
    for _, index in sorted(ranks):
        if excess <= 0:
            break
        result[index] -= 1
        excess -= costs[index][result[index]]
    return result


def _worth(
    config: CompressConfig,
    entries: Sequence[Entry],
    held: Sequence[int],
    costs: Sequence[Sequence[int]],
    newest: int,
    units: int,
    recalled: Collection[int],
) -> list[tuple[tuple[float, float, int], int]]:
    """Of every held chunk what it is worth, a segment's last chunk least, and the number of its segment."""
    alike = len({entry.method for entry, count in zip(entries, held, strict=True) if count}) == 1
    ranks, near = list[tuple[tuple[float, float, int], int]](), 0
    last = max((index for index, count in enumerate(held) if count), default=0)
    for index in range(len(entries) - 1, -1, -1):
        entry, count = entries[index], held[index]
        near += sum(costs[index][:count])
        kind = OUT
        if min(entry.end, newest) > newest - config.recent_tokens:
            kind = NEWEST + (RECALLED if near <= units // 2 else OUT)
        if entry.start in recalled:
            kind = RECALLED + OUT
        shares = [1 - done / entry.length for done in _fractions(entry)]
        for chunk in range(count):
            score = entry.scores[chunk] if alike and entry.scores is not None else shares[chunk]
            always = ALWAYS if chunk == 0 and index in (0, last) else OUT
            ranks.append(((kind + always, score, -chunk), index))
    return ranks


def _fractions(entry: Entry) -> list[float]:
    """Which part of the segment's pairs stands before each chunk, times its length."""
    whole = max(1, int(entry.sizes.sum()))
    ends = accumulate(entry.sizes.tolist(), initial=0)
    return [entry.length * end / whole for end, _ in zip(ends, entry.sizes, strict=False)]
