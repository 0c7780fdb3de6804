"""The KV of one conversation: restored from segments, computed from ids where there are none, sealed, saved, held.

Positions 0 .. num_seen are covered by sealed segments and then by the tail, in which finished turns wait until a
segment has enough tokens. Waiting turns are saved exactly ("open" segments); sealing replaces them. A sealed segment is
in memory at once, and in the store when there is time or whoever asks looks there (`save`). A segment that is missing
or damaged is a miss: said, removed, computed again.
"""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Generator, Sequence
from concurrent.futures import Executor
from dataclasses import replace
from functools import partial

from torch import Tensor

from kvchat.cache.segment import Ranking
from kvchat.codecs.encode import Reading, read_segment
from kvchat.compress.compressor import codecs_for
from kvchat.config import Config
from kvchat.engine import Engine, Stop
from kvchat.errors import CodecError, OutOfMemory, StoreDamaged, UnknownCodec
from kvchat.events import Notice, Phase, Progress
from kvchat.fingerprint import fingerprint_id
from kvchat.memory import trim, twice
from kvchat.residence.catalogue import Entry, Recalled
from kvchat.residence.loading import Resident
from kvchat.residence.restoring import Restoring
from kvchat.residence.restoring import Steps as Steps
from kvchat.residence.saving import Saver, Saving, sealed_layers
from kvchat.residence.sealing import Ranker, rank_turns, read_header
from kvchat.residence.tiers import Tiers
from kvchat.store.records import num_answered
from kvchat.store.store import Message, SegmentRecord, Store

MOST_DAMAGED = 8
"""Damaged segments that one question may meet."""


class Residence(Restoring):
    """The cache of one conversation and its segments in the store.

    Methods take the conversation's path, which only ever grows at its end or is cut (`crop`).

    Args:
        store: used from this thread alone.
        engine: the model.
        config: all settings.
        pool: threads that decode and pack frames.
        session_id: the stored session, which gives way last when the disk is full; None: it is as any other.

    Raises:
        ConfigError, InputError: segments cannot be ranked as `compress` asks.
    """

    def __init__(
        self, store: Store, engine: Engine, config: Config, pool: Executor, session_id: int | None = None
    ) -> None:
        self.store = store
        self.engine = engine
        self.cache = engine.new_cache()
        self.pool = pool
        self.tiers = Tiers(self.cache, store.readings, pool)
        self.fingerprint = fingerprint_id(engine.model.fingerprint)
        self.saver = Saver(store, self.fingerprint, session_id, pool)
        self._adopt(config, Ranker(engine.model, config.compress))
        self.known: list[Entry] = []
        """All sealed segments, up to the tail."""
        self.recalled: dict[int, Recalled] = {}
        """What comes back of segments that the question at hand concerns, by start, the most relevant first."""
        self.asked_at = 0
        """The place before which it comes back."""
        self.expected = 0
        """Tokens that are computed next, for which a limit of memory is to leave room."""
        self.offset = 0
        """By how much positions are to be smaller than places; see `SegmentedCache`."""
        self.waiting: list[tuple[SegmentRecord, int]] = []
        """Open segments that cover parts of the tail, each with one past the last position that is in use."""
        self.num_computed = 0
        """Tokens computed again since the last turn because no segment had them."""
        self.notices: list[Notice] = []
        """What went wrong where nobody could be told."""
        self.lacking = False
        """The store did not have all of the path; see `mend`."""
        self._load_s: float | None = None

    # -- positions ---------------------------------------------------------------------------------------------------

    @property
    def num_reused(self) -> int:
        """Tokens in the cache that were not computed for the running turn."""
        return self.cache.num_seen - self.num_computed

    @property
    def num_saved(self) -> int:
        """Tokens from the first on that have a segment, sealed or waiting; the KV of those after them is unsaved."""
        saved = self.cache.tail_start
        for waiting, end in self.waiting:
            saved = end if waiting.start == saved else saved
        return saved

    def take_load_s(self) -> float:
        """Seconds that restoring took, reported once; it also ends the turn's count of computed tokens."""
        seconds, self._load_s, self.num_computed = self._load_s or 0.0, 0.0, 0
        return seconds

    # -- computing ---------------------------------------------------------------------------------------------------

    def mend(self, path: Sequence[Message], stop: Stop) -> Steps:
        """Compute and save what the store did not have, until `stop`."""
        if not self.lacking or self._load_s is None:
            return
        answered = num_answered(path)
        yield from self.catch_up(path, answered, "rebuild", stop)
        if self.cache.num_seen >= self.bounds(path)[answered]:
            self.lacking = False
            yield from self.settle(path)
            yield from self.save(stop)

    def catch_up(self, path: Sequence[Message], last: int, phase: Phase, stop: Stop) -> Steps:
        """Compute the KV of messages before index `last` that the cache does not stand for, sealing on the way."""
        bounds, ids, before = self.bounds(path), self.ids(path), self.cache.num_seen
        if before > bounds[-1]:  # a reply that was interrupted before its first token
            self.cut(bounds[-1])
        for index in range(1, last + 1):
            long = bounds[index] - self.cache.tail_start >= self._segment_min
            most = self.longest(self.cache.num_seen, path)
            ends = index == last or bounds[index + 1] - self.cache.num_seen > most
            # Short messages are computed together: one pass over many tokens is far quicker than many passes.
            if bounds[index] <= self.cache.num_seen or not (long or ends):
                continue
            yield from self.make_room(path[:index], bounds[index] - self.cache.num_seen)
            yield from self.prefill(ids, bounds[index], phase, stop)
            if self.cache.num_seen < bounds[index]:
                break
            if long:
                yield from self._sealed(path, index)
                if phase != "seal":  # what much text is made of need not pile up: no turn waits to begin
                    yield from self.saver.flush(most=1)
        self.num_computed += max(0, self.cache.num_seen - before)

    def prepare(self, path: Sequence[Message], stop: Stop) -> Steps:
        """Have all KV before the path's last message, a question, and what of it the question concerns.

        Damage may lie where nothing can be removed from: once it was met MOST_DAMAGED times nothing is brought back.
        A question that was answered already is forgotten if anything might come back, which stands before it.
        """
        for left in range(MOST_DAMAGED, -1, -1):
            yield from self.restore(path)
            yield from self.tell()
            yield from self.catch_up(path, len(path) - 1, "rebuild", stop)
            seen = min(self.cache.num_seen, self.bounds(path)[-2])
            if left:
                yield from self.recall(path)
            if self.cache.num_seen >= seen:
                return
            self.let_go()  # what was to come is damaged: begin anew with what the store has left

    def prefill(
        self, ids: Sequence[int], end: int, phase: Phase, stop: Stop
    ) -> Generator[Progress | Notice, None, Tensor | None]:
        """Compute KV up to place `end`; the last token's logits, or None if stopped before it."""
        start = self.cache.num_seen
        running = self.engine.prefill(self.cache, ids[start:end], stop)
        while True:
            try:
                yield Progress(phase, start + next(running), end)
            except StopIteration as finished:
                logits: Tensor | None = finished.value
                return logits

    def seal_up_to(self, path: Sequence[Message], last: int, phase: Phase, stop: Stop) -> Steps:
        """Compute what the cache does not stand for before message `last` and seal it, however short it is.

        What comes next then begins a segment, unless it was stopped, or the tail stays as it is for want of room.
        """
        end, before = self.bounds(path)[last], self.cache.num_seen
        if before < end:
            yield from self.make_room(path[:last], end - before)
            yield from self.prefill(self.ids(path), end, phase, stop)
        if self.cache.tail_start < end <= self.cache.num_seen:
            yield from self._sealed(path, last)
        self.num_computed += max(0, self.cache.num_seen - before)

    def borrow(
        self, source: SegmentRecord, path: Sequence[Message], first: int, last: int
    ) -> Generator[Progress | Notice, None, bool]:
        """Have messages [first, last) of the path from a stored segment of the same tokens, said elsewhere.

        Nothing is computed: its keys are turned to where these messages stand. False, and nothing done, if the cache
        does not end right before them, keys cannot be turned, or the segment is damaged or gone.
        """
        bounds, messages = self.bounds(path), [message.id for message in path[first:last]]
        start, tokens = bounds[first], bounds[last] - bounds[first]
        if self.cache.num_seen != start or self.cache.tail_length:
            return False
        yield from self.make_room(path[:last], tokens)
        record: SegmentRecord | None = source
        try:
            position = read_header(source, self.engine.model).ranking.position
            if list(source.messages) != messages:
                if start - self.offset != position and not self.engine.anatomy.turns:
                    return False
                record = self.store.put_alias(source, messages, start, start - position, self.offset)
            if record is None:
                return False
            self._attach(record, last - first, path[:last])
        except OutOfMemory:
            self.let_go()
            raise
        except CodecError as error:
            removed = self._drop(source.id)
            yield Notice(f"a saved part is damaged and {removed}; it is computed again: {error}")
            return False
        if self.known[-1].onward != self.offset:  # the store had it already, from a session that stood elsewhere
            self.saver.superseded.add(record.id)
        self.hold(path[:last])
        return True

    # -- after a turn ------------------------------------------------------------------------------------------------

    def settle(self, path: Sequence[Message]) -> Steps:
        """After a turn: seal what is long enough, save the rest, hold the budget. What is sealed, `save` writes."""
        recalled, self.recalled, self.expected = self.recalled, {}, 0
        if recalled:  # what a question brought back leaves with its answer
            self.hold(path[:-1])
        if self.cache.num_seen < self.num_saved:  # an answer's rows did not come back
            self.let_go()
        if not path or (path[-1].role == "user" and self.cache.num_seen < self.bounds(path)[-1]):
            self.hold(path)
            return  # interrupted while prefilling: the rest is computed when the question is answered
        if len(path) > 1 and self.cache.num_seen < self.bounds(path)[-2]:
            yield from self._save_waiting(path)
            self.hold(path)
            return  # stopped while taking much in: the rest is computed with the next turn
        yield from self.restore(path)
        computed = self.num_computed
        yield from self.catch_up(path, len(path), "seal", lambda: False)
        self.num_computed = computed
        if self.cache.tail_length >= self._segment_min:
            yield from self._sealed(path, len(path))
        yield from self._save_waiting(path)
        self.hold(path)
        if self.notices:  # what was to grow is damaged: compute it again
            yield from self.tell()
            yield from self.catch_up(path, len(path), "rebuild", lambda: False)
            yield from self._save_waiting(path)

    def save(self, stop: Stop | None = None) -> Steps:
        """Write what is sealed only in memory; given `stop`, until then, and not what failed before."""
        if len(self.saver) and not (stop and self.saver.failed):
            yield from self.saver.flush(stop=stop or (lambda: False))
            self.store.fold()

    def tell(self) -> Steps:
        """Say what went wrong where nobody could be told."""
        told, self.notices = [*self.notices, *map(Notice, self.engine.warnings())], []
        yield from told

    def _sealed(self, path: Sequence[Message], last: int) -> Steps:
        """`_seal`; without memory for it KV stays exact, and it is tried again when the next turn is finished."""
        try:
            for attempt in twice(partial(self.spare_more, path[:last]), "sealing", self.engine.model.device):
                with attempt:
                    yield from self._seal(path, last)
        except OutOfMemory as error:
            if self._load_s is None or self._let_go_sealed(path[:last]):
                raise
            yield Notice(f"the newest turns could not be sealed; their KV stays exact for now: {error}")

    def _seal(self, path: Sequence[Message], last: int) -> Steps:
        """Seal the tail up to message `last`; afterwards memory holds what the store will hold, not the exact KV."""
        bounds = self.bounds(path)
        first = bounds.index(self.cache.tail_start)
        if first >= last:  # it was attached before memory ran out
            self.hold(path[:last])
            return
        if not self.saver.worth_trying(self.cache.tail_length):
            return
        method, codec = self.ranker.method, ",".join(self.config.codec.names)
        record = self.saver.record("sealed", codec, path[first:last], bounds[first], method)
        if self.saver.has(record.id):
            yield from self.save()
        saving, tokens, model = None, record.end - record.start, self.engine.model
        # One that goes on beyond a point where this path left another still serves the other.
        replaced = [waiting.id for waiting, end in self.waiting if end == waiting.end]
        try:
            stored = self.store.segment(record.id)
            if stored is None:
                reading, record = yield from self._read(record, path, first, last)
                saving = self.saver.begin(record, reading.header, replaced, self.cache.tail_length)
                if self.saver.surely_fits(tokens * model.pairs_per_token * model.bytes_per_pair):
                    self._take(reading, saving, path[:last])
                else:  # what has no room stays exact, so that must be known first
                    yield from self.saver.put(saving, reading.frames)
                    saving, stored = None, self.store.segment(record.id)
                    if stored is None:
                        return
            if stored is not None:
                self._attach(stored, last - first, path[:last], tail=tokens)
        except UnknownCodec as error:
            yield Notice(f"a segment of a newer version stays as it is, and its KV exact for now: {error}")
            return
        except StoreDamaged as error:
            yield Notice(f"a segment could not be saved; its KV stays exact for now: {error}")
            return
        except CodecError as error:
            removed = self._drop(record.id)
            self.waiting = []
            yield Notice(f"a segment could not be read back and was {removed}; its KV stays exact for now: {error}")
            return
        self.waiting = []
        if saving:
            yield from self.saver.put_off(saving)
        self.hold(path[:last])  # what comes next is computed from what is held now
        trim(self.engine.model.device)

    def _read(
        self, record: SegmentRecord, path: Sequence[Message], first: int, last: int
    ) -> Generator[Progress | Notice, None, tuple[Reading, SegmentRecord]]:
        """Score, rank and read one segment, and its record: with codec raw, if its own cannot write it."""
        begun, compress = time.perf_counter(), self.config.compress
        expect = partial(self.expect, path)
        ranking, cuts = yield from rank_turns(self.engine, self.cache, path, first, last, self.ranker, expect)
        self.expected = 0  # or less would be held than when the conversation is resumed
        ranking = replace(ranking, method=record.scorer, offset=self.cache.offset)
        keys, values = self.cache.tail(record.start, record.end)
        codecs = codecs_for(cuts, compress.rank_chunks, record.codec.split(","))
        try:
            reading = read_segment(codecs, keys, values, ranking)
        except CodecError as error:
            yield Notice(f"this segment is written with codec raw: {error}")
            record = replace(record, codec="raw")
            reading = read_segment("raw", keys, values, ranking)
        return reading, replace(record, seal_s=time.perf_counter() - begun)

    def _take(self, reading: Reading, saving: Saving, path: Sequence[Message]) -> None:
        """Attach a segment of the path's last messages as it is read, in place of its tail."""
        record, header = saving.record, reading.header
        with self._knowing(self._entry(record, header, record.end), path) as chunks:
            resident = Resident(record.id, header, record.end, chunks, record.from_file)
            self.tiers.seal(resident, sealed_layers(reading, saving, chunks), record.end - record.start)

    def _save_waiting(self, path: Sequence[Message]) -> Steps:
        """Save the finished turns in the tail that no segment has yet, exactly."""
        bounds = self.bounds(path)
        first, last = bounds.index(self.num_saved), bisect_right(bounds, self.cache.num_seen) - 1
        if first >= last or not self.saver.worth_trying(self.cache.tail_length):
            return
        record = self.saver.record("open", "raw", path[first:last], bounds[first])
        keys, values = self.cache.tail(record.start, record.end)
        ranking = Ranking.single(record.start, len(keys), len(keys[0]), record.end - record.start)
        ranking = replace(ranking, offset=self.cache.offset)
        try:
            for attempt in twice(self.spare, "saving the newest turns", self.engine.model.device):
                with attempt:
                    reading = read_segment("raw", keys, values, ranking)
                    saving = self.saver.begin(record, reading.header, [], self.cache.tail_length)
                    if (yield from self.saver.put(saving, reading.frames)):
                        self.waiting.append((saving.record, record.end))
        except (StoreDamaged, OutOfMemory) as error:
            yield Notice(f"the newest turns' KV could not be saved: {error}")
