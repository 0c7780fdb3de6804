"""Segments as `utility.py` weighs them, and what would be decided for all stored sessions now."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial

from kvchat.bandwidths import Bandwidths
from kvchat.codecs import SegmentHeader
from kvchat.config import Config
from kvchat.errors import CodecError, StoreDamaged
from kvchat.fingerprint import fingerprint_id
from kvchat.residence.catalogue import Entry
from kvchat.residence.tiers import would_hold
from kvchat.store.records import SegmentRecord
from kvchat.store.shed import BITS, Step, bits
from kvchat.store.store import SessionInfo, Store
from kvchat.utility import HOST, MEMORY, TAU_S, Chunk, Context, Decision, Place, Ranked, make_room, qualities

COARSE = "k4v4"
"""What a segment in raw or k8v8 may be written anew with, once."""
COARSER = {"raw": 0.997, "k8v8": 0.997}
"""What is then left of its quality: 4 bits cost a mean KL of 0.003, a sixtieth of what half the score mass costs."""

WHOSE = ("the sessions that nobody has open", "those that are open", "those that are written to")
"""The groups of `shed.py`."""


@dataclass(frozen=True, slots=True)
class Figures:
    """A segment of which no header is at hand: what of a `Ranking` counts, and bytes of all its rows and frames."""

    name: str
    tokens: int
    sizes: Sequence[int]
    scores: Sequence[float] | None
    method: str
    codec: str
    rows: int
    frames: int


def contexts_of(segments: Sequence[Figures], frequencies: Sequence[float]) -> list[Context]:
    """The segments of one session, each with how often it is used."""
    ranked: Sequence[Ranked] = segments
    contexts = []
    for one, quality, frequency in zip(segments, qualities(ranked), frequencies, strict=True):
        whole = max(1, sum(map(int, one.sizes)))
        parts = [int(size) / whole for size in one.sizes]
        chunks = tuple(
            Chunk(worth, int(part * one.rows), int(part * one.frames))
            for worth, part in zip(quality, parts, strict=True)
        )
        contexts.append(Context(one.name, one.tokens, frequency, chunks, coarser(one.codec)))
    return contexts


def coarser(codec: str) -> tuple[float, float] | None:
    """The parts of bytes and of quality that a segment of that codec keeps in COARSE; None if it is not written so."""
    return (BITS[COARSE] / bits(codec), COARSER[codec]) if codec in COARSER else None


def of_entry(entry: Entry, session: str, frames: int | None, pairs: int) -> Figures:
    """A segment of an open session, whose frames take so many bytes; None: they are not in the store yet.

    Of one that is used in part, only the rows of its first tokens, of so many `pairs` each, are in memory.
    """
    name, sizes = f"{session} {entry.start}-{entry.end}", entry.sizes.tolist()
    rows = sum(entry.nbytes) * entry.length * pairs // max(entry.length * pairs, sum(sizes))
    return Figures(name, entry.length, sizes, entry.scores, entry.method, "", rows, rows if frames is None else frames)


def of_record(record: SegmentRecord, session: str) -> Figures:
    """A sealed segment as the store has it. Raises CodecError."""
    header = SegmentHeader.of(record)
    ranking = header.ranking
    sizes = ranking.sizes.tolist()
    name = f"{session} {record.start}-{record.end}"
    rows = sum(sizes) * 2 * header.head_dim * header.dtype.itemsize
    whole = record.nbytes * sum(sizes) // max(1, sum(sizes[: record.stored_chunks]))
    return Figures(name, record.end - record.start, sizes, ranking.scores, ranking.method, record.codec, rows, whole)


@dataclass(frozen=True, slots=True)
class Shed:
    """What one segment gives of the disk."""

    name: str
    step: Step

    def __str__(self) -> str:
        return (
            f"{self.name}: {self._what()}: frees {self.step.freed / 1e6:.2f} MB of disk, "
            f"of {WHOSE[self.step.group]} the one not used for longest"
        )

    def _what(self) -> str:
        if self.step.codec:
            return f"written with fewer bits ({self.step.codec})"
        return f"chunks from {self.step.chunks + 1} on are given up" if self.step.chunks else "only text is left"


def would_decide(store: Store, config: Config, costs: Bandwidths | None = None) -> list[Decision | Shed]:
    """What gives way if all stored sessions were opened now, with the limits that are set; nothing without any.

    Memory and host memory go by utility; the disk in the order of `shed.py`, for only who has used sessions knows how
    often, and what loading takes, and none of that is in the store.
    """
    caps, rates = limits(config), (costs or Bandwidths()).costs()
    contexts, places, names, seen = list[Context](), list[Place](), dict[str, str](), set[str]()
    for info in store.sessions():
        with suppress(StoreDamaged):
            for context, place in _stored(store, info, config, seen, names):
                contexts.append(context)
                places.append(place)
    # What is open gives nothing up, and comes back whole; only the disk's limit takes something away.
    _, decisions = make_room(contexts, places, caps, rates, moving=True)
    return [*decisions, *_shed(store, config, names)]


def _shed(store: Store, config: Config, names: Mapping[str, str]) -> list[Shed]:
    """What the disk's limits take away, of segments by their names; the others are of branches that were left."""
    held = partial(would_hold, config.compress)
    allowance = replace(
        store.allowance, disk_budget=config.store.disk_budget, min_free=config.store.min_free, held=held
    )
    steps = store.would_shed(allowance) if allowance.limited else []
    return [Shed(names.get(step.id, f"a branch, segment {step.id[-8:]}"), step) for step in steps]


def limits(config: Config) -> Mapping[int, float]:
    """Most bytes of memory and of host memory, as far as there is a limit."""
    caps = {MEMORY: config.model.memory_budget, HOST: config.store.host_cache}
    return {tier: float(cap) for tier, cap in caps.items() if cap or tier == HOST}


def _stored(
    store: Store, info: SessionInfo, config: Config, seen: set[str], names: dict[str, str]
) -> Iterable[tuple[Context, Place]]:
    """A session's sealed segments, held as they would be if it were open.

    seen: segments of which other sessions have the frames already; these are there once.
    names: gets what segments are called, by the id of those that have the frames.
    """
    cover = store.cover([message.id for message in store.path(info.tip)], fingerprint_id(info.fingerprint))
    for record, _ in cover:
        names.setdefault(record.frames_of or record.id, f"{info.name} {record.start}-{record.end}")
    records = [record for record, _ in cover if record.kind == "sealed"]
    held = would_hold(config.compress, records, info.num_tokens)
    known, places = list[Figures](), list[Place]()
    for record, chunks in zip(records, held, strict=True):
        with suppress(CodecError):
            figures = of_record(record, info.name)
            known.append(replace(figures, frames=0) if record.id in seen else figures)
            seen.add(record.id)
            places.append(Place(min(chunks, record.stored_chunks), record.stored_chunks, record.stored_chunks))
    age_s = (datetime.now(UTC) - datetime.fromisoformat(info.updated)).total_seconds()
    frequency = math.exp(-max(0.0, age_s) / TAU_S)
    return zip(contexts_of(known, [frequency] * len(known)), places, strict=True)
