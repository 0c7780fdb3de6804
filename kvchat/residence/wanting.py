"""What memory is to hold of a conversation's segments, from what is known of them; nothing here fetches a row."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import accumulate, chain
from typing import NamedTuple

from kvchat.cache.pack import Spans
from kvchat.cache.ragged import SegmentedCache
from kvchat.cache.segment import Ranking
from kvchat.compress.allocate import chunks_held
from kvchat.config import Config
from kvchat.engine import Engine
from kvchat.errors import CodecError
from kvchat.residence.catalogue import Entry, Recalled
from kvchat.residence.loading import Part, Resident
from kvchat.residence.room import Cap, Room, chunks_wanted, fitting, recalls, without
from kvchat.residence.saving import Saver
from kvchat.residence.sealing import prefix_length, read_header
from kvchat.residence.tiers import Tiers
from kvchat.store.records import num_answered
from kvchat.store.store import Message, Store


class Wanted(NamedTuple):
    """What memory is to hold: of segments by their id how many chunks; of which tokens, where these are not all.

    costs: what each chunk takes (`Room.costs`), if there is a limit.
    """

    chunks: dict[str, int]
    parts: dict[str, Part]
    costs: dict[str, Sequence[int]]


class Wanting:
    """The part of a `Residence` that decides; what it has is described there."""

    store: Store
    engine: Engine
    config: Config
    cache: SegmentedCache
    tiers: Tiers
    saver: Saver
    known: list[Entry]
    recalled: dict[int, Recalled]
    expected: int
    offset: int

    # -- positions ---------------------------------------------------------------------------------------------------

    @staticmethod
    def ids(path: Sequence[Message]) -> list[int]:
        """Token ids of a path; the index of an id is its place."""
        return [*chain.from_iterable(message.token_ids for message in path)]

    @staticmethod
    def bounds(path: Sequence[Message]) -> list[int]:
        """Where each message begins, and, last, where the path ends: one more than there are messages."""
        return [0, *accumulate(len(message.token_ids) for message in path)]

    # -- the budget --------------------------------------------------------------------------------------------------

    def budgets(
        self, segments: Sequence[tuple[Ranking, int]], path: Sequence[Message], stored: Sequence[int] | None = None
    ) -> list[int]:
        """Chunks that `keep_ratio` gives segments, each given with the end of its use, of so many `stored` (None: all).

        The newest token is that of the newest message that does not wait for its answer.
        """
        most = [ranking.num_chunks for ranking, _ in segments] if stored is None else stored
        return chunks_held(self.config.compress, segments, most, self.bounds(path)[num_answered(path)])

    def _wanted(self, path: Sequence[Message]) -> Wanted:
        """What memory is to hold."""
        if not self.known:
            return Wanted({}, {}, {})
        newest, most, room = self.bounds(path)[num_answered(path)], self._most(), self._room(path)
        stands = self._standing(path, most, room)
        spans = dict(stands)
        for start, back in self.recalled.items():
            index = bisect_left(self.known, start, key=lambda entry: entry.start)
            spans[index] = tuple(
                sorted((*back.spans, *self._beside(self.known[index], stands.get(index), room.prefix)))
            )
        entries = [self._counted(entry, spans.get(index, ())) for index, entry in enumerate(self.known)]
        chunks = chunks_wanted(self.config.compress, entries, most, spans.keys(), newest, room, self.recalled)
        some = [(self.known[index], each) for index, each in spans.items() if each]
        parts = {one.id: Part(each) for one, each in some if each != ((one.start, one.end),)}
        costs = {} if room.units is None else {entry.id: room.costs(entry) for entry in entries}
        return Wanted({entry.id: count for entry, count in zip(self.known, chunks, strict=True)}, parts, costs)

    def _standing(self, path: Sequence[Message], most: Sequence[int], room: Room) -> dict[int, Spans]:
        """As `fitting` has it, of so many chunks that can be had of each."""
        near = self.bounds(path)[num_answered(path)] - self.config.compress.recent_tokens
        return fitting(self.known, most, room, near, recalls(path))

    def _beside(self, entry: Entry, stands: Spans | None, prefix: int) -> Spans:
        """What stays of a segment where it stands while some of it comes back: of a whole one only the prefix."""
        if stands is None:
            return ()
        whole = ((0, min(prefix, entry.end)),) if not entry.start else ()
        return without(stands or whole, self.recalled[entry.start].spans if entry.start in self.recalled else ())

    def _counted(self, entry: Entry, spans: Spans) -> Entry:
        """A segment with the pairs of these tokens, if they are not all."""
        back = self.recalled.get(entry.start)
        if not spans or (back and back.spans == spans):
            return back.entry if back else entry
        headers = [one.header for one in self.tiers.residents if one.id == entry.id]
        with suppress(CodecError):  # said when it is to come
            return entry.counted(headers[0] if headers else self._resident(entry).header, spans)
        return entry

    def _most(self) -> list[int]:
        """Chunks of each segment that can be had: never more than the store has."""
        held = {one.id: one.chunks for one in self.tiers.residents}
        found = self.store.stored_chunks([entry.id for entry in self.known])
        # Of what is gone from the store, or has another version there, memory keeps what it has.
        found |= {name: held.get(name, 0) for name in self.saver.superseded}
        found |= {entry.id: entry.num_chunks for entry in self.known if self.saver.has(entry.id)}
        return [0 if one.lost else found.get(one.id, held.get(one.id, one.stored)) for one in self.known]

    def _room(self, path: Sequence[Message]) -> Room:
        """What sealed segments may take beside the tail and what comes next."""
        end, cap, step = self.known[-1].end, self.cap, max(1, self.engine.model.context_window // 16)
        room = Room(end - self.offset, self.prefix(path), step)
        if cap is None:
            return room
        reserved = max(0, self.cache.num_seen - end) + max(self.expected, cap.reserve)
        turned = not self.cache.encoded and self.engine.anatomy.turns
        return replace(room, units=max(0, cap.units - reserved * cap.unit), in_rows=cap.in_rows, turned=turned)

    def prefix(self, path: Sequence[Message]) -> int:
        """Tokens at the beginning of the conversation that stay whatever goes: the system prompt, or else the sinks.

        Of a system prompt that leaves too little room only the beginning stays.
        """
        whole = prefix_length(path, self.config.compress.num_sink_tokens) if path else 0
        return min(whole, self.engine.model.context_window // 2)

    @property
    def cap(self) -> Cap | None:
        """What all KV in memory may take, if there is a limit."""
        return Cap.of(self.config.compress, self.engine.model)

    def _resident(self, entry: Entry) -> Resident:
        """A stored segment, nothing of which is in memory. Raises CodecError."""
        record = self.store.segment(entry.id)
        if record is None:
            raise CodecError(f"segment {entry.id} is gone")
        return Resident(entry.id, read_header(record, self.engine.model), entry.end, 0)
