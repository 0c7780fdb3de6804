"""The KV of one conversation: restored from segments, computed from ids where there are none, sealed, saved, held.

Positions 0 .. num_seen are covered by sealed segments and then by the tail, in which finished turns wait until a
segment has enough tokens. Waiting turns are saved exactly ("open" segments), so nothing is ever only in memory;
sealing replaces them. A segment that is missing or damaged is a miss: said, removed, computed again.
"""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Generator, Sequence
from concurrent.futures import Executor
from contextlib import suppress
from dataclasses import replace
from itertools import accumulate

from torch import Tensor

from kvchat.cache.segment import Ranking
from kvchat.codecs import decode_frame, encode_segment
from kvchat.compress.allocate import chunks_held
from kvchat.compress.compressor import codecs_for
from kvchat.config import Config
from kvchat.engine import Engine, Stop
from kvchat.errors import CodecError, StoreDamaged, StoreError, UnknownCodec
from kvchat.events import Notice, Phase, Progress
from kvchat.fingerprint import fingerprint_id
from kvchat.records import num_answered, turn_of
from kvchat.saving import Saver
from kvchat.sealing import cuts_of, rank_turns, read_header
from kvchat.store import Message, SegmentRecord, Store
from kvchat.tiers import Resident, Tiers

Steps = Generator[Progress | Notice, None, None]


class Residence:
    """The cache of one conversation and its segments in the store.

    Methods take the conversation's path, which only ever grows at its end or is cut (`crop`).

    Args:
        store: used from this thread alone.
        engine: the model.
        config: all settings.
        pool: threads that decode frames.
        session_id: the stored session, which gives way last when the disk is full; None: it is as any other.
    """

    def __init__(
        self, store: Store, engine: Engine, config: Config, pool: Executor, session_id: int | None = None
    ) -> None:
        self.store = store
        self.engine = engine
        self.config = config
        self.cache = engine.new_cache()
        self.tiers = Tiers(self.cache, store.frames, pool)
        self.fingerprint = fingerprint_id(engine.model.fingerprint)
        self._saver = Saver(store, config, self.fingerprint, session_id)
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

    @staticmethod
    def ids(path: Sequence[Message]) -> list[int]:
        """Token ids of a path; the index of an id is its position."""
        return [token for message in path for token in message.token_ids]

    @staticmethod
    def bounds(path: Sequence[Message]) -> list[int]:
        """Where each message begins, and, last, where the path ends: one more than there are messages."""
        return [0, *accumulate(len(message.token_ids) for message in path)]

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

    # -- coming back -------------------------------------------------------------------------------------------------

    def restore(self, path: Sequence[Message]) -> Steps:
        """Attach what the store has of the path, once; a gap or a damaged segment is computed again from its ids."""
        if self._load_s is not None:
            stored = self.store.stored_chunks([one.id for one in self.tiers.residents])
            if any(one.chunks > stored.get(one.id, one.chunks) for one in self.tiers.residents):
                self.hold(path)  # given up meanwhile for another session
            return
        begun, self._load_s = time.perf_counter(), 0.0
        try:
            cover = self.store.cover([message.id for message in path], self.fingerprint)
        except StoreDamaged as error:
            cover = []
            yield Notice(f"saved KV cannot be read and is computed again: {error}")
        whole = self._restore_together(cover, path)
        yield Progress("restore", self.cache.num_seen, self.bounds(path)[-1])
        for record, used in cover[whole:]:
            yield from self._restore_one(record, used, path)
            yield Progress("restore", self.cache.num_seen, self.bounds(path)[-1])
        self.hold(path)
        self.lacking = any(message.role == "assistant" for message in path)
        self._load_s = time.perf_counter() - begun

    def mend(self, path: Sequence[Message], stop: Stop) -> Steps:
        """Compute and save what the store did not have, until `stop`."""
        if not self.lacking or self._load_s is None:
            return
        answered = num_answered(path)
        yield from self.catch_up(path, answered, "rebuild", stop)
        if self.cache.num_seen >= self.bounds(path)[answered]:
            self.lacking = False
            yield from self.settle(path)

    def _restore_together(self, cover: Sequence[tuple[SegmentRecord, int]], path: Sequence[Message]) -> int:
        """Attach the leading sealed segments at once, as far as they are whole; how many those are."""
        residents: list[Resident] = []
        loading, ready, position = [], {}, 0
        with suppress(CodecError):  # the first that is damaged is reported when its turn comes
            for record, used in cover:
                if record.kind != "sealed" or record.start != position:
                    break
                residents.append(self._resident(record, used, path))
                position = residents[-1].end
        with suppress(CodecError):
            for resident in self._sized(residents, path):
                loading.append(self.tiers.load(resident))
        with suppress(CodecError):
            for one in loading:
                ready[one.resident] = one.pieces()
        self.tiers.add(ready)
        return len(ready)

    def _restore_one(self, record: SegmentRecord, used: int, path: Sequence[Message]) -> Steps:
        """Attach one segment, after computing what is missing before it."""
        first = next(index for index, message in enumerate(path) if message.id == record.messages[0])
        yield from self.catch_up(path, first, "rebuild", lambda: False)
        if record.kind == "sealed" and self.cache.tail_length:
            yield from self._seal(path, first)
            if self.cache.tail_length:  # it stays exact: what comes after it is computed too
                return
        try:
            if record.kind == "sealed":
                self._attach(record, used, path)
            else:
                self._wait_again(record, self.bounds(path)[first + used])
        except UnknownCodec as error:  # of a newer version, which can still read it
            yield Notice(f"saved KV cannot be read here and is computed again: {error}")
        except CodecError as error:
            removed = self._drop(record.id)
            turn = turn_of(path, first)
            yield Notice(f"saved KV from turn {turn} on is damaged and {removed}; it is computed again: {error}")

    def _attach(self, record: SegmentRecord, used: int, path: Sequence[Message], tail: int = 0) -> None:
        """Attach one sealed segment beside those there are, in place of so many tokens of the tail."""
        *_, resident = self._sized([*self.tiers.residents, self._resident(record, used, path)], path)
        self.tiers.add({resident: self.tiers.load(resident).pieces()}, tail)

    def _sized(self, residents: Sequence[Resident], path: Sequence[Message]) -> list[Resident]:
        """The residents with as many chunks as the budget gives them together; never more than the store has."""
        found = self.store.stored_chunks([one.id for one in residents])
        # Of what is gone from the store memory keeps what it has.
        stored = [found.get(one.id, one.chunks) for one in residents]
        chunks = self.budgets([(one.header.ranking, one.end) for one in residents], path, stored)
        return [replace(one, chunks=count) for one, count in zip(residents, chunks, strict=True)]

    def _resident(self, record: SegmentRecord, used: int, path: Sequence[Message]) -> Resident:
        """A sealed segment of whose messages the first `used` lie on the path, whole."""
        header = read_header(record, self.engine.model)
        last = next(index for index, message in enumerate(path) if message.id == record.messages[used - 1])
        end = self.bounds(path)[last + 1]
        return Resident(record.id, header, end, record.stored_chunks, record.from_file)

    def _wait_again(self, record: SegmentRecord, end: int) -> None:
        """Append an open segment's exact KV, up to position `end`, to the tail. Raises CodecError."""
        header, device = read_header(record, self.engine.model), self.cache.layers[0].device
        frames = self.store.frames(record.id, [0])
        rows = [kv for _, group, blob in frames for kv in decode_frame(header, 0, group, blob, device)]
        used, shape = end - record.start, (self.engine.model.num_key_value_heads, -1, header.head_dim)
        self.cache.append_tail([(kv.keys.view(shape)[:, :used], kv.values.view(shape)[:, :used]) for kv in rows])
        self.waiting.append((record, end))
        self._saver.taken(record)

    def catch_up(self, path: Sequence[Message], last: int, phase: Phase, stop: Stop) -> Steps:
        """Compute the KV of messages before index `last` that the cache does not stand for, sealing on the way."""
        bounds, ids, before = self.bounds(path), self.ids(path), self.cache.num_seen
        if before > bounds[-1]:  # a reply that was interrupted before its first token
            self.cut(bounds[-1])
        for index in range(1, last + 1):
            long = bounds[index] - self.cache.tail_start >= self.config.compress.segment_min
            # Short messages are computed together: one pass over many tokens is far quicker than many passes.
            if bounds[index] <= self.cache.num_seen or not (long or index == last):
                continue
            yield from self.prefill(ids, bounds[index], phase, stop)
            if self.cache.num_seen < bounds[index]:
                break
            if long:
                yield from self._seal(path, index)
        self.num_computed += max(0, self.cache.num_seen - before)

    def prefill(
        self, ids: Sequence[int], end: int, phase: Phase, stop: Stop
    ) -> Generator[Progress | Notice, None, Tensor | None]:
        """Compute KV up to position `end`; the last token's logits, or None if stopped before it."""
        start = self.cache.num_seen
        running = self.engine.prefill(self.cache, ids[start:end], stop)
        while True:
            try:
                yield Progress(phase, start + next(running), end)
            except StopIteration as finished:
                logits: Tensor | None = finished.value
                return logits

    # -- after a turn ------------------------------------------------------------------------------------------------

    def settle(self, path: Sequence[Message]) -> Steps:
        """Make the KV of all finished turns durable: seal what is long enough, save the rest, hold the budget."""
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
        if self.cache.tail_length >= self.config.compress.segment_min:
            yield from self._seal(path, len(path))
        yield from self._save_waiting(path)
        self.hold(path)
        if self.notices:  # what was to grow is damaged: compute it again
            yield from self.tell()
            yield from self.catch_up(path, len(path), "rebuild", lambda: False)
            yield from self._save_waiting(path)

    def tell(self) -> Steps:
        """Say what went wrong where nobody could be told."""
        told, self.notices = [*self.notices, *map(Notice, self.engine.warnings())], []
        yield from told

    def _seal(self, path: Sequence[Message], last: int) -> Steps:
        """Seal the tail up to message `last`; afterwards memory holds what the store holds, not the exact KV."""
        bounds = self.bounds(path)
        first = bounds.index(self.cache.tail_start)
        if not self._saver.worth_trying(self.cache.tail_length):
            return
        record = self._saver.record("sealed", ",".join(self.config.codec.names), path[first:last], bounds[first])
        try:
            if self.store.segment(record.id) is None:
                yield from self._write(record, path, first, last)
            stored = self.store.segment(record.id)
            if stored is None:
                return  # no room: it stays exact
            self._attach(stored, last - first, path[:last], tail=bounds[last] - bounds[first])
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
        self.hold(path[:last])  # what comes next is computed from what is held now

    def _write(self, record: SegmentRecord, path: Sequence[Message], first: int, last: int) -> Steps:
        """Score, rank, encode and store one segment, in place of the waiting turns it covers."""
        begun = time.perf_counter()
        ranking = yield from rank_turns(self.engine, self.cache, path, first, last, self.config.compress)
        tail = [layer.tail() for layer in self.cache.layers]
        tokens = record.end - record.start
        keys, values = [k[:, :tokens] for k, _ in tail], [v[:, :tokens] for _, v in tail]
        compress = self.config.compress
        codecs = codecs_for(cuts_of(compress), compress.rank_chunks, record.codec.split(","))
        try:
            header, frames = encode_segment(codecs, keys, values, ranking)
        except CodecError as error:
            yield Notice(f"this segment is written with codec raw: {error}")
            record = replace(record, codec="raw")
            header, frames = encode_segment("raw", keys, values, ranking)
        record = replace(record, seal_s=time.perf_counter() - begun)
        # One that goes on beyond a point where this path left another still serves the other.
        replaced = [waiting.id for waiting, end in self.waiting if end == waiting.end]
        yield from self._saver.put(record, header, frames, replaced, self.cache.tail_length)

    def _save_waiting(self, path: Sequence[Message]) -> Steps:
        """Save the finished turns in the tail that no segment has yet, exactly."""
        bounds = self.bounds(path)
        first, last = bounds.index(self.num_saved), bisect_right(bounds, self.cache.num_seen) - 1
        if first >= last or not self._saver.worth_trying(self.cache.tail_length):
            return
        record = self._saver.record("open", "raw", path[first:last], bounds[first])
        part = slice(record.start - self.cache.tail_start, record.end - self.cache.tail_start)
        tail = [layer.tail() for layer in self.cache.layers]
        keys, values = [k[:, part] for k, _ in tail], [v[:, part] for _, v in tail]
        ranking = Ranking.single(record.start, len(keys), len(keys[0]), record.end - record.start)
        try:
            encoded = encode_segment("raw", keys, values, ranking)
            if (yield from self._saver.put(record, *encoded, [], self.cache.tail_length)):
                self.waiting.append((record, record.end))
        except StoreDamaged as error:
            yield Notice(f"the newest turns' KV could not be saved: {error}")

    def _drop(self, segment_id: str) -> str:
        """Remove a damaged segment; what became of it. It may lie in a page that nothing can be removed from."""
        try:
            self.store.drop_segment(segment_id)
        except StoreError as error:
            return f"cannot be removed ({error})"
        return "removed"

    def budgets(
        self, segments: Sequence[tuple[Ranking, int]], path: Sequence[Message], stored: Sequence[int] | None = None
    ) -> list[int]:
        """Chunks that memory holds of segments, each given with the end of its use, of so many `stored` (None: all).

        The newest token is that of the newest message that does not wait for its answer.
        """
        most = [ranking.num_chunks for ranking, _ in segments] if stored is None else stored
        return chunks_held(self.config.compress, segments, most, self.bounds(path)[num_answered(path)])

    def hold(self, path: Sequence[Message]) -> None:
        """Shrink and grow the sealed segments to what the budget gives each."""
        wanted = {one.id: one.chunks for one in self._sized(self.tiers.residents, path)}
        for one in self.tiers.hold(wanted):
            removed = self._drop(one.id)
            self.lacking = True
            turn = turn_of(path, self.bounds(path).index(one.start))
            self.notices.append(Notice(f"saved KV from turn {turn} on is damaged and {removed}; it is computed again"))
            self.cut(min(one.start, self.cache.num_seen))

    def crop(self, path: Sequence[Message]) -> None:
        """Forget what lies beyond the end of the path."""
        if self._load_s is not None:
            self.cut(min(self.bounds(path)[-1], self.cache.num_seen))
            self.hold(path)

    def cut(self, position: int) -> None:
        """Forget every token from `position` on, and all of a segment from a file: `Store.cover` gives none in part."""
        split = [one.start for one in self.tiers.residents if one.from_file and one.start < position < one.end]
        split += [one.start for one, end in self.waiting if one.from_file and one.start < position < end]
        self.tiers.crop(position := min([position, *split]))
        self.waiting = [(record, min(used, position)) for record, used in self.waiting if record.start < position]
