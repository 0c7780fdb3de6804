"""What gives way when the disk has no room: the KV of cold sessions, in one order. Text and ids never go.

Three groups of sessions, each exhausted before the next is touched: those that nobody has open, those that are open,
and the one that is written to. In a group every step goes through all sessions, the coldest first, before the next:

    1. the last rank chunks go, down to those that memory would hold anyway
    2. further ones go, down to the first
    3. what is left is written with fewer bits (closed sessions only: an open one would hold other values in memory)
    4. all segments of a session go, the coldest session's first: only text is left

A segment is as warm as the warmest session that reaches one of its messages. Everything here is a function of what it
is given; `limited_store.py` does what is said here. Needs no torch.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any

from kvchat.store.records import Row, SegmentRecord

Held = Callable[[Sequence[SegmentRecord], int], Sequence[int]]
"""Sealed segments of a session and where it ends, to the chunks of each that memory would hold."""

Recode = Callable[[Sequence[SegmentRecord], str], object]
"""Writes segments of one session anew with another codec. Raises CodecError."""

RUNGS = ("k4v4", "archive")
"""Codecs that step 3 goes down to, one after the other."""

BITS = {
    "raw": 11.0,
    "k8v8": 8.2,
    "k8v4": 6.2,
    "k8v3": 5.7,
    "k8v2": 5.2,
    "k4v4": 4.6,
    "k4v3": 4.1,
    "k4v2": 3.6,
    "k3v3": 3.6,
    "k3v2": 3.1,
    "k2v2": 2.6,
    "eb2": 5.9,
    "eb5": 4.6,
    "eb10": 3.7,
    "eb20": 3.1,
    "archive": 1.9,
}
"""Of an element on disk, scales included, as measured in bfloat16 with heads of 64. eb5 has 4.65, and counts as k4v4:
hardly a byte is worth losing precision twice."""

CLOSED, OPEN, WRITTEN = range(3)
"""The groups."""

Warmth = tuple[int, str, int]
"""Group, time of the last change, and number of a session, the coldest first."""
NOBODYS, MINE = (CLOSED, "", 0), (WRITTEN, "", 0)


def free_bytes(path: Path) -> int:
    """Free bytes on the disk of a file, or of the one that it would be."""
    return shutil.disk_usage(next(folder for folder in path.absolute().parents if folder.exists())).free


@dataclass(frozen=True, slots=True)
class Allowance:
    """How much a store may take, and whom it asks before it takes something away."""

    disk_budget: int = 0
    """Most bytes of database pages in use; 0 = no limit."""
    min_free: int = 0
    """Bytes of the disk that stay free; 0 = none."""
    held: Held | None = None
    """None: no session is restored, so step 1 goes straight to the first chunk."""
    recode: Recode | None = None
    spared: Callable[[Collection[int]], Collection[int]] = lambda sessions: ()
    """Which of these sessions are open, here or in another process."""
    closed: Callable[[Collection[int]], AbstractContextManager[bool]] = lambda sessions: nullcontext(True)
    """Keeps these sessions from being opened while it lasts; False if one of them is open."""
    disk_free: Callable[[Path], int] = free_bytes

    @property
    def limited(self) -> bool:
        """Whether there is any limit."""
        return self.disk_budget > 0 or self.min_free > 0


@dataclass(frozen=True, slots=True)
class Room:
    """Bytes: database pages in use, pages that its file may reuse, free ones on its disk, and the limits (0 = none)."""

    in_use: int
    reusable: int
    free: int
    disk_budget: int
    min_free: int

    @property
    def allowed(self) -> float:
        """Most bytes in use that keep to both limits; pages that go come back to the disk, or are used again."""
        return min(self.disk_budget or inf, self._above_floor)

    @property
    def limit(self) -> str:
        """The setting that sets `allowed`; empty without limits."""
        if self.allowed == inf:
            return ""
        return "store.min_free" if self._above_floor < (self.disk_budget or inf) else "store.disk_budget"

    @property
    def _above_floor(self) -> float:
        return self.in_use + self.reusable + self.free - self.min_free if self.min_free else inf


@dataclass(frozen=True, slots=True)
class Holding:
    """A segment, as far as its order among others goes."""

    id: str
    start: int
    sealed: bool
    codec: str
    stored_chunks: int


Session = list[Holding]
"""The segments of which a session is the warmest."""


@dataclass(frozen=True, slots=True)
class Sacrifice:
    """Segments that keep their first `chunks` chunks, go altogether (0), or are written anew with `codec`."""

    ids: tuple[str, ...]
    chunks: int = 0
    codec: str = ""


def grouped(
    ends: Sequence[Row],
    parents: Mapping[int, int],
    segments: Iterable[Row | Mapping[str, Any]],
    spared: Collection[int],
    owner: int | None,
    placing: str = "",
) -> list[list[Session]]:
    """Sessions by group, the coldest first, each as the segments that no warmer one reaches.

    Args:
        ends: of `queries.ENDS`: where each session's paths end.
        parents: of each message, by number.
        segments: of `queries.HOLDINGS`; one may be there several times, and is as warm as the warmest who has it.
        spared: sessions that are open.
        owner: the session that is written to.
        placing: the segment that is being written.
    """
    warmth = {row["session_id"]: _warmth(row, spared, owner) for row in ends}
    warmest: dict[int, Warmth] = {}
    # From the warmest down: whoever meets a message that is taken meets a warmer session's path to the root.
    for row in sorted(ends, key=lambda row: warmth[row["session_id"]], reverse=True):
        number = row["number"]
        while number is not None and number not in warmest:
            warmest[number] = warmth[row["session_id"]]
            number = parents.get(number)
    keys, found, sessions = dict[str, Warmth](), dict[str, Holding](), dict[Warmth, Session]()
    for each in segments:
        # A path that reaches a segment holds its first message.
        key = MINE if each["id"] == placing else warmest.get(each["number"], NOBODYS)
        keys[each["id"]] = max(key, keys.get(each["id"], key))
        one = Holding(each["id"], each["start_token"], each["kind"] == "sealed", each["codec"], each["stored_chunks"])
        found[each["id"]] = one
    for identity, one in found.items():
        sessions.setdefault(keys[identity], []).append(one)
    return [[sessions[key] for key in sorted(sessions) if key[0] == group] for group in (CLOSED, OPEN, WRITTEN)]


def _warmth(row: Row, spared: Collection[int], owner: int | None) -> Warmth:
    if row["session_id"] == owner:
        return MINE
    return OPEN if row["session_id"] in spared else CLOSED, row["updated"], row["session_id"]


def sacrifices(
    groups: Sequence[Sequence[Session]],
    held: Callable[[Session], Mapping[str, int]],
    rungs: Sequence[str] = (),
    placing: str = "",
) -> Iterator[Sacrifice]:
    """What goes, one after the other, until whoever asked has room.

    Args:
        groups: of `grouped`.
        held: the chunks of each segment of a session that memory would hold; one that it leaves out would hold one.
        rungs: codecs of step 3.
        placing: the segment that is being written: it goes before what its session has already.
    """
    for group, sessions in enumerate(groups):
        kept: dict[str, int] = {}
        for session in sessions:
            kept |= held(session)
            yield from _thin(session, {one.id: (kept.get(one.id, 1), one.stored_chunks) for one in session})
        for session in sessions:
            yield from _thin(session, {one.id: (1, min(one.stored_chunks, kept.get(one.id, 1))) for one in session})
        for rung in rungs if group == CLOSED else ():
            for session in sessions:
                yield from _recoded(session, rung)
        for session in sessions:
            ids = tuple(one.id for one in session)
            if placing in ids:
                yield Sacrifice((placing,))
            yield Sacrifice(ids)


@dataclass(frozen=True, slots=True)
class Step:
    """What one sacrifice does to one segment, and about the bytes that this frees."""

    id: str
    group: int
    chunks: int
    codec: str
    freed: int


def foreseen(
    planned: Iterable[Sacrifice], groups: Sequence[Sequence[Session]], sizes: Mapping[str, Sequence[int]], excess: float
) -> list[Step]:
    """The first of these sacrifices, until so many bytes are freed; `sizes`: of each segment's chunks."""
    group_of = {one.id: group for group, sessions in enumerate(groups) for some in sessions for one in some}
    codecs = {one.id: one.codec for sessions in groups for some in sessions for one in some}
    left, steps = {identity: [*some] for identity, some in sizes.items()}, list[Step]()
    for sacrifice in planned:
        if excess <= 0:
            break
        for identity in sacrifice.ids:
            chunks, before = left.get(identity, []), sum(left.get(identity, []))
            if sacrifice.codec:
                part = min(1.0, bits(sacrifice.codec) / (bits(codecs[identity]) or 1.0))
                left[identity], codecs[identity] = [int(part * size) for size in chunks], sacrifice.codec
            else:
                left[identity] = chunks[: sacrifice.chunks]
            freed = before - sum(left[identity])
            excess -= freed
            steps.append(Step(identity, group_of[identity], sacrifice.chunks, sacrifice.codec, freed))
    return steps


def _thin(session: Session, spans: Mapping[str, tuple[int, int]]) -> Iterator[Sacrifice]:
    """Chunk by chunk, the worst of all segments first; a span is how many chunks a segment keeps and has."""
    worst = [
        (-chunk, one.start, one.id)
        for one in session
        if one.sealed
        for chunk in range(max(1, spans[one.id][0]), spans[one.id][1])
    ]
    for chunk, _, identity in sorted(worst):
        yield Sacrifice((identity,), -chunk)


def _recoded(session: Session, rung: str) -> Iterator[Sacrifice]:
    """Segments above a rung, one by one; those for the archive together, for they share a basis with those in it."""
    above = tuple(one.id for one in session if one.sealed and bits(one.codec) > bits(rung))
    if rung == "archive":
        if above:
            yield Sacrifice(tuple(one.id for one in session if one.id in above or one.codec == rung), codec=rung)
        return
    for identity in above:
        yield Sacrifice((identity,), codec=rung)


def bits(codec: str) -> float:
    """Of an element, at most, in a segment of these codecs; 0 for one that is not known, which is left as it is."""
    return max(BITS.get(name, 0) for name in codec.split(","))
