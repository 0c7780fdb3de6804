"""What of a conversation's KV is in memory: held to its budget, taken back, let go.

All of it is a derivation: what is saved comes back from the store, the rest is computed from token ids. So where memory
runs out half-way through the layers, all is let go, which needs no memory, and the next restoring begins anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import TypeVar

from kvchat import memory
from kvchat.cache.gap import Gap
from kvchat.codecs import SegmentHeader
from kvchat.config import Config
from kvchat.errors import CodecError, OutOfMemory, StoreError
from kvchat.events import Notice
from kvchat.residence.catalogue import Entry, quoted, shifts
from kvchat.residence.loading import WHOLE, Part
from kvchat.residence.room import Cap
from kvchat.residence.sealing import Ranker
from kvchat.residence.wanting import Wanted, Wanting
from kvchat.store.records import turn_of
from kvchat.store.store import Message, SegmentRecord

Result = TypeVar("Result")


class Holding(Wanting):
    """The half of a `Residence` that fetches and computes nothing; what it has is described there."""

    ranker: Ranker
    fingerprint: str
    waiting: list[tuple[SegmentRecord, int]]
    asked_at: int
    num_computed: int
    notices: list[Notice]
    lacking: bool
    short = False
    """Whether segments are smaller than their budget, because there was no memory for them to grow."""
    _load_s: float | None

    def hold(self, path: Sequence[Message]) -> None:
        """Shrink, grow, bring and let go sealed segments, so that memory holds of each what it is to hold."""
        wanted = self._wanted(path)
        if any(self.saver.has(name) for name in self._coming(wanted)):
            # What is to come must be in the store; should it not get there, it stays as it is.
            with suppress(StoreError):
                self.notices += [event for event in self.saver.flush() if isinstance(event, Notice)]
            wanted = self._wanted(path)
        coming = self._coming(wanted)
        stay = {name: old for name, old in coming.items() if self.saver.has(name) or name in self.saver.superseded}
        damaged = list[int]()
        for chunks in self._steps(wanted._replace(chunks=wanted.chunks | stay)):
            damaged += [*self._arrive(chunks), *self._fit(chunks, wanted.parts)]
            if self.short:
                break
        for start in sorted({*damaged}, reverse=True):  # with one that is computed again all that follows goes
            self._lose(start, path)
        self.arrange()

    def _steps(self, wanted: Wanted) -> Iterator[dict[str, int]]:
        """The chunks that are wanted, or first fewer: so that copies of what comes keep to a limit of memory too.

        Where all at once would be too much, what is not wanted goes first, and what is comes a part at a time.
        """
        cap, coming = self.cap, self._coming(wanted)
        new = [(name, at) for name, old in coming.items() for at in range(old, wanted.chunks[name])]
        if cap is None or self._peak(cap, sum(wanted.costs[name][at] for name, at in new)) <= cap.units:
            yield wanted.chunks
            return
        chunks, more = wanted.chunks | coming, 0
        yield dict(chunks)
        for name, at in new:
            cost = wanted.costs[name][at]
            if more and self._peak(cap, more + cost) > cap.units:
                yield dict(chunks)
                more = 0
            chunks[name], more = at + 1, more + cost
        yield chunks

    def _peak(self, cap: Cap, more: int) -> int:
        """What all KV takes at most while so much more comes: as it is read, as it is joined, and a layer twice."""
        forms = [one.forms for one in self.cache.layers]
        layers = [sum(form.num_rows if cap.in_rows else form.plane_bytes for form in some) for some in forms]
        there = sum(layers) + self.cache.tail_length * cap.unit
        return int(there + 2 * more + (max(layers) + more // len(layers)) * 3 // 2)

    def _coming(self, wanted: Wanted) -> dict[str, int]:
        """Segments of which something must be read, and how many chunks are there of the tokens that are wanted."""
        there = {one.id: one.chunks for one in self.tiers.residents if one.part == wanted.parts.get(one.id, WHOLE)}
        return {name: there.get(name, 0) for name, count in wanted.chunks.items() if count > there.get(name, 0)}

    def _arrive(self, chunks: Mapping[str, int]) -> list[int]:
        """Have tiers know the segments of which something is to come; the starts of those that cannot be read."""
        there, damaged = {one.id for one in self.tiers.residents}, list[int]()
        for entry in self.known:
            if chunks[entry.id] and entry.id not in there:
                try:
                    self.tiers.know(self._resident(entry))
                except CodecError:
                    damaged.append(entry.start)
        return damaged

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
        there = {one.start: one for one in self.tiers.residents if one.chunks}
        back, plain = list[Entry](), list[Entry]()
        for entry in self.known:
            recalled = self.recalled.get(entry.start)
            again = {low for low, _ in recalled.spans} if recalled else set()
            for low, high in there[entry.start].stretches if entry.start in there else ():
                (back if low in again else plain).append(entry.stretch(low, high))
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
        self.known = [replace(one, end=position) if one.end > position else one for one in known]

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
        self.drop()
        self.engine.free()

    def drop(self) -> None:
        """`let_go` where memory has not run out: what else might hold some is not looked for, which takes long."""
        self.engine.forget(self.cache)
        self.cache.clear()
        self.tiers.residents, self.waiting, self.num_computed, self._load_s = [], [], 0, None
        self.known, self.offset, self.expected, self.recalled = [], 0, 0, {}

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
        wanted = self._wanted(path).chunks
        less = {one.id: min(one.chunks, wanted[one.id]) for one in self.tiers.residents}
        self._again(partial(self.tiers.hold, less), "making room")
        self.arrange()
        return True

    def _again(self, work: Callable[[], Result], doing: str) -> Result:
        return memory.again(work, self.spare, doing, self.engine.model.device)

    def _fit(self, chunks: Mapping[str, int], parts: Mapping[str, Part]) -> list[int]:
        """`Tiers.hold`; without memory for it segments stay smaller than wanted, until the next time.

        The starts of the segments of which chunks that were to come are damaged.
        """
        try:
            damaged = self._again(partial(self.tiers.hold, chunks, parts), "holding more of older turns")
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
