"""Frames in host memory: served as the store has them, kept by what they are worth, read ahead without waiting."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from kvchat.bandwidths import START, Bandwidths
from kvchat.codecs import frame
from kvchat.codecs.frame import Sound, check, pack
from kvchat.errors import CorruptFrame, StoreDamaged
from kvchat.residence.host import HostCache, HostedStore
from tests.store_parts import converse, segment

GROUPS = 2


class Below:
    """Segments of 3 chunks, whose frames tell their place; counts what is read."""

    def __init__(self) -> None:
        self.reads: list[tuple[str, int, int]] = []
        self.version = 0
        self.damaged: set[str] = set()
        self.gate = threading.Event()
        self.gate.set()

    def fetch(self, segment_id: str, chunks: Sequence[int]) -> Iterator[tuple[int, int, partial[bytes]]]:
        if segment_id == "gone":
            raise CorruptFrame("gone")
        for chunk in sorted(set(chunks)):
            for group in range(GROUPS):
                yield chunk, group, partial(self.body, segment_id, chunk, group)

    def body(self, segment_id: str, chunk: int, group: int) -> bytes:
        self.gate.wait(5)
        self.reads.append((segment_id, chunk, group))
        blob = pack({"of": segment_id, "version": self.version, "place": [chunk, group]}, {})
        return blob[:-1] if segment_id in self.damaged else blob


SIZE = len(Below().body("a", 0, 0))


@pytest.fixture
def below() -> Below:
    return Below()


@pytest.fixture
def pool() -> Iterator[Executor]:
    with ThreadPoolExecutor(2) as pool:
        yield pool


def read(host: HostCache, segment_id: str, chunks: Sequence[int]) -> list[tuple[int, int, bytes]]:
    return [(chunk, group, reader()) for chunk, group, reader in host.fetch(segment_id, chunks)]


def settled(host: HostCache, pool: Executor) -> None:
    """Wait until what is read ahead is there."""
    for _ in range(2):
        pool.submit(lambda: None).result()
    for future in host._ahead:
        if not future.cancelled():
            future.result()


def test_what_was_read_is_served_again_in_order_without_reading(below: Below, pool: Executor) -> None:
    host = HostCache(below.fetch, pool, 100 * SIZE, lambda *_: 1.0)
    plain = [(c, g, below.body("a", c, g)) for c in range(3) for g in range(GROUPS)]
    assert read(host, "a", [1]) == plain[2:4]
    assert read(host, "a", [2, 0, 1]) == plain
    below.reads.clear()
    assert read(host, "a", range(3)) == plain and below.reads == []
    stats = host.stats()
    assert (stats["hits"], stats["misses"], stats["frames"], stats["nbytes"]) == (2 + 6, 2 + 4, 6, 6 * SIZE)
    assert host.chunks() == {"a": 3}
    assert stats["hit_bytes"] == 8 * SIZE and stats["miss_bytes"] == 6 * SIZE


def test_a_chunk_of_which_a_frame_is_missing_is_read_whole(below: Below, pool: Executor) -> None:
    host = HostCache(below.fetch, pool, SIZE, lambda *_: 1.0)
    read(host, "a", [0])
    assert host.stats()["frames"] == 1
    below.reads.clear()
    assert len(read(host, "a", [0])) == GROUPS == len(below.reads)


@pytest.mark.parametrize("seed", range(10))
def test_what_stays_is_what_is_worth_most(below: Below, pool: Executor, seed: int) -> None:
    source = random.Random(seed)
    worths = {(name, chunk): source.random() for name in "abcdef" for chunk in range(3)}
    host = HostCache(below.fetch, pool, 4 * GROUPS * SIZE, lambda name, chunk: worths[name, chunk])
    kept: list[tuple[str, int]] = []
    for name in source.sample("abcdef", 6):
        for chunk in source.sample(range(3), 3):
            read(host, name, [chunk])
            kept = sorted([*kept, (name, chunk)], key=lambda one: -worths[one])[:4]  # plainly
            assert {key[:2] for key in host._frames} == set(kept)
            assert host.stats()["nbytes"] <= host.cap


def test_what_has_become_worth_less_gives_way(below: Below, pool: Executor) -> None:
    worths = {"a": 5.0, "b": 1.0, "c": -1.0}
    host = HostCache(below.fetch, pool, GROUPS * SIZE, lambda name, _: worths[name])
    for name in "abc":
        read(host, name, [0])
    assert {key[0] for key in host._frames} == {"a"}
    worths["a"] = 0.5
    host.rate()
    read(host, "b", [0])
    assert {key[0] for key in host._frames} == {"b"}


def test_another_version_of_a_segment_is_read_anew_and_a_dropped_one_too(below: Below, pool: Executor) -> None:
    host = HostCache(below.fetch, pool, 100 * SIZE, lambda *_: 1.0, lambda _: below.version)
    old = read(host, "a", [0])
    below.version = 1
    assert read(host, "a", [0]) != old and len(below.reads) == 2 * GROUPS
    host.forget("a")
    assert host.stats()["nbytes"] == 0
    read(host, "a", [0])
    assert len(below.reads) == 3 * GROUPS


def test_what_is_read_again_after_it_was_dropped_gives_up_its_bytes_once(pool: Executor) -> None:
    sizes, worths = {"a": 10, "b": 10, "c": 20}, {"a": 1.0, "b": 2.0, "c": 3.0}

    def fetch(name: str, chunks: Sequence[int]) -> Iterator[tuple[int, int, partial[bytes]]]:
        yield from ((chunk, 0, partial(bytes, bytearray(b"x" * sizes[name]))) for chunk in chunks)

    host = HostCache(fetch, pool, 20, lambda name, _: worths[name])
    read(host, "a", [0])
    host.forget("a")
    for name in "abc":
        read(host, name, [0])
        assert host.stats()["nbytes"] == sum(map(len, host._frames.values())) <= host.cap
    assert host.chunks() == {"c": 1}


def test_what_the_store_has_no_more_is_dropped_when_that_is_told(below: Below, pool: Executor) -> None:
    host = HostCache(below.fetch, pool, 100 * SIZE, lambda *_: 1.0)
    for name in "ab":
        read(host, name, [0])
    host.forget_all_but(["b", "c"])
    assert host.chunks() == {"b": 1} and host.stats()["nbytes"] == GROUPS * SIZE


def test_reading_ahead_does_not_wait_and_gives_way_to_who_reads(below: Below, pool: Executor) -> None:
    host = HostCache(below.fetch, pool, 100 * SIZE, lambda *_: 1.0)
    below.gate.clear()
    host.prefetch({"a": 3, "b": 3, "gone": 1})  # returns while nothing can be read
    asked = host.fetch("c", [0])
    readers = [reader for *_, reader in asked]
    below.gate.set()
    assert all(reader() for reader in readers)
    settled(host, pool)
    assert len([place for place in below.reads if place[0] != "c"]) <= 2  # that were begun; the others were put off
    host.prefetch({"a": 2})
    settled(host, pool)
    below.reads.clear()
    assert len(read(host, "a", [0, 1])) == 2 * GROUPS and below.reads == []


def test_what_is_read_ahead_and_damaged_is_not_kept(below: Below, pool: Executor) -> None:
    host = HostCache(below.fetch, pool, 100 * SIZE, lambda *_: 1.0)
    below.damaged.add("a")
    host.prefetch({"a": 3})
    settled(host, pool)
    assert host.stats()["frames"] == 0 and len(below.reads) == 3 * GROUPS


def test_a_frame_is_hashed_when_it_is_first_served_and_not_again(
    below: Below, pool: Executor, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed, digest = list[int](), frame._digest

    def counted(*parts: Any) -> bytes:
        hashed.append(1)
        return digest(*parts)

    monkeypatch.setattr(frame, "_digest", counted)
    host = HostCache(below.fetch, pool, 100 * SIZE, lambda *_: 1.0)
    plain = read(host, "a", [0])
    hashed.clear()  # by who packed them
    for _ in range(3):
        served = read(host, "a", [0])
        assert served == plain and all(isinstance(blob, Sound) for *_, blob in served)
        for *_, blob in served:
            check(blob)
    assert len(hashed) == GROUPS
    host.prefetch({"c": 1})
    settled(host, pool)
    hashed.clear()
    read(host, "c", [0])
    assert not hashed


def test_a_frame_that_nobody_checked_is_not_served_damaged(below: Below, pool: Executor) -> None:
    host = HostCache(below.fetch, pool, 100 * SIZE, lambda *_: 1.0)
    below.damaged.add("a")
    read(host, "a", [0])  # by who decodes nothing
    with pytest.raises(CorruptFrame):
        read(host, "a", [0])


def test_many_threads_read_at_once(below: Below, pool: Executor) -> None:
    host = HostCache(below.fetch, pool, 7 * SIZE, lambda name, chunk: hash((name, chunk)) % 7 + 1.0)
    for _ in range(20):
        readers = [(n, c, g, reader) for n in "abcdef" for c, g, reader in host.fetch(n, range(3))]
        with ThreadPoolExecutor(8) as threads:
            bodies = [*threads.map(lambda one: one[3](), readers)]
        plain = {(n, c, g): pack({"of": n, "version": 0, "place": [c, g]}, {}) for n, c, g, _ in readers}
        assert bodies == [plain[n, c, g] for n, c, g, _ in readers]
        assert host.stats()["nbytes"] == sum(map(len, host._frames.values())) <= host.cap
        host.rate()


def test_a_store_reads_through_it_and_forgets_what_it_drops(tmp_path: Path, pool: Executor) -> None:
    store = HostedStore(tmp_path / "s.db")
    _, path = converse(store, "trip", "a", "b")
    record, frames = segment(path, 0, 2)
    store.put_segment(record, frames)
    host, bandwidths = store.serve_from(pool, 1 << 20, lambda *_: 1.0, Bandwidths()), Bandwidths()
    assert host is not None and bandwidths.figures() == pytest.approx(START)
    for _ in range(2):
        assert [(c, g, reader()) for c, g, reader in store.readings(record.id, [0, 1])] == frames
    assert (host.stats()["hits"], host.stats()["misses"]) == (4, 4)
    assert store.frame_bytes([record.id, "none"]) == {record.id: len(record.header) + sum(len(f[2]) for f in frames)}
    store.drop_segment(record.id)
    assert host.stats()["frames"] == 0
    with pytest.raises(CorruptFrame):
        [*store.readings(record.id, [0])]
    store.put_segment(record, frames)
    store.read_ahead({record.id: 2})
    settled(host, pool)
    assert host.stats()["frames"] == 4
    store.close()


def test_a_damaged_page_is_a_miss_and_keeps_nothing_else_from_being_read_ahead(tmp_path: Path, pool: Executor) -> None:
    store = HostedStore(tmp_path / "s.db")
    _, path = converse(store, "trip", "a", "b")
    record, frames = segment(path, 0, 2)
    store.put_segment(record, frames)
    host, rows = store.serve_from(pool, 1 << 20, lambda *_: 1.0), store._rows

    def damaged(sql: str, **values: object) -> list[Any]:
        if "bad" in str(values):
            raise StoreDamaged("a page") from ValueError("malformed")
        return rows(sql, **values)

    store._rows = damaged  # type: ignore[method-assign]
    with pytest.raises(CorruptFrame):
        [*store.readings("bad", [0])]
    store.read_ahead({"bad": 1, record.id: 2})
    assert host is not None
    settled(host, pool)
    assert host.chunks() == {record.id: 2}
    store.close()


def test_bandwidths_follow_what_is_measured() -> None:
    bandwidths = Bandwidths()
    for _ in range(200):
        bandwidths.add_read(10**6, 0.01)
        bandwidths.add_load(10**6, 0.05, 0.01)
        bandwidths.add_prefill(100, 1.0)
    bandwidths.add_load(0, 1.0)
    bandwidths.add_load(5, 0.0)
    assert bandwidths.figures() == pytest.approx({"disk": 1e8, "decode": 2.5e7, "prefill": 100}, rel=0.01)
    assert bandwidths.read_s == pytest.approx(2.0)
    assert bandwidths.costs().prefill == pytest.approx(100, rel=0.01)
