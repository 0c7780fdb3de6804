"""A conversation's KV comes back from the store: sealed segments together, then turns that wait, exactly as saved.

What the store does not have is computed again from ids, unless that is longer ago than the model has positions: then it
stays text only.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import partial
from itertools import accumulate, takewhile

import torch

from kvchat.codecs import SegmentHeader, decode_frame
from kvchat.engine import Stop
from kvchat.errors import CodecError, StoreDamaged, UnknownCodec
from kvchat.events import Notice, Phase, Progress
from kvchat.memory import twice
from kvchat.pool import submit
from kvchat.residence.catalogue import Entry
from kvchat.residence.loading import Resident
from kvchat.residence.reach import Reach
from kvchat.residence.reach import Steps as Steps
from kvchat.residence.sealing import read_header
from kvchat.store.records import turn_of
from kvchat.store.store import Message, SegmentRecord


class Restoring(Reach):
    """The part of a `Residence` that reads the store."""

    pool: Executor

    def save(self, stop: Stop | None = None) -> Steps:
        """As `Residence` has it."""
        raise NotImplementedError

    def catch_up(self, path: Sequence[Message], last: int, phase: Phase, stop: Stop) -> Steps:
        """As `Residence` has it."""
        raise NotImplementedError

    # -- coming back -------------------------------------------------------------------------------------------------

    def restore(self, path: Sequence[Message]) -> Steps:
        """Attach what the store has of the path, once; a gap or a damaged segment is computed again from its ids."""
        if self.saver.superseded:  # what comes is computed from what a resumed session would have
            self.saver.superseded.clear()
            self.let_go()
        if self._load_s is not None:
            stored = self.store.stored_chunks([one.id for one in self.tiers.residents])
            if self.short or any(one.chunks > stored.get(one.id, one.chunks) for one in self.tiers.residents):
                self.hold(path)  # given up meanwhile for another session
            return
        for attempt in twice(self.let_go, "restoring saved turns", self.engine.model.device):
            with attempt:
                yield from self._restore(path, together=not attempt.again)

    def go_back(self, path: Sequence[Message], said: int, recalled: bool) -> bool:
        """Leave an answer to the path's last message after its first `said` tokens, to go on with it there.

        True: the cache is as it was when they had been said, the last of them still to be read. False: they are not in
        the tail any more, or older turns were `recalled` for them; then the question is gone too, to be asked again.
        """
        bounds, opening = self.bounds(path), len(self.engine.model.template.generation_prompt)
        place, start = bounds[-1] + opening + said - 1, self.cache.tail_start
        exact = self._load_s is not None and not self.saver.superseded and start <= bounds[-1]
        if exact and bounds[-1] < place <= self.cache.num_seen and not recalled:
            self.cut(place)
            self.waiting = [(one, min(end, bounds[-1])) for one, end in self.waiting if one.start < bounds[-1]]
            if self.cache.num_seen == place:
                return True
        self.crop(path[:-1])
        return False

    def _restore(self, path: Sequence[Message], together: bool) -> Steps:
        """Attach what the store has, `together` as far as it is whole: quicker, but pieces and whole are in memory."""
        yield from self.save()  # if all was let go before it was written
        begun, self._load_s = time.perf_counter(), 0.0
        try:
            cover = self.store.cover([message.id for message in path], self.fingerprint)
        except StoreDamaged as error:
            cover = []
            yield Notice(f"saved KV cannot be read and is computed again: {error}")
        self.offset = self._offset_of(cover)
        whole = self._restore_together(cover, path) if together or self._is_far(path) else 0
        yield Progress("restore", self.cache.num_seen, self.bounds(path)[-1])
        last = max((index for index, (record, _) in enumerate(cover) if record.kind == "sealed"), default=-1)
        for index, (record, used) in enumerate(cover[whole:], whole):
            if index <= last:  # what is missing before it is computed where the conversation was then
                self._go_on_with(self.known[-1].onward if self.known else 0)
            yield from self._restore_one(record, used, path)
            if index == last:
                self._go_on_with(self._offset_of(cover))
            yield Progress("restore", self.cache.num_seen, self.bounds(path)[-1])
        self.hold(path)
        self.lacking = any(message.role == "assistant" for message in path)
        self._load_s = time.perf_counter() - begun

    def _go_on_with(self, offset: int) -> None:
        """Have positions so much smaller than places."""
        if offset != self.offset:
            self.offset = offset
            self.arrange()

    def _offset_of(self, cover: Sequence[tuple[SegmentRecord, int]]) -> int:
        """Where the conversation goes on: that of its newest segment that can be read."""
        for record, _ in reversed(cover):
            with suppress(CodecError):
                return read_header(record, self.engine.model).ranking.next_offset
        return 0

    def _is_far(self, path: Sequence[Message]) -> bool:
        """Whether the path has more tokens than the model has positions: then what is lost long ago stays lost."""
        return self.bounds(path)[-1] > self.engine.model.context_window

    def _restore_together(self, cover: Sequence[tuple[SegmentRecord, int]], path: Sequence[Message]) -> int:
        """Attach the leading sealed segments at once, as far as they are whole; how many those are."""
        headers = self._leading(cover, path)
        chunks, parts, costs = self._wanted(path)
        residents = [
            Resident(entry.id, headers[entry.id], entry.end, chunks[entry.id], entry.from_file)
            for entry in self.known
            if chunks.get(entry.id) and entry.id not in parts  # those come afterwards (`hold`)
        ]
        whole = self._bring(residents, costs)
        if whole < len(residents):
            broken = residents[whole].start
            if self._is_far(path) and broken > self.known[0].start:
                self._lose(broken, path)
            else:
                self.known = [entry for entry in self.known if entry.start < broken]
        if self.known:
            self.cache.go_on_at(self.known[-1].end)
        self.arrange()
        return sum(not entry.lost for entry in self.known)

    def _bring(self, residents: Sequence[Resident], costs: Mapping[str, Sequence[int]]) -> int:
        """`Tiers.bring`; some at a time, where a limit of memory has no room for plain rows twice.

        Of one for which there is no room either, fewer chunks; the others come with `hold`.
        """
        cap, whole = self.cap, 0
        if cap is None or self.cache.encoded:
            return self.tiers.bring(residents)
        while whole < len(residents):
            first, sizes = residents[whole], [costs[one.id][: one.chunks] for one in residents[whole:]]
            many = sum(self._peak(cap, more) <= cap.units for more in accumulate(map(sum, sizes)))
            few = sum(self._peak(cap, more) <= cap.units for more in accumulate(sizes[0]))
            some = residents[whole : whole + many] or [replace(first, chunks=max(1, few))]
            whole += (brought := self.tiers.bring(some))
            if brought < len(some):
                break
        return whole

    def _leading(self, cover: Sequence[tuple[SegmentRecord, int]], path: Sequence[Message]) -> dict[str, SegmentHeader]:
        """Know the leading sealed segments, as far as they are whole; their headers by id."""
        leading = [*takewhile(lambda one: one[0].kind == "sealed", cover)]
        reading = [submit(self.pool, partial(read_header, record, self.engine.model)) for record, _ in leading]
        headers: dict[str, SegmentHeader] = {}
        with suppress(CodecError):  # the first that is damaged is reported when its turn comes
            for (record, used), header in zip(leading, reading, strict=True):
                end = self.known[-1].end if self.known else 0
                if record.start != end:
                    if not self._is_far(path) or not end:
                        break
                    self.known.append(Entry.missing(end, record.start))
                headers[record.id] = header.result()
                self.known.append(self._entry(record, headers[record.id], self._end_of(record, used, path)))
        return headers

    def _restore_one(self, record: SegmentRecord, used: int, path: Sequence[Message]) -> Steps:
        """Attach one segment, after computing what is missing before it."""
        first = next(index for index, message in enumerate(path) if message.id == record.messages[0])
        yield from self.catch_up(path, first, "rebuild", lambda: False)
        if record.kind == "sealed" and self.cache.tail_length:
            yield from self._sealed(path, first)
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
        header, end = read_header(record, self.engine.model), self._end_of(record, used, path)
        with self._knowing(self._entry(record, header, end), path) as chunks:
            resident = Resident(record.id, header, end, chunks, record.from_file)
            self.tiers.add({resident: self.tiers.load(resident).pieces()}, tail)

    @contextmanager
    def _knowing(self, entry: Entry, path: Sequence[Message]) -> Iterator[int]:
        """Inside, a segment that is known from now on is attached; how much of it is to be held.

        Nothing of one of which only a part is: that comes with `hold`.
        """
        with ExitStack() as undo:
            undo.callback(self.known.pop)
            self.known.append(entry)
            chunks, parts, _ = self._wanted(path)
            yield 0 if entry.id in parts else chunks[entry.id]
            undo.pop_all()
        self.arrange()

    def _entry(self, record: SegmentRecord, header: SegmentHeader, end: int) -> Entry:
        """What stays known of a segment that is used up to `end`."""
        return Entry.of(record, header, end, None if self.cache.encoded else self.engine.model.bytes_per_pair)

    def _end_of(self, record: SegmentRecord, used: int, path: Sequence[Message]) -> int:
        """One past the last place in use of a segment of whose messages the first `used` lie on the path, whole."""
        last = next(index for index, message in enumerate(path) if message.id == record.messages[used - 1])
        return self.bounds(path)[last + 1]

    def _wait_again(self, record: SegmentRecord, end: int) -> None:
        """Append an open segment's exact KV, up to position `end`, to the tail. Raises CodecError."""
        header, device = read_header(record, self.engine.model), self.cache.layers[0].device
        frames = self.store.frames(record.id, [0])
        rows = [kv for _, group, blob in frames for kv in decode_frame(header, 0, group, blob, device)]
        used, shape = end - record.start, (self.engine.model.num_key_value_heads, -1, header.head_dim)
        keys = [kv.keys.view(shape)[:, :used] for kv in rows]
        if by := header.ranking.offset - self.offset:  # once more than in the store, as when the conversation went on
            turns = torch.full((len(keys[0]) * used,), by, device=device)
            keys = [self.cache.turn(part.flatten(0, 1), turns).view_as(part) for part in keys]
        values = [kv.values.view(shape)[:, :used] for kv in rows]
        self.cache.append_tail([*zip(keys, values, strict=True)])
        self.waiting.append((record, end))
        self.saver.taken(record)
