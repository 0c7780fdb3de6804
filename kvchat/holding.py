"""What of a conversation's KV is in memory: held to its budget, taken back, let go.

All of it is a derivation: what is saved comes back from the store, the rest is computed from token ids. So where memory
runs out half-way through the layers, all is let go, which needs no memory, and the next restoring begins anew.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import accumulate
from typing import TypeVar

from kvchat import memory
from kvchat.cache.ragged import SegmentedCache
from kvchat.cache.segment import Ranking
from kvchat.compress.allocate import chunks_held
from kvchat.config import Config
from kvchat.engine import Engine
from kvchat.errors import OutOfMemory, StoreError
from kvchat.events import Notice
from kvchat.loading import Resident
from kvchat.records import num_answered, turn_of
from kvchat.saving import Saver
from kvchat.sealing import Ranker
from kvchat.store import Message, SegmentRecord, Store
from kvchat.tiers import Tiers

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
    num_computed: int
    notices: list[Notice]
    lacking: bool
    short = False
    """Whether segments are smaller than their budget, because there was no memory for them to grow."""
    _load_s: float | None

    # -- positions ---------------------------------------------------------------------------------------------------

    @staticmethod
    def ids(path: Sequence[Message]) -> list[int]:
        """Token ids of a path; the index of an id is its position."""
        return [token for message in path for token in message.token_ids]

    @staticmethod
    def bounds(path: Sequence[Message]) -> list[int]:
        """Where each message begins, and, last, where the path ends: one more than there are messages."""
        return [0, *accumulate(len(message.token_ids) for message in path)]

    # -- the budget --------------------------------------------------------------------------------------------------

    def budgets(
        self, segments: Sequence[tuple[Ranking, int]], path: Sequence[Message], stored: Sequence[int] | None = None
    ) -> list[int]:
        """Chunks that memory holds of segments, each given with the end of its use, of so many `stored` (None: all).

        The newest token is that of the newest message that does not wait for its answer.
        """
        most = [ranking.num_chunks for ranking, _ in segments] if stored is None else stored
        return chunks_held(self.config.compress, segments, most, self.bounds(path)[num_answered(path)])

    def _sized(self, residents: Sequence[Resident], path: Sequence[Message]) -> list[Resident]:
        """The residents with as many chunks as the budget gives them together; never more than the store has."""
        found = self.store.stored_chunks([one.id for one in residents])
        # Of what is gone from the store, or has another version there, memory keeps what it has.
        found |= {one.id: one.chunks for one in residents if one.id in self.saver.superseded}
        found |= {one.id: one.header.ranking.num_chunks for one in residents if self.saver.has(one.id)}
        stored = [found.get(one.id, one.chunks) for one in residents]
        chunks = self.budgets([(one.header.ranking, one.end) for one in residents], path, stored)
        return [replace(one, chunks=count) for one, count in zip(residents, chunks, strict=True)]

    def hold(self, path: Sequence[Message]) -> None:
        """Shrink and grow the sealed segments to what the budget gives each."""
        wanted = {one.id: one.chunks for one in self._sized(self.tiers.residents, path)}
        if any(self.saver.has(one.id) and wanted[one.id] > one.chunks for one in self.tiers.residents):
            # What is to grow must be in the store; should it not get there, it stays as it is.
            with suppress(StoreError):
                self.notices += [event for event in self.saver.flush() if isinstance(event, Notice)]
            wanted = {one.id: one.chunks for one in self._sized(self.tiers.residents, path)}
            still = {one.id: one.chunks for one in self.tiers.residents if self.saver.has(one.id)}
            wanted |= {name: min(chunks, wanted[name]) for name, chunks in still.items()}
        for one in self._fit(wanted):
            removed = self._drop(one.id)
            self.lacking = True
            turn = turn_of(path, self.bounds(path).index(one.start))
            self.notices.append(Notice(f"saved KV from turn {turn} on is damaged and {removed}; it is computed again"))
            self.cut(min(one.start, self.cache.num_seen))

    def crop(self, path: Sequence[Message]) -> None:
        """Forget what lies beyond the end of the path."""
        with suppress(OutOfMemory):  # all was let go
            if self._load_s is not None:
                self.cut(min(self.bounds(path)[-1], self.cache.num_seen))
                self.hold(path)

    def cut(self, position: int) -> None:
        """Forget every token from `position` on, and all of a segment from a file: `Store.cover` gives none in part."""
        split = [one.start for one in self.tiers.residents if one.from_file and one.start < position < one.end]
        split += [one.start for one, end in self.waiting if one.from_file and one.start < position < end]
        self._crop(position := min([position, *split]))
        self.waiting = [(record, min(used, position)) for record, used in self.waiting if record.start < position]

    def _drop(self, segment_id: str) -> str:
        """Remove a damaged segment; what became of it. It may lie in a page that nothing can be removed from."""
        try:
            self.store.drop_segment(segment_id)
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
        self.engine.free()

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
        held = {one.id: one.chunks for one in self.tiers.residents}
        wanted = {one.id: min(one.chunks, held[one.id]) for one in self._sized(self.tiers.residents, path)}
        self._again(partial(self.tiers.hold, wanted), "making room")
        return True

    def _again(self, work: Callable[[], Result], doing: str) -> Result:
        return memory.again(work, self.spare, doing, self.engine.model.device)

    def _fit(self, wanted: dict[str, int]) -> list[Resident]:
        """`Tiers.hold`; without memory for it segments stay smaller than wanted, until the next time."""
        try:
            damaged = self._again(partial(self.tiers.hold, wanted), "holding more of older turns")
        except OutOfMemory as error:
            if self._load_s is None:
                raise
            if not self.short:
                self.notices.append(Notice(f"less of older turns is held than compress.keep_ratio asks for: {error}"))
            self.short = True
            return []
        self.short = False
        return damaged

    def _crop(self, position: int) -> None:
        """Forget every token from `position` on; if there is no memory for that, all, which is OutOfMemory."""
        try:
            self._again(partial(self.tiers.crop, position), "taking turns back")
        except OutOfMemory:
            self.let_go()
            raise
