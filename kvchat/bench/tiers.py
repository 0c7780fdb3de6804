"""Many sessions under one cap on KV in memory: who answers sooner at equal distance to all KV.

    tiers   `balance.py`, as a worker runs it: rows and frames in memory by what they are worth, the rest on disk
    lru     whole sessions by recency, rows of one fixed keep ratio; what went is computed again
    evict   the same with all rows

A trace says which session is asked when; at every step all policies take their turn, so that what else the machine does
meets all of them. `lru` has the largest keep ratio whose KL is no better than that of `tiers`. Beside what a miss costs
when nothing lies below memory, both are told with all their KV on the same disk, from where it is restored:
`lru_on_disk`, `evict_on_disk`. With `store.disk_budget` the store of `tiers` is held to that by fewer chunks and fewer
bits before the trace begins. All figures are of answers by the model itself, but for `simulated`.
"""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any, Protocol

import numpy as np

from kvchat.balance import Balance
from kvchat.bandwidths import Bandwidths
from kvchat.bench.history import drain, timed
from kvchat.bench.many import Bench, Messages, ingest, part, told
from kvchat.bench.trace import Recent, by_recency, by_utility, zipf
from kvchat.compress.compressor import chunks_within
from kvchat.config import Config
from kvchat.engine import Engine
from kvchat.events import Listener, Notice
from kvchat.footprint import held_bytes
from kvchat.jobs import Jobs
from kvchat.planning import COARSE, contexts_of, of_record
from kvchat.pool import new_pool
from kvchat.recode import recode
from kvchat.residence.host import HostedStore
from kvchat.residence.residence import Residence
from kvchat.session import Conversation
from kvchat.store.records import SegmentRecord
from kvchat.utility import DISK, MEMORY, Context, Place, make_room

IN_HOST = 0.1
"""The part of the cap that `tiers` gives frames in host memory."""
COMPARED = 5
"""Sessions on which the keep ratio of `lru` is chosen."""
LONG = 400
"""Steps of the simulated trace."""
FOUND = {"host": "hits", "disk": "misses"}
"""Where frames were found, by `HostCache`'s counts."""

Placed = list[list[tuple[Context, Place]]]
"""Of each session its sealed segments, and how much of each the store has for it."""


def tiers(
    config: Config,
    engine: Engine,
    listener: Listener | None,
    tokens: int,
    histories: Sequence[Messages],
    sessions: int = 20,
    steps: int = 60,
    seed: int = 0,
) -> dict[str, Any]:
    """Seconds to the first token, KL and where KV was found, of every policy, and as ratios.

    Args:
        tokens: of each session, about.
        histories: what sessions are cut from; none: made up.
    """
    say = listener or (lambda event: None)
    config = config.replaced({"compress.segment_min": 256, "compress.recent_tokens": 0, "compress.budget": "segment"})
    with tempfile.TemporaryDirectory(prefix="kvchat-bench-") as folder, new_pool() as pool:
        whole, ours = Path(folder) / "whole.db", Path(folder) / "ours.db"
        with closing(HostedStore(whole)) as store:
            texts = [part(histories, number, tokens) for number in range(sessions)]
            subjects = [ingest(store, engine, config, pool, *one) for one in told(texts, say)]
        shutil.copy(whole, ours)
        bench = Bench(config, engine, pool, subjects, zipf(sessions, steps, seed))
        with closing(HostedStore(ours)) as mine, closing(HostedStore(whole)) as theirs, _jobs() as jobs:
            figures, placed, balance = _played(bench, mine, theirs, jobs, say)
            figures["bandwidths"] = balance.bandwidths.figures()
            figures["why"] = [*balance.why][-5:]
    figures["simulated"] = _simulated(bench, placed, figures)
    shape = {"sessions": sessions, "steps": steps, "seed": seed, "tokens": sum(one.tokens for one in subjects)}
    ratios = {"ratios": _ratios(figures), "simulated_ratios": _ratios(figures["simulated"])}
    return {**shape, "cap_bytes": bench.cap, **figures, **ratios}


@contextmanager
def _jobs() -> Iterator[Jobs]:
    jobs = Jobs(None)
    try:
        yield jobs
    finally:
        jobs.close()


def _played(
    bench: Bench, mine: HostedStore, theirs: HostedStore, jobs: Jobs, say: Listener
) -> tuple[dict[str, Any], Placed, Balance]:
    placed = _fit(bench, mine)
    say(Notice("choosing the keep ratio of lru"))
    keep = _keep(bench, theirs, _kl(bench, mine, bench.config.compress.keep_ratio))
    ours = _Tiers(bench, mine, jobs)
    players: list[_Player] = [ours, _Recency(bench, theirs, "lru", keep), _Recency(bench, theirs, "evict", 1.0)]
    for step, index in enumerate(bench.trace, 1):
        say(Notice(f"step {step} of {len(bench.trace)}"))
        for player in players:
            player.step(index)
    figures = {name: told for player in players for name, told in player.figures().items()}
    return figures, placed, ours.balance


class _Player(Protocol):
    """A policy."""

    def step(self, index: int) -> None:
        """The session is asked."""

    def figures(self) -> dict[str, Any]:
        """Of all steps, by name."""


class _Tiers:
    """The trace as a worker would play it."""

    def __init__(self, bench: Bench, store: HostedStore, jobs: Jobs) -> None:
        host = int(IN_HOST * bench.cap)
        config = bench.config.replaced({"model.memory_budget": bench.cap - host, "store.host_cache": host})
        self._bench, self._opened = bench, bench.open(store, config)
        self.balance = Balance(store, config, bench.pool, jobs, lambda: self._opened)
        self._waits, self._hits, self._most = list[float](), Counter[str](), 0
        self._kls: dict[int, float] = {}

    def step(self, index: int) -> None:
        """The session is asked."""
        one, before = self._opened[index], self._found()
        held = one.residence.cache.num_seen > 0
        self._hits["memory" if held and self.balance.is_whole(one) else "memory_in_part" if held else "none"] += 1
        ready_s = timed(lambda: drain(self.balance.ready(one)), self._bench.engine.model.device)
        self._waits.append(ready_s + self._bench.ask(one, index))
        self._hits.update({f"frames_{name}": count - before[name] for name, count in self._found().items()})
        self._most = max(self._most, sum(held_bytes(each.residence) for each in self._opened))
        if index not in self._kls:
            self._kls[index] = self._bench.kl(one, index)

    def _found(self) -> dict[str, int]:
        told = self.balance.host.stats() if self.balance.host else {}
        return {name: told.get(key, 0) for name, key in FOUND.items()}

    def figures(self) -> dict[str, Any]:
        """Of all steps."""
        kl = mean(self._kls[index] for index in self._bench.trace)
        told = {"keep_ratio": self._bench.config.compress.keep_ratio, "kl": kl, "hits": dict(self._hits)}
        return {"tiers": {"ttft_s": mean(self._waits), **told, "most_bytes_in_memory": self._most}}


class _Recency:
    """Whole sessions by recency, their misses computed again, and then restored."""

    def __init__(self, bench: Bench, store: HostedStore, name: str, keep: float) -> None:
        self._bench, self._name, self._keep = bench, name, keep
        self._opened, self._recent = bench.open(store, bench.config), Recent(bench.cap)
        self._waits, self._hits = list[tuple[float, float]](), Counter[str]()
        self._kls: dict[int, float] = {}

    def step(self, index: int) -> None:
        """The session is asked."""
        bench, one, subject = self._bench, self._opened[index], self._bench.subjects[index]
        hit, gone = self._recent.use(index, int(self._keep * subject.tokens * bench.per_token))
        for other in gone:
            self._opened[other].residence.drop()
        prefill_s, restore_s = (0.0, 0.0) if hit else (_prefill_s(bench, one), _restore_s(bench, one, self._keep))
        self._hits["memory" if hit else "none"] += 1
        answer_s = bench.ask(one, index)
        self._waits.append((prefill_s + answer_s, restore_s + answer_s))
        if index not in self._kls:
            self._kls[index] = bench.kl(one, index)

    def figures(self) -> dict[str, Any]:
        """Of all steps, if what went is computed again, and if it is restored."""
        shared = {"keep_ratio": self._keep, "kl": mean(self._kls[index] for index in self._bench.trace)}
        both = zip((self._name, f"{self._name}_on_disk"), zip(*self._waits, strict=True), strict=True)
        return {name: {"ttft_s": mean(waits), **shared, "hits": dict(self._hits)} for name, waits in both}


def _prefill_s(bench: Bench, conversation: Conversation) -> float:
    """Seconds that computing all KV again takes."""
    cache, ids = bench.engine.new_cache(), Residence.ids(conversation.path)
    return timed(lambda: drain(bench.engine.prefill(cache, ids, lambda: False)), bench.engine.model.device)


def _restore_s(bench: Bench, conversation: Conversation, keep: float) -> float:
    """Seconds that restoring to a keep ratio takes."""
    conversation.residence.config = bench.config.replaced({"compress.keep_ratio": keep})
    return timed(lambda: drain(conversation.restore()), bench.engine.model.device)


def _kl(bench: Bench, store: HostedStore, keep: float) -> float:
    """Of some sessions at a keep ratio."""
    opened, kls = bench.open(store, bench.config), []
    for index in sorted(set(bench.trace))[:COMPARED]:
        _restore_s(bench, opened[index], keep)
        kls.append(bench.kl(opened[index], index))
        opened[index].residence.drop()
    return mean(kls)


def _keep(bench: Bench, store: HostedStore, kl: float) -> float:
    """The largest keep ratio whose KL is no better."""
    ratios = sorted({*bench.config.compress.rank_chunks, bench.config.compress.keep_ratio}, reverse=True)
    return next((ratio for ratio in ratios if _kl(bench, store, ratio) >= kl * 0.999), ratios[-1])


def _fit(bench: Bench, store: HostedStore) -> Placed:
    """Hold the store to its budget, if it has one, by giving up chunks and bits; what it has then."""
    records, sessions, waiting = list[SegmentRecord](), list[list[Context]](), 0
    for one in bench.open(store, bench.config):
        cover = store.cover([message.id for message in one.path], one.residence.fingerprint)
        sealed = [record for record, _ in cover if record.kind == "sealed"]
        waiting += sum(record.nbytes for record, _ in cover if record.kind != "sealed")
        sessions.append(contexts_of([of_record(record, one.info.name) for record in sealed], [1.0] * len(sealed)))
        records += sealed
    contexts, keep = [context for session in sessions for context in session], bench.config.compress.keep_ratio
    places = [Place(0, 0, chunks_within(np.array(of_record(record, "").sizes), keep)) for record in records]
    if budget := bench.config.store.disk_budget:
        places, _ = make_room(contexts, places, {DISK: budget - waiting}, Bandwidths().costs())
        for record, place in zip(records, places, strict=True):
            _apply(store, record, place)
    found, left = [], iter(zip(contexts, places, strict=True))
    for session in sessions:
        found.append([next(left) for _ in session])
    return found


def _apply(store: HostedStore, record: SegmentRecord, place: Place) -> None:
    if store.segment(record.id) is None:
        return  # two sessions begin alike, and it was written anew for the other
    store.thin(record.id, max(1, place.disk))
    if place.coarse and (thinned := store.segment(record.id)):
        recode(store, [thinned], COARSE)


def _simulated(bench: Bench, placed: Placed, figures: Mapping[str, Any]) -> dict[str, Any]:
    """The same policies on a longer trace, from what was measured alone."""
    costs, question_s = Bandwidths().costs(), mean(one.question_s for one in bench.subjects)
    costs = replace(costs, **figures["bandwidths"])
    trace = zipf(len(bench.subjects), LONG, 1)
    found = {"tiers": by_utility(trace, placed, {MEMORY: (1 - IN_HOST) * bench.cap}, costs, question_s)}
    for name in ("lru", "evict"):
        sizes = [int(figures[name]["keep_ratio"] * one.tokens * bench.per_token) for one in bench.subjects]
        again, back = [one.prefill_s for one in bench.subjects], [costs.load_s(size / 2, DISK) for size in sizes]
        found[name] = by_recency(trace, sizes, again, bench.cap, question_s)
        found[f"{name}_on_disk"] = by_recency(trace, sizes, back, bench.cap, question_s)
    return {name: {"ttft_s": one.ttft_s, "hits": one.hits} for name, one in found.items()}


def _ratios(figures: Mapping[str, Any]) -> dict[str, float]:
    """How many times as long the others wait as `tiers`."""
    names = [name for name in ("lru", "evict", "lru_on_disk", "evict_on_disk") if name in figures]
    return {f"{name}_over_tiers": figures[name]["ttft_s"] / figures["tiers"]["ttft_s"] for name in names}
