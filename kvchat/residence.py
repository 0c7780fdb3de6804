"""The KV of one conversation: restored from segments, computed from ids where there are none, sealed, saved, held.

Positions 0 .. num_seen are covered by sealed segments and then by the tail, in which finished turns wait until a
segment has enough tokens. Waiting turns are saved exactly ("open" segments), so nothing is ever only in memory;
sealing replaces them. A segment that is missing or damaged is a miss: said, removed, computed again.
"""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import Executor
from contextlib import suppress
from dataclasses import replace
from hashlib import blake2b
from itertools import accumulate
from typing import Literal

from torch import Tensor

from kvchat.cache.segment import Ranking
from kvchat.codecs import SegmentHeader, decode_frame, encode_segment
from kvchat.compress.allocate import allocate
from kvchat.compress.compressor import chunks_within, codecs_for
from kvchat.config import Config
from kvchat.engine import Engine, Stop
from kvchat.errors import CodecError, UnknownCodec
from kvchat.events import Notice, Phase, Progress
from kvchat.model import fingerprint_id
from kvchat.sealing import cuts_of, rank_turns
from kvchat.store import Message, SegmentRecord, Store
from kvchat.tiers import Resident, Tiers

Steps = Generator[Progress | Notice, None, None]
Frames = Iterable[tuple[int, int, bytes]]
Kind = Literal["sealed", "open"]


class Residence:
    """The cache of one conversation and its segments in the store.

    Methods take the conversation's path, which only ever grows at its end or is cut (`crop`).

    Args:
        store: used from this thread alone.
        engine: the model.
        config: all settings.
        pool: threads that decode frames.
    """

    def __init__(self, store: Store, engine: Engine, config: Config, pool: Executor) -> None:
        self.store = store
        self.engine = engine
        self.config = config
        self.cache = engine.new_cache()
        self.tiers = Tiers(self.cache, store.frames, pool)
        self.fingerprint = fingerprint_id(engine.model.fingerprint)
        self.waiting: list[tuple[SegmentRecord, int]] = []
        """Open segments that cover parts of the tail, each with one past the last position that is in use."""
        self.num_computed = 0
        """Tokens computed again since the last turn because no segment had them."""
        self.notices: list[Notice] = []
        """What went wrong where nobody could be told."""
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

    def take_load_s(self) -> float:
        """Seconds that restoring took, reported once; it also ends the turn's count of computed tokens."""
        seconds, self._load_s, self.num_computed = self._load_s or 0.0, 0.0, 0
        return seconds

    # -- coming back -------------------------------------------------------------------------------------------------

    def restore(self, path: Sequence[Message]) -> Steps:
        """Attach what the store has of the path, once; a gap or a damaged segment is computed again from its ids."""
        if self._load_s is not None:
            return
        begun, self._load_s = time.perf_counter(), 0.0
        cover = self.store.cover([message.id for message in path], self.fingerprint)
        whole = self._restore_together(cover, path)
        yield Progress("restore", self.cache.num_seen, self.bounds(path)[-1])
        for record, used in cover[whole:]:
            yield from self._restore_one(record, used, path)
            yield Progress("restore", self.cache.num_seen, self.bounds(path)[-1])
        self.hold(path)
        self._load_s = time.perf_counter() - begun

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
        try:
            if record.kind == "sealed":
                self._attach(record, used, path)
            else:
                self._wait_again(record, self.bounds(path)[first + used])
        except UnknownCodec as error:  # of a newer version, which can still read it
            yield Notice(f"saved KV cannot be read here and is computed again: {error}")
        except CodecError as error:
            self.store.drop_segment(record.id)
            turn = turn_of(path, first)
            yield Notice(f"saved KV from turn {turn} on is damaged and removed; it is computed again: {error}")

    def _attach(self, record: SegmentRecord, used: int, path: Sequence[Message], tail: int = 0) -> None:
        """Attach one sealed segment beside those there are, in place of so many tokens of the tail."""
        *_, resident = self._sized([*self.tiers.residents, self._resident(record, used, path)], path)
        self.tiers.add({resident: self.tiers.load(resident).pieces()}, tail)

    def _sized(self, residents: Sequence[Resident], path: Sequence[Message]) -> list[Resident]:
        """The residents with as many chunks as the budget gives them together."""
        chunks = self.budgets([(one.header.ranking, one.end) for one in residents], path)
        return [replace(one, chunks=count) for one, count in zip(residents, chunks, strict=True)]

    def _resident(self, record: SegmentRecord, used: int, path: Sequence[Message]) -> Resident:
        """A sealed segment of whose messages the first `used` lie on the path, whole."""
        header = SegmentHeader.from_bytes(record.header)
        last = next(index for index, message in enumerate(path) if message.id == record.messages[used - 1])
        end = self.bounds(path)[last + 1]
        return Resident(record.id, header, end, header.ranking.num_chunks)

    def _wait_again(self, record: SegmentRecord, end: int) -> None:
        """Append an open segment's exact KV, up to position `end`, to the tail. Raises CodecError."""
        header, device = SegmentHeader.from_bytes(record.header), self.cache.layers[0].device
        rows = [
            kv
            for _, group, blob in self.store.frames(record.id, [0])
            for kv in decode_frame(header, 0, group, blob, device)
        ]
        used, shape = end - record.start, (self.engine.model.num_key_value_heads, -1, header.head_dim)
        self.cache.append_tail([(kv.keys.view(shape)[:, :used], kv.values.view(shape)[:, :used]) for kv in rows])
        self.waiting.append((record, end))

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
            self._save_waiting(path)
            self.hold(path)
            return  # stopped while taking much in: the rest is computed with the next turn
        yield from self.restore(path)
        computed = self.num_computed
        yield from self.catch_up(path, len(path), "seal", lambda: False)
        self.num_computed = computed
        if self.cache.tail_length >= self.config.compress.segment_min:
            yield from self._seal(path, len(path))
        self._save_waiting(path)
        self.hold(path)
        if self.notices:  # what was to grow is damaged: compute it again
            yield from self.tell()
            yield from self.catch_up(path, len(path), "rebuild", lambda: False)
            self._save_waiting(path)

    def tell(self) -> Steps:
        """Say what went wrong where nobody could be told."""
        told, self.notices = self.notices, []
        yield from told

    def _seal(self, path: Sequence[Message], last: int) -> Steps:
        """Seal the tail up to message `last`; afterwards memory holds what the store holds, not the exact KV."""
        bounds = self.bounds(path)
        first = bounds.index(self.cache.tail_start)
        record = self._record("sealed", ",".join(self.config.codec.names), path[first:last], bounds[first])
        if self.store.segment(record.id) is None:
            yield from self._write(record, path, first, last)
        stored = self.store.segment(record.id)
        assert stored is not None
        try:
            self._attach(stored, last - first, path[:last], tail=bounds[last] - bounds[first])
        except UnknownCodec as error:
            yield Notice(f"a segment of a newer version stays as it is, and its KV exact for now: {error}")
            return
        except CodecError as error:
            self.store.drop_segment(stored.id)
            self.waiting = []
            yield Notice(f"a segment could not be read back and was removed; its KV stays exact for now: {error}")
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
        seconds = time.perf_counter() - begun
        # One that goes on beyond a point where this path left another still serves the other.
        replaced = [waiting.id for waiting, end in self.waiting if end == waiting.end]
        self._put(replace(record, seal_s=seconds), header, frames, replaced)

    def _save_waiting(self, path: Sequence[Message]) -> None:
        """Save the finished turns in the tail that no segment has yet, exactly."""
        bounds, saved = self.bounds(path), self.cache.tail_start
        for waiting, end in self.waiting:
            saved = end if waiting.start == saved else saved
        first, last = bounds.index(saved), bisect_right(bounds, self.cache.num_seen) - 1
        if first >= last:
            return
        record = self._record("open", "raw", path[first:last], bounds[first])
        part = slice(record.start - self.cache.tail_start, record.end - self.cache.tail_start)
        tail = [layer.tail() for layer in self.cache.layers]
        keys, values = [k[:, part] for k, _ in tail], [v[:, part] for _, v in tail]
        ranking = Ranking.single(record.start, len(keys), len(keys[0]), record.end - record.start)
        self._put(record, *encode_segment("raw", keys, values, ranking), [])
        self.waiting.append((record, record.end))

    def _record(self, kind: Kind, codec: str, messages: Sequence[Message], start: int) -> SegmentRecord:
        """A segment still without header; its id stands for model, method and, through message ids, all text before."""
        scorer = self.config.compress.scorer if kind == "sealed" else ""
        names = (self.fingerprint, kind, scorer, codec, messages[0].id, messages[-1].id)
        digest = blake2b("\0".join(names).encode(), digest_size=16).hexdigest()
        end = start + sum(len(message.token_ids) for message in messages)
        ids = tuple(message.id for message in messages)
        return SegmentRecord(f"b2:{digest}", self.fingerprint, start, end, kind, codec, scorer, ids, b"", 0, 0)

    def _put(self, record: SegmentRecord, header: SegmentHeader, frames: Frames, replaces: Sequence[str]) -> None:
        chunks, groups = header.ranking.num_chunks, header.num_groups
        record = replace(record, header=header.to_bytes(), num_chunks=chunks, num_groups=groups)
        self.store.put_segment(record, frames, replaces)

    def budgets(self, segments: Sequence[tuple[Ranking, int]], path: Sequence[Message]) -> list[int]:
        """Chunks that memory holds of segments, each given with the end of its use.

        All of those with one of the newest tokens, not counting a message that waits for its answer; of the others what
        `keep_ratio` gives each, or all of them together.
        """
        config, answered = self.config.compress, len(path) - bool(path and path[-1].role == "user")
        newest, keep = self.bounds(path)[answered], config.keep_ratio
        recent = [min(end, newest) > newest - config.recent_tokens for _, end in segments]
        old = [ranking for (ranking, _), new in zip(segments, recent, strict=True) if not new]
        held = iter(allocate(old, keep) if config.budget == "session" else [chunks_within(r.sizes, keep) for r in old])
        return [ranking.num_chunks if new else next(held) for (ranking, _), new in zip(segments, recent, strict=True)]

    def hold(self, path: Sequence[Message]) -> None:
        """Shrink and grow the sealed segments to what the budget gives each."""
        wanted = {one.id: one.chunks for one in self._sized(self.tiers.residents, path)}
        for one in self.tiers.hold(wanted):
            self.store.drop_segment(one.id)
            turn = turn_of(path, self.bounds(path).index(one.start))
            self.notices.append(Notice(f"saved KV from turn {turn} on is damaged and removed; it is computed again"))
            self.cut(min(one.start, self.cache.num_seen))

    def crop(self, path: Sequence[Message]) -> None:
        """Forget what lies beyond the end of the path."""
        if self._load_s is not None:
            self.cut(min(self.bounds(path)[-1], self.cache.num_seen))
            self.hold(path)

    def cut(self, position: int) -> None:
        """Forget every token from `position` on."""
        self.tiers.crop(position)
        self.waiting = [(record, min(used, position)) for record, used in self.waiting if record.start < position]


def turn_of(path: Sequence[Message], index: int) -> int:
    """Number of the turn, from 1, that a message belongs to."""
    return max(1, sum(message.role == "user" for message in path[: index + 1]))
