"""KV in memory of all open sessions together, held to `model.memory_budget`; used by the worker's thread alone.

A session that is used has all that its own budget gives it. The others give way to it: first chunks that cost least to
bring back for their bytes and uses, in the end all, and then their frames may stay in host memory. Before a session is
used again it gets back what it had, from host memory or the store, with nothing computed. What was decided is kept for
whoever asks why.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar, cast

from kvchat import memory
from kvchat.bandwidths import Bandwidths
from kvchat.config import Config
from kvchat.errors import OutOfMemory, StoreError
from kvchat.events import Event, Progress, TurnDone
from kvchat.footprint import expected_bytes, held_bytes, is_gone, per_token
from kvchat.jobs import Jobs
from kvchat.planning import Figures, contexts_of, of_entry
from kvchat.residence.host import HostedStore
from kvchat.session import Conversation
from kvchat.utility import HOST, MEMORY, Context, Place, Uses, make_room

MOST_TOLD = 200
"""Decisions that are remembered."""
RESIDENT = 0.1
"""What frames count in host memory whose rows are in memory: they are of use when those give way."""
UNKNOWN = 0.5
"""Uses of a segment that nobody has told of yet: its session is just being opened."""
MANY_TOKENS = 128
"""From so many on, what a turn computed says how quickly that goes."""

Result = TypeVar("Result")
Step = TypeVar("Step", bound=Event)


@dataclass(frozen=True, slots=True)
class _Lying:
    """Part of a session: a segment, or its tail (no id)."""

    conversation: Conversation
    id: str
    context: Context
    place: Place


class Balance:
    """Which of the open sessions has how much of its KV in memory.

    Args:
        store, config, pool, jobs: the worker's.
        opened: all open sessions.
        clock: seconds.
    """

    def __init__(
        self,
        store: HostedStore,
        config: Config,
        pool: Executor,
        jobs: Jobs,
        opened: Callable[[], list[Conversation]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.bandwidths, self.uses = Bandwidths(), Uses()
        self.why: deque[str] = deque(maxlen=MOST_TOLD)
        self.host = store.serve_from(pool, config.store.host_cache, self.worth, self.bandwidths)
        self._store, self._budget = store, config.model.memory_budget
        self._jobs, self._opened, self._clock = jobs, opened, clock
        self._whole: dict[int, int] = {}
        """Of sessions that gave way, the bytes that they had."""
        self._owners: dict[str, tuple[int, int, int]] = {}
        """Of segments, their session, where they begin, and chunks in memory; replaced as a whole."""
        self._ahead: dict[str, int] = {}
        """Leading chunks of segments that are to be in memory or host memory."""
        self._before = (0, 0.0)
        self._last: dict[int, TurnDone] = {}
        """Of each session the turn that was learnt from last."""

    # -- for the worker ----------------------------------------------------------------------------------------------

    def is_whole(self, conversation: Conversation) -> bool:
        """Whether it has in memory what its own budget gives it: from less, nothing may be computed."""
        return conversation.info.id not in self._whole

    def attended(self, conversation: Conversation, growth: int | None, work: Callable[[], Result]) -> Result:
        """`work` with a session, when there is room for so many more tokens; None: it reads no KV."""
        if growth is not None:
            self.attend(conversation, growth)
        return work()

    def turn(self, conversation: Conversation, growth: int, work: Callable[[], Iterator[Event]]) -> Iterator[Event]:
        """A turn of a session."""
        self.attend(conversation, growth)
        return self.held(conversation, cast(Generator[Event, None, None], work()))

    def ready(self, conversation: Conversation) -> Iterator[Event]:
        """Bring back the KV of a session that is about to be used."""
        self.attend(conversation)
        begun = time.perf_counter()
        yield from conversation.restore()
        self._used(conversation, time.perf_counter() - begun)

    def finish(self, conversation: Conversation) -> Iterator[Event]:
        """After the last visible token of a turn."""
        if not self.is_whole(conversation):  # another session came before, for which it was finished
            return
        yield from self.held(conversation, conversation.finish())
        load_s, session = 0.0, conversation.info.id
        if (last := conversation.last) is not None and last is not self._last.get(session):
            self._last[session] = last
            load_s, tokens = last.timings.load_s, last.usage.prefilled_tokens
            if tokens >= MANY_TOKENS:
                self.bandwidths.add_prefill(tokens, (last.timings.ttft_s or 0.0) - load_s)
        self._used(conversation, load_s)

    def held(self, conversation: Conversation, steps: Generator[Step, None, Result]) -> Generator[Step, None, Result]:
        """What a session computes; while it does, others give way to what it has become."""
        while True:
            try:
                step = next(steps)
            except StopIteration as finished:
                result: Result = finished.value
                return result
            yield step
            if self._budget and isinstance(step, Progress):
                self._make_room(conversation, 0)

    def attend(self, conversation: Conversation, tokens: int = 0) -> None:
        """A session is used, and may grow by so many tokens: see to it that it has room and its KV.

        If all of it was let go, it comes back when the session is restored.
        """
        session, residence = conversation.info.id, conversation.residence
        self.uses.add(session, self._clock())
        self._before = self._served()
        if self._budget:
            growth = self._expected(conversation) + tokens * per_token(residence) - held_bytes(residence)
            self._make_room(conversation, max(0, growth))
        if session in self._whole and residence.tiers.residents:
            begun = time.perf_counter()
            residence.hold(conversation.path)
            if is_gone(residence):
                residence.drop()
            self._measured(time.perf_counter() - begun)
        self._whole.pop(session, None)  # last: what failed is done the next time

    def _used(self, conversation: Conversation, load_s: float) -> None:
        """A session was used, for which KV was loaded in so many seconds: learn from it, and hold the budget."""
        self._measured(load_s)
        for start in conversation.residence.recalled:
            self.uses.add((conversation.info.id, start), self._clock())
        if self._budget:
            self._make_room(conversation, 0)
        self._know()

    def forget(self, conversation: Conversation) -> None:
        """A session was closed."""
        self._whole.pop(conversation.info.id, None)
        self._last.pop(conversation.info.id, None)

    def worth(self, segment_id: str, chunk: int) -> float:
        """As `host.Worth`, from any thread: every byte takes as long to read, so that uses decide."""
        owner = self._owners.get(segment_id)
        if owner is None:
            return UNKNOWN
        session, start, resident = owner
        now = self._clock()
        uses = self.uses.frequency(session, now) + self.uses.frequency((session, start), now)
        return uses * (RESIDENT if chunk < resident else 1.0)

    def stats(self) -> dict[str, Any]:
        """What was decided lately, what is measured, what host memory served, and the chunks it has of segments."""
        told = {"why": [*self.why], "bandwidths": self.bandwidths.figures(), "memory_budget": self._budget}
        return told | {"host": self.host and self.host.stats(), "in_host": self.host.chunks() if self.host else {}}

    # -- making room -------------------------------------------------------------------------------------------------

    def _make_room(self, active: Conversation, growth: int) -> None:
        """Have the others give way until all fit, with the active one's growth."""
        others = [one for one in self._opened() if one is not active]
        mine = held_bytes(active.residence) + growth
        if mine + sum(held_bytes(one.residence) for one in others) <= self._budget:
            return
        for one in others:
            if self.is_whole(one) and one.residence.num_saved < one.residence.cache.num_seen:
                self._jobs.in_background(one.finish, one)  # while it has what that is computed from
        lying = [part for one in others for part in self._parts(one)]
        caps = {MEMORY: max(0, self._budget - mine), HOST: self.host.cap if self.host else 0}
        contexts, before = [one.context for one in lying], [one.place for one in lying]
        # All is in the store, and comes back whole: nothing is given up here.
        after, decisions = make_room(contexts, before, caps, self.bandwidths.costs(), moving=True)
        self.why.extend(map(str, decisions))
        moved = [replace(one, place=place) for one, place in zip(lying, after, strict=True)]
        for one in others:
            self._shrink(one, [part for part in moved if part.conversation is one])
        now = self._clock()
        for one in sorted(others, key=lambda one: self.uses.frequency(one.info.id, now)):
            if mine + sum(held_bytes(each.residence) for each in others) <= self._budget:
                break
            self._let_go(one)
        self._know()
        self._ahead = {part.id: part.place.host for part in moved if part.id and part.place.host > part.place.memory}
        self._store.read_ahead(self._ahead)

    def _shrink(self, conversation: Conversation, parts: Sequence[_Lying]) -> None:
        """Hold no more of each segment than its place says; all goes if the tail does, for it is not held in part."""
        residence = conversation.residence
        held = {one.id: one.chunks for one in residence.tiers.residents}
        wanted = {part.id: part.place.memory for part in parts if part.id}
        less = {name: min(chunks, wanted.get(name, 0)) for name, chunks in held.items()}
        tail = any(not part.id and not part.place.memory for part in parts)
        if tail or (held and not any(less.values())):
            self._let_go(conversation)
        elif less != held:
            self._whole.setdefault(conversation.info.id, held_bytes(residence))
            shrink, device = partial(residence.tiers.hold, less), residence.engine.model.device
            try:
                memory.again(shrink, residence.spare, "making room", device)
                residence.arrange()
            except OutOfMemory:
                self._let_go(conversation)

    def _let_go(self, conversation: Conversation) -> None:
        if nbytes := held_bytes(conversation.residence):
            self._whole.setdefault(conversation.info.id, nbytes)
            self._jobs.in_background(conversation.residence.save, conversation)
            conversation.residence.drop()
            self.why.append(f"{conversation.info.name}: all is let go: frees {nbytes / 1e6:.2f} MB of memory")

    def _parts(self, conversation: Conversation) -> list[_Lying]:
        """What a session has in memory: its segments, and its tail as one chunk."""
        residence, session, now = conversation.residence, conversation.info.id, self._clock()
        held, model = {one.id: one.chunks for one in residence.tiers.residents}, residence.engine.model
        known = [entry for entry in residence.known if not entry.lost]
        nbytes: dict[str, int] = {}
        with suppress(StoreError):  # of a damaged page; it blocks nobody else
            nbytes = self._store.frame_bytes([entry.id for entry in known])
        figures = [
            of_entry(entry, conversation.info.name, nbytes.get(entry.id), model.pairs_per_token) for entry in known
        ]
        places = [self._place(entry.id, held.get(entry.id, 0), entry.num_chunks) for entry in known]
        uses = [self.uses.frequency((session, entry.start), now) for entry in known]
        if length := residence.cache.tail_length:
            pairs, size = length * model.pairs_per_token, length * per_token(residence)
            figures.append(Figures(f"{conversation.info.name} tail", length, [pairs], None, "", "", size, size))
            places.append(Place(1, 1, 1))
            uses.append(0.0)
        contexts = contexts_of(figures, [self.uses.frequency(session, now) + more for more in uses])
        names = [*(entry.id for entry in known), ""]
        return [_Lying(conversation, *part) for part in zip(names, contexts, places, strict=False)]

    def _place(self, segment_id: str, memory: int, chunks: int) -> Place:
        return Place(memory, max(memory, min(chunks, self._ahead.get(segment_id, 0))), chunks)

    # -- helpers -----------------------------------------------------------------------------------------------------

    def _expected(self, conversation: Conversation) -> int:
        """Bytes that a session has when it is whole."""
        residence = conversation.residence
        if (known := self._whole.get(conversation.info.id)) is not None:
            return known
        return held_bytes(residence) or expected_bytes(residence, conversation.num_tokens)

    def _know(self) -> None:
        """Whose segments are whose, for `worth`."""
        if self.host is None:
            return
        with suppress(StoreError):
            self.host.forget_all_but(self._store.stored_chunks(self.host.chunks()))
        there, opened = self.host.chunks(), {one.info.id: one for one in self._opened()}
        owners = {name: owner for name, owner in self._owners.items() if name in there or owner[0] in opened}
        for one in opened.values():
            held = {resident.id: resident.chunks for resident in one.residence.tiers.residents}
            for name, (session, start, _) in owners.items():
                if session == one.info.id:
                    owners[name] = (session, start, held.get(name, 0))
            known = one.residence.known
            owners |= {entry.id: (one.info.id, entry.start, held.get(entry.id, 0)) for entry in known}
        self._owners = owners
        self.host.rate()

    def _served(self) -> tuple[int, float]:
        """Bytes of frames that were loaded so far, and seconds of all reads."""
        told = self.host.stats() if self.host else {}
        return told.get("hit_bytes", 0) + told.get("miss_bytes", 0), self.bandwidths.read_s

    def _measured(self, seconds: float) -> None:
        """What was loaded since `_before` took so long."""
        (nbytes, read_s), before = self._served(), self._before
        self.bandwidths.add_load(nbytes - before[0], seconds, read_s - before[1])
        self._before = self._served()
