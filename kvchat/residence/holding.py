"""What of a conversation's KV is in memory: held to its budget, taken back, let go.

All of it is a derivation: what is saved comes back from the store, the rest is computed from token ids. So where memory
runs out half-way through the layers, all is let go, which needs no memory, and the next restoring begins anew.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import accumulate, chain
from typing import TypeVar

from kvchat import memory
from kvchat.cache.gap import Gap
from kvchat.cache.ragged import SegmentedCache
from kvchat.cache.segment import Ranking
from kvchat.codecs import SegmentHeader
from kvchat.compress.allocate import chunks_held
from kvchat.config import Config
from kvchat.engine import Engine
from kvchat.errors import CodecError, OutOfMemory, StoreError
from kvchat.events import Notice
from kvchat.residence.catalogue import Entry, Recalled, quoted, shifts
from kvchat.residence.loading import Resident
from kvchat.residence.room import Cap, Room, recalls, wanted
from kvchat.residence.saving import Saver
from kvchat.residence.sealing import Ranker, read_header
from kvchat.residence.tiers import Tiers
from kvchat.store.records import num_answered, turn_of
from kvchat.store.store import Message, SegmentRecord, Store

Result = TypeVar("Result")


class Holding:
    """The half of a `Residence` that fetches and computes nothing; what it has is described there."""

    store: Store
    engine: Engine
    config: Config
    ranker: Ranker
    cache: SegmentedCache
    tiers: Tiers
    saver: Saver
    fingerprint: str
    waiting: list[tuple[SegmentRecord, int]]
    known: list[Entry]
    recalled: dict[int, Recalled]
    expected: int
    asked_at: int
    offset: int
    num_computed: int
    notices: list[Notice]
    lacking: bool
    short = False
    """Whether segments are smaller than their budget, because there was no memory for them to grow."""
    _load_s: float | None

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

    def _wanted(self, path: Sequence[Message]) -> dict[str, int]:
        """Chunks that memory is to hold of every segment, by its id."""
        if not self.known:
            return {}
        newest = self.bounds(path)[num_answered(path)]
        entries = [self.recalled[one.start].entry if one.start in self.recalled else one for one in self.known]
        chunks = wanted(self.config.compress, entries, self._most(), newest, self._room(), self.recalled, recalls(path))
        return {entry.id: count for entry, count in zip(entries, chunks, strict=True)}

    def _most(self) -> list[int]:
        """Chunks of each segment that can be had: never more than the store has."""
        held = {one.id: one.chunks for one in self.tiers.residents}
        found = self.store.stored_chunks([entry.id for entry in self.known])
        # Of what is gone from the store, or has another version there, memory keeps what it has.
        found |= {name: held.get(name, 0) for name in self.saver.superseded}
        found |= {entry.id: entry.num_chunks for entry in self.known if self.saver.has(entry.id)}
        return [0 if one.lost else found.get(one.id, held.get(one.id, one.stored)) for one in self.known]

    def _room(self) -> Room:
        """What sealed segments may take beside the tail and what comes next."""
        end, cap = self.known[-1].end, self.cap
        span = end - self.offset
        if cap is None:
            return Room(span)
        reserved = max(0, self.cache.num_seen - end) + max(self.expected, cap.reserve)
        return Room(span, max(0, cap.units - reserved * cap.unit), cap.in_rows)

    @property
    def cap(self) -> Cap | None:
        """What all KV in memory may take, if there is a limit."""
        return Cap.of(self.config.compress, self.engine.model)

    def hold(self, path: Sequence[Message]) -> None:
        """Shrink, grow, bring and let go sealed segments, so that memory holds of each what it is to hold."""
        wanted, held = self._wanted(path), {one.id: one.chunks for one in self.tiers.residents}
        if any(count > held.get(name, 0) and self.saver.has(name) for name, count in wanted.items()):
            # What is to grow must be in the store; should it not get there, it stays as it is.
            with suppress(StoreError):
                self.notices += [event for event in self.saver.flush() if isinstance(event, Notice)]
            wanted = self._wanted(path)
            still = {name for name in wanted if self.saver.has(name)}
            wanted |= {name: min(wanted[name], held.get(name, 0)) for name in still}
        for start in [*self._arrive(wanted), *self._fit(wanted)]:
            self._lose(start, path)
        self.arrange()

    def _arrive(self, wanted: dict[str, int]) -> list[int]:
        """Have tiers know the segments of which something is to come; the starts of those that cannot be read."""
        there, damaged = {one.id for one in self.tiers.residents}, list[int]()
        for entry in self.known:
            if wanted[entry.id] and entry.id not in there:
                try:
                    self.tiers.know(self._resident(entry))
                except CodecError:
                    damaged.append(entry.start)
        return damaged

    def _resident(self, entry: Entry) -> Resident:
        """A stored segment, nothing of which is in memory. Raises CodecError."""
        record = self.store.segment(entry.id)
        if record is None:
            raise CodecError(f"segment {entry.id} is gone")
        return Resident(entry.id, read_header(record, self.engine.model), entry.end, 0)

    def _lose(self, start: int, path: Sequence[Message]) -> None:
        """A segment is damaged: compute it and what follows again, or, if that is too long ago, go on without it."""
        entry = next(one for one in self.known if one.start == start)
        removed = self._drop(entry.id)
        turn = turn_of(path, self.bounds(path).index(start))
        self.recalled.pop(start, None)  # it does not come
        if self.offset and entry is not self.known[0]:
            self.known = [replace(one, lost=True) if one is entry else one for one in self.known]
            self.tiers.forget(start)
            self.notices.append(Notice(f"saved KV from turn {turn} on is damaged and {removed}; its text is kept"))
            return
        self.lacking = True
        self.notices.append(Notice(f"saved KV from turn {turn} on is damaged and {removed}; it is computed again"))
        self.cut(min(start, self.cache.num_seen))

    # -- positions that the network sees -----------------------------------------------------------------------------

    def arrange(self) -> None:
        """Have the network see segments and tail where they are to stand: what is recalled right before the question.

        Distance counts: told again there, a turn is answered from as if nothing had come after it; where it stood, not.
        """
        there = {one.start for one in self.tiers.residents if one.chunks}
        back = [self.recalled[start] for start in sorted(self.recalled) if start in there]
        plain = [entry for entry in self.known if entry.start in there and entry.start not in self.recalled]
        turned = shifts(plain, self.offset) | quoted(back, self.asked_at - self.offset)
        # The tail of some layers may be turned already: that cannot be tried again.
        work = partial(self.cache.arrange, turned, self.offset, Gap(self.asked_at, sum(one.length for one in back)))
        memory.again(work, self._let_go_for_good, "moving turns to other positions", self.engine.model.device)

    def crop(self, path: Sequence[Message]) -> None:
        """Forget what lies beyond the end of the path."""
        with suppress(OutOfMemory):  # all was let go
            if self._load_s is not None:
                self.cut(min(self.bounds(path)[-1], self.cache.num_seen))
                if self.offset and self.offset != self._saved_offset():  # turned once already, from where it was
                    self.let_go()
                    return
                self.hold(path)

    def _saved_offset(self) -> int:
        """That of the newest segment."""
        newest = [record for record, _ in self.waiting[-1:]]
        if newest:
            return SegmentHeader.of(newest[0]).ranking.next_offset
        return self.known[-1].onward if self.known else 0

    def cut(self, position: int) -> None:
        """Forget every token from `position` on, and all of a segment from a file: `Store.cover` gives none in part."""
        split = [one.start for one in self.known if one.from_file and one.start < position < one.end]
        split += [one.start for one, end in self.waiting if one.from_file and one.start < position < end]
        self._crop(position := min([position, *split]))
        self.waiting = [(record, min(used, position)) for record, used in self.waiting if record.start < position]
        known = [entry for entry in self.known if entry.start < position]
        self.known = [replace(one, end=position, whole=False) if one.end > position else one for one in known]

    def _drop(self, segment_id: str) -> str:
        """Remove a damaged segment, and one whose frames it has; what became of it.

        It may lie in a page that nothing can be removed from.
        """
        try:
            found = self.store.segment(segment_id)
            self.store.drop_segment(found.frames_of if found and found.frames_of else segment_id)
        except StoreError as error:
            return f"cannot be removed ({error})"
        return "removed"

    def configure(self, config: Config, path: Sequence[Message]) -> None:
        """Go on with other settings of `compress` and `codec`. Raises ConfigError, InputError; nothing changes then."""
        self._adopt(config, Ranker(self.engine.model, config.compress))
        if self._load_s is not None:
            self.hold(path)

    def _adopt(self, config: Config, ranker: Ranker) -> None:
        """Rank new segments so."""
        self.config, self.ranker, self.cache.marks = config, ranker, ranker.marks()

    # -- when memory runs out ----------------------------------------------------------------------------------------

    def let_go(self) -> None:
        """Forget all KV in memory, whatever state it is in; the next restoring brings back what is saved."""
        self.cache.clear()
        self.tiers.residents, self.waiting, self.num_computed, self._load_s = [], [], 0, None
        self.known, self.offset, self.expected, self.recalled = [], 0, 0, {}
        self.engine.free()

    def _let_go_for_good(self) -> bool:
        """`let_go`, after which what failed is not tried again."""
        self.let_go()
        return False

    def _let_go_sealed(self, path: Sequence[Message]) -> bool:
        """Let all go if the tail has exactly what the store has sealed: to go on from that would be another state."""
        covered = self.store.cover([message.id for message in path], self.fingerprint)
        if sealed := any(one.kind == "sealed" and one.start >= self.cache.tail_start for one, _ in covered):
            self.let_go()
        return sealed

    def spare(self) -> bool:
        """After memory ran out: let go what can be made again, or all if layers differ; False: nothing is restored."""
        self.engine.free()
        if not self.cache.is_whole:
            with memory.Attempt():
                self.cache.keep(frozenset.intersection(*(layer.pieces for layer in self.cache.layers)))
        if self._load_s is None or not self.cache.is_whole:
            self.let_go()
            return False
        return True

    def spare_more(self, path: Sequence[Message]) -> bool:
        """As `spare`, and of sealed segments what they hold beyond their budget on `path`."""
        if not self.spare():
            return False
        wanted = self._wanted(path)
        less = {one.id: min(one.chunks, wanted[one.id]) for one in self.tiers.residents}
        self._again(partial(self.tiers.hold, less), "making room")
        self.arrange()
        return True

    def _again(self, work: Callable[[], Result], doing: str) -> Result:
        return memory.again(work, self.spare, doing, self.engine.model.device)

    def _fit(self, wanted: dict[str, int]) -> list[int]:
        """`Tiers.hold`; without memory for it segments stay smaller than wanted, until the next time.

        The starts of the segments of which chunks that were to come are damaged.
        """
        try:
            parts = {one.entry.id: one.part for one in self.recalled.values()}
            damaged = self._again(partial(self.tiers.hold, wanted, parts), "holding more of older turns")
        except OutOfMemory as error:
            if not self.tiers.is_tidy:
                self.let_go()
            if self._load_s is None:
                raise
            if not self.short:
                self.notices.append(Notice(f"less of older turns is held than compress.keep_ratio asks for: {error}"))
            self.short = True
            return []
        self.short = False
        return [one.start for one in damaged]

    def _crop(self, position: int) -> None:
        """Forget every token from `position` on; if there is no memory for that, all, which is OutOfMemory."""
        try:
            self._again(partial(self.tiers.crop, position), "taking turns back")
        except OutOfMemory:
            self.let_go()
            raise
