"""What a conversation without end costs along the way: memory and time, every so many tokens; and whether all is there.

Also after the last turn: nothing of the record is lost, every turn is found by its own words and can come back.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from kvchat.evals.cases import Case
from kvchat.residence.catalogue import Recalled
from kvchat.residence.residence import Residence
from kvchat.session import Conversation
from kvchat.store.store import Message

MIB = 1 << 20
WORDS = 12
"""Most words of a message that are searched for."""


@dataclass(frozen=True, slots=True)
class Span:
    """A stretch of the feeding, and what is in memory at its end.

    Attributes:
        tokens, messages: fed by its end.
        turns: of the stretch.
        resident_mib: of the process; 0 where the system does not tell.
        kv_mib: of sealed rows as they lie and of the tail.
        rows: a head on average.
        most_rows: at the end of any of its turns.
        ms_a_token: of the stretch, sealing and saving included.
        slowest_s: of its turns, or of so many as were fed at once.
        rebased: by how much positions are smaller than places.
    """

    tokens: int
    messages: int
    turns: int
    resident_mib: float
    kv_mib: float
    rows: float
    most_rows: float
    ms_a_token: float
    slowest_s: float
    rebased: int


@dataclass(frozen=True, slots=True)
class Record:
    """Whether all is there at the end.

    Attributes:
        fed, kept: messages, without and in the store, where they are equal one by one if `equal`.
        searched, found: messages looked for by their own words, and found.
        turns, recallable: all turns, and those whose tokens are in the tail or in a segment that is stored whole.
        tried, came: segments that were asked for, and came back.
    """

    fed: int
    kept: int
    equal: bool
    searched: int
    found: int
    turns: int
    recallable: int
    tried: int
    came: int


@dataclass
class Gauge:
    """Told of every feeding; makes a `Span` whenever `every` tokens more are there, and one of the rest."""

    every: int
    tell: Callable[[Span], None]
    spans: list[Span] = field(default_factory=list)
    _turns: int = 0
    _seconds: list[float] = field(default_factory=list)
    _rows: list[float] = field(default_factory=list)

    def add(self, conversation: Conversation, turns: int, seconds: float, last: bool) -> None:
        """So many turns more, which took so long; `last`: no more come."""
        self._turns += turns
        self._seconds.append(seconds)
        self._rows.append(rows(conversation.residence))
        before, tokens = self.spans[-1].tokens if self.spans else 0, conversation.num_tokens
        if not last and tokens // self.every == before // self.every:
            return
        cache = conversation.residence.cache
        span = Span(
            tokens=tokens,
            messages=len(conversation.path),
            turns=self._turns,
            resident_mib=round(resident_bytes() / MIB, 1),
            kv_mib=round(kv_bytes(conversation.residence) / MIB, 2),
            rows=round(self._rows[-1], 1),
            most_rows=round(max(self._rows), 1),
            ms_a_token=round(1000 * sum(self._seconds) / (tokens - before), 3),
            slowest_s=round(max(self._seconds), 3),
            rebased=getattr(cache, "offset", 0),
        )
        self.spans.append(span)
        self._turns, self._seconds, self._rows = 0, [], []
        self.tell(span)


def rows(residence: Residence) -> float:
    """Rows a head on average."""
    cache = residence.cache
    return float(cache.num_sealed_rows / residence.engine.model.pairs_per_token + cache.tail_length)


def kv_bytes(residence: Residence) -> int:
    """Bytes of sealed rows as they lie, and of the tail's tokens."""
    cache = residence.cache
    tail = sum(part.nbytes for layer in cache.layers for part in layer.tail())
    return cache.sealed_bytes + int(tail)


def resident_bytes() -> int:
    """Bytes of the process in memory; 0 where the system does not tell."""
    file = Path("/proc/self/statm")
    return int(file.read_text("ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE") if file.is_file() else 0


# -- at the end ------------------------------------------------------------------------------------------------------


def record(conversation: Conversation, case: Case, sample: int, seed: int) -> dict[str, Any]:
    """Look whether all that was fed is there, as `Record` has it; searches and asks for up to `sample`."""
    said, source = [message for turn in case.turns for message in turn], random.Random(seed)
    kept = conversation.store.path(conversation.store.session(conversation.info.name).tip)
    opening = int(len(kept) > len(said) and kept[0].role == "system")
    equal = [(one.role, one.content) for one in kept[opening:]] == [(one["role"], one["content"]) for one in said]
    searched = source.sample(range(opening, len(kept)), min(sample, len(kept) - opening))
    bounds, whole = conversation.residence.bounds(kept), stored_whole(conversation.residence)
    users = [index for index, message in enumerate(kept) if message.role == "user"]
    tried = source.sample(whole, min(sample, len(whole)))
    return asdict(
        Record(
            fed=len(said),
            kept=len(kept) - opening,
            equal=equal,
            searched=len(searched),
            found=sum(is_found(conversation, kept, index) for index in searched),
            turns=len(users),
            recallable=sum(
                can_be_had(conversation, whole, bounds[at], bounds[end]) for at, end in pairwise([*users, len(kept)])
            ),
            tried=len(tried),
            came=sum(comes_back(conversation, start) for start, _ in tried),
        )
    )


def is_found(conversation: Conversation, path: Sequence[Message], index: int) -> bool:
    """Whether a search for a message's own words gives a message of its role and turn."""
    turn = sum(message.role == "user" for message in path[: index + 1])
    hits = conversation.store.search(" ".join(path[index].content.split()[:WORDS]), limit=50)
    return any((hit.turn, hit.role) == (turn, path[index].role) for hit in hits)


def stored_whole(residence: Residence) -> list[tuple[int, int]]:
    """First place and one past the last of every sealed segment of which all can be had."""
    stored = residence.store.stored_chunks([entry.id for entry in residence.known])
    return [
        (entry.start, entry.end)
        for entry in residence.known
        if not entry.lost and stored.get(entry.id, 0) >= entry.num_chunks
    ]


def can_be_had(conversation: Conversation, whole: Sequence[tuple[int, int]], first: int, last: int) -> bool:
    """Whether the tokens at these places are all in such segments or in the tail."""
    cache = conversation.residence.cache
    parts = [*whole, (cache.tail_start, cache.num_seen)]
    return sum(max(0, min(end, last) - max(start, first)) for start, end in parts) == last - first


def comes_back(conversation: Conversation, start: int) -> bool:
    """Whether the segment at this place is in memory when it is asked for; it leaves again."""
    residence = conversation.residence
    entry = next(one for one in residence.known if one.start == start)
    residence.recalled = {start: Recalled.whole(entry)}
    residence.hold(conversation.path)
    there = any(one.start == start and one.chunks for one in residence.tiers.residents)
    residence.recalled = {}
    residence.hold(conversation.path)
    return there
