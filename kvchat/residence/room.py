"""How much of each sealed segment memory holds, where it cannot hold all.

A conversation may have more tokens than the model has positions, and more KV than memory may take. Then only some
segments are in memory: the first, with the system prompt, the newest, those that the question at hand concerns, and of
the others those used last. What is held follows from the figures in the catalogue alone, so that a resumed conversation
holds what it held before.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from kvchat.compress.allocate import chunks_held
from kvchat.model import Model
from kvchat.residence.catalogue import Entry
from kvchat.sections import CompressConfig
from kvchat.store.records import Message

MOST_RESERVED = 1024
"""Tokens for which a limit of memory leaves room before they come."""
OUT = 0.0
NEWEST, RECALLED, ALWAYS = 2.0, 4.0, 8.0
"""What a chunk is worth beyond its place in the ranking, which is below 1, because of the segment that it is of."""


@dataclass(frozen=True, slots=True)
class Room:
    """What sealed segments may take together.

    span   positions
    units  bytes or, if `in_rows`, pairs of all layers and heads; None = no limit
    """

    span: int
    units: int | None = None
    in_rows: bool = False

    def costs(self, entry: Entry) -> Sequence[int]:
        """Of each chunk."""
        return entry.sizes.tolist() if self.in_rows else entry.nbytes


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


def wanted(
    config: CompressConfig,
    entries: Sequence[Entry],
    stored: Sequence[int],
    newest: int,
    room: Room,
    recalled: Collection[int],
    used: Mapping[int, int],
) -> list[int]:
    """Chunks of each segment that memory is to hold, of so many `stored` ones.

    Those that fit by their length; of these what `chunks_held` says, those recalled more; and less again, the worst
    first, if that is too much.

    Args:
        newest: where the newest token stands that does not wait for its answer.
        recalled: the starts of segments that a question concerns, those that concern it most first.
        used: as `recalls` gives it.
    """
    near = newest - config.recent_tokens
    chosen = fitting(entries, stored, room.span, near, recalled, used)
    held = [0] * len(entries)
    some = [(entries[index], entries[index].end) for index in chosen]
    for index, count in zip(chosen, chunks_held(config, some, [stored[at] for at in chosen], newest), strict=True):
        held[index] = stored[index] if entries[index].start in recalled else count
    return lessened(config, entries, held, newest, room, recalled)


def fitting(
    entries: Sequence[Entry],
    stored: Sequence[int],
    span: int,
    near: int,
    recalled: Collection[int],
    used: Mapping[int, int],
) -> list[int]:
    """Which segments stand in `span` positions, by number.

    The recalled, which stand elsewhere; first and last; those after place `near`, as far as they take half of it; then
    those used last.
    """
    there = [index for index, count in enumerate(stored) if count]
    by_start = {entries[index].start: index for index in there}
    named = [by_start[start] for start in recalled if start in by_start]
    rest = sorted(there, key=lambda index: (used.get(entries[index].start, -1), entries[index].start), reverse=True)
    newest = [index for index in reversed(there) if entries[index].end > near]
    half = len([taken for taken in accumulate(entries[index].length for index in newest) if taken <= span // 2])
    chosen, left = set(named), span
    for index in dict.fromkeys([*there[:1], *there[-1:], *newest[:half], *rest]):
        if index not in chosen and entries[index].length <= left:
            chosen.add(index)
            left -= entries[index].length
    return sorted(chosen)


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
