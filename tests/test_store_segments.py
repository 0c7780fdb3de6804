"""Segments and frames: writing, covering a path, reading back."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvchat.errors import CorruptFrame, StoreError
from kvchat.store.readers import Readers
from kvchat.store.store import Message, SegmentRecord, Store
from tests.store_parts import MODEL, Frames, converse, say, segment, talk

WORDS = ("one", "two", "three", "four", "five", "six")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(tmp_path / "kvchat.db")
    yield store
    store.close()


def put(store: Store, parts: tuple[SegmentRecord, Frames], replaces: tuple[str, ...] = ()) -> str:
    """Write it and give its id."""
    store.put_segment(*parts, replaces)
    return parts[0].id


def covered(store: Store, path: list[Message], fingerprint: str = "f1") -> list[tuple[str, int]]:
    """The ids and counts of a cover."""
    return [(record.id, count) for record, count in store.cover([message.id for message in path], fingerprint)]


def test_a_segment_comes_back_as_it_was_given(store: Store) -> None:
    _, chain = converse(store, "trip", *WORDS)
    record, frames = segment(chain, 0, 4)
    record = replace(record, seal_s=0.5)
    put(store, (record, frames))
    nbytes = len(record.header) + sum(len(body) for _, _, body in frames)
    stored = replace(record, nbytes=nbytes, stored_chunks=record.num_chunks)
    assert store.segment(record.id) == stored
    assert list(store.frames(record.id, range(2))) == frames
    assert store.segment("b2:other") is None and store.verify() == []


def test_frames_come_by_chunk_and_group_whatever_the_order_asked_or_written(store: Store) -> None:
    _, chain = converse(store, "trip", *WORDS)
    record, frames = segment(chain, 0, 2, num_chunks=4, num_groups=3)
    put(store, (record, frames[::-1]))
    assert list(store.frames(record.id, [2, 0, 2])) == frames[:3] + frames[6:9]
    assert list(store.frames(record.id, [])) == []


def test_a_segment_written_again_stays_as_it_is(store: Store) -> None:
    _, chain = converse(store, "trip", *WORDS)
    record, frames = segment(chain, 0, 2)
    put(store, (record, frames))
    other = [(chunk, grp, b"other") for chunk, grp, _ in frames]
    put(store, (replace(record, codec="k8v8"), other))
    found = store.segment(record.id)
    assert found is not None and found.codec == "raw"
    assert list(store.frames(record.id, [0, 1])) == frames


def test_sealing_replaces_the_open_segments(store: Store) -> None:
    _, chain = converse(store, "trip", *WORDS)
    opens = tuple(put(store, segment(chain, first, first + 2, kind="open", num_chunks=1)) for first in (0, 2, 4))
    sealed = segment(chain, 0, 4)
    put(store, sealed, opens[:2])
    assert store.segment(opens[0]) is None and store.segment(opens[1]) is None
    assert covered(store, chain) == [(sealed[0].id, 4), (opens[2], 2)]
    assert store.stats()["frames"] == 4 + 2


def test_exact_kv_that_another_branch_still_needs_is_kept(store: Store) -> None:
    _, chain = converse(store, "trip", *WORDS)
    waiting = put(store, segment(chain, 0, 2, kind="open", num_chunks=1))
    store.fork("trip", "other", chain[1].id)
    sealed = segment(chain, 0, 4)
    put(store, sealed, [waiting])
    assert covered(store, chain) == [(sealed[0].id, 4)]
    assert covered(store, chain[:2]) == [(waiting, 2)]


def test_a_sealed_segment_is_never_replaced(store: Store) -> None:
    _, chain = converse(store, "trip", *WORDS)
    first = put(store, segment(chain, 0, 2))
    put(store, segment(chain, 0, 4), (first,))
    assert store.segment(first) is not None


def test_a_write_that_fails_half_way_leaves_nothing(store: Store) -> None:
    _, chain = converse(store, "trip", *WORDS)
    waiting = put(store, segment(chain, 0, 2, kind="open", num_chunks=1))
    record, frames = segment(chain, 0, 2)

    def failing() -> Iterator[tuple[int, int, bytes]]:
        yield frames[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.put_segment(record, failing(), [waiting])
    with pytest.raises(AssertionError):
        store.put_segment(record, frames[:3], [waiting])
    assert store.segment(record.id) is None and store.segment(waiting) is not None
    assert store.stats()["frames"] == 2 and store.verify() == []


def test_a_segment_over_deleted_messages_is_refused(store: Store) -> None:
    _, chain = converse(store, "trip", *WORDS)
    store.delete("trip")
    with pytest.raises(StoreError, match="open the session again"):
        put(store, segment(chain, 0, 2))
    assert store.stats()["segments"] == 0


def test_a_dropped_segment_is_a_miss(store: Store) -> None:
    _, chain = converse(store, "trip", *WORDS)
    first, second = put(store, segment(chain, 0, 2)), put(store, segment(chain, 2, 4))
    store.drop_segment(first)
    assert covered(store, chain) == [(second, 2)]
    with pytest.raises(CorruptFrame, match=r"segment b2:sealed-\w+ is not in the store"):
        list(store.frames(first, [0]))
    put(store, segment(chain, 0, 2))
    assert covered(store, chain) == [(first, 2), (second, 2)]


def test_a_missing_frame_names_segment_and_chunk(store: Store) -> None:
    _, chain = converse(store, "trip", *WORDS)
    identity = put(store, segment(chain, 0, 2, num_chunks=3))
    store._db.execute("DELETE FROM frames WHERE chunk = 1 AND grp = 1")
    assert len(list(store.frames(identity, [0, 2]))) == 4
    with pytest.raises(CorruptFrame, match=r"segment b2:sealed-\w+ chunk 1: group 1 is missing"):
        list(store.frames(identity, [0, 1]))


def test_frames_are_read_by_many_threads_at_once_and_only_then(store: Store) -> None:
    _, chain = converse(store, "trip", *WORDS)
    record, frames = segment(chain, 0, 4, num_chunks=4, num_groups=3)
    identity = put(store, (record, frames))
    readings = [*store.readings(identity, range(4))] * 20
    with ThreadPoolExecutor(6) as pool:
        bodies = list(pool.map(lambda reading: reading[2](), readings))
    assert [(chunk, group, body) for (chunk, group, _), body in zip(readings, bodies, strict=True)] == frames * 20
    store._db.execute("DELETE FROM frames WHERE chunk = 1 AND grp = 1")
    with pytest.raises(CorruptFrame, match=r"segment b2:sealed-\w+ chunk 1: group 1 is missing"):
        [read() for *_, read in store.readings(identity, [0, 1])]
    gone = [*store.readings(identity, [0])]
    store.drop_segment(identity)
    put(store, segment(chain, 0, 2, num_chunks=4, num_groups=3))  # which takes over its rows' numbers
    with pytest.raises(CorruptFrame, match=r"chunk 0: group 0 is missing"):
        gone[0][2]()
    with pytest.raises(CorruptFrame, match="is not in the store"):
        list(store.readings(identity, [0]))


def test_frames_are_read_from_the_file_that_was_opened_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    store = Store(Path("relative.db"))
    _, chain = converse(store, "trip", *WORDS)
    record, frames = segment(chain, 0, 2)
    identity = put(store, (record, frames))
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert [read() for *_, read in store.readings(identity, range(2))] == [body for *_, body in frames]
    readings = [*store.readings(identity, [0])]
    with closing(store):
        reading = store._readers._taken()
        assert reading is not None
    store._readers._give_back(reading)
    with pytest.raises(sqlite3.ProgrammingError, match="closed"):
        reading.execute("SELECT 1")
    with pytest.raises(StoreError, match="is closed"):
        readings[0][2]()
    assert not list(Path().iterdir())
    moved = Readers(tmp_path / "gone.db", 1)
    with pytest.raises(StoreError, match="cannot be opened"):
        moved.blob("frames", "body", "rowid = ?", (1,))
    assert not (tmp_path / "gone.db").exists()


def test_reading_frames_holds_no_lock_between_them(store: Store) -> None:
    _, chain = converse(store, "trip", *WORDS)
    identity = put(store, segment(chain, 0, 2))
    reading = store.frames(identity, [0, 1])
    next(reading)
    other = Store(store.file, busy_timeout_s=0)
    other.vacuum()
    other.close()
    assert len(list(reading)) == 3


def test_a_rewind_inside_a_segment_is_a_view_of_its_beginning(store: Store) -> None:
    _, chain = converse(store, "trip", *WORDS)
    first, second = put(store, segment(chain, 0, 2)), put(store, segment(chain, 2, 6))
    assert covered(store, chain) == [(first, 2), (second, 4)]
    assert covered(store, chain[:3]) == [(first, 2), (second, 1)]
    edited = [*chain[:4], say(chain[3], "user", "edited")]
    assert covered(store, edited) == [(first, 2), (second, 2)]
    assert covered(store, chain[:2]) == [(first, 2)]


def test_a_segment_from_a_file_serves_whole_or_not_at_all(store: Store) -> None:
    _, chain = converse(store, "trip", *WORDS)
    record, frames = segment(chain, 0, 4)
    theirs = put(store, (replace(record, from_file=True), frames))
    found = store.segment(theirs)
    assert found is not None and found.from_file
    assert covered(store, chain) == [(theirs, 4)] and covered(store, chain[:4]) == [(theirs, 4)]
    assert covered(store, chain[:3]) == []
    assert covered(store, [*chain[:3], say(chain[2], "assistant", "another")]) == []
    mine = put(store, segment(chain, 0, 3))
    assert covered(store, chain[:3]) == [(mine, 3)] and covered(store, chain) == [(theirs, 4)]


def test_a_gap_is_left_out(store: Store) -> None:
    _, chain = converse(store, "trip", *WORDS)
    middle = put(store, segment(chain, 2, 4))
    assert covered(store, chain) == [(middle, 2)]
    assert covered(store, []) == []


def test_another_fingerprint_is_a_miss(store: Store) -> None:
    _, chain = converse(store, "trip", *WORDS)
    mine, theirs = put(store, segment(chain, 0, 2)), put(store, segment(chain, 0, 6, fingerprint="f2"))
    assert covered(store, chain) == [(mine, 2)]
    assert covered(store, chain, "f2") == [(theirs, 6)]
    assert covered(store, chain, "f3") == []


def test_at_equal_start_more_messages_win_then_the_one_that_ends_there_then_sealed(store: Store) -> None:
    _, chain = converse(store, "trip", *WORDS)
    waiting = put(store, segment(chain, 0, 2, kind="open"))
    sealed = put(store, segment(chain, 0, 2))
    longer = put(store, segment(chain, 0, 4))
    assert covered(store, chain) == [(longer, 4)]
    assert covered(store, chain[:2]) == [(sealed, 2)]
    store.drop_segment(sealed)
    assert covered(store, chain[:2]) == [(waiting, 2)]
    store.drop_segment(waiting)
    assert covered(store, chain[:2]) == [(longer, 2)]


def test_a_segment_that_starts_before_the_path_asked_for_is_no_help(store: Store) -> None:
    _, chain = converse(store, "trip", *WORDS)
    put(store, segment(chain, 0, 4))
    later = put(store, segment(chain, 2, 6))
    assert covered(store, chain[2:]) == [(later, 4)]


def test_a_path_of_thousands_is_covered(store: Store) -> None:
    _, chain = converse(store, "long", *(f"message {number}" for number in range(2000)))
    ids = [put(store, segment(chain, first, first + 200, tag=str(first))) for first in range(0, 2000, 200)]
    assert covered(store, chain) == [(identity, 200) for identity in ids]


def test_forks_share_segments(store: Store) -> None:
    _, chain = converse(store, "trip", *WORDS)
    first, second = put(store, segment(chain, 0, 2)), put(store, segment(chain, 2, 6))
    fork = store.fork("trip", "trip-2", chain[3].id)
    own = talk(chain[3], "five, differently")
    store.add_messages(fork.id, own, chain[3].id)
    third = put(store, segment([*chain[:4], *own], 4, 5))
    assert covered(store, [*chain[:4], *own]) == [(first, 2), (second, 2), (third, 1)]
    assert covered(store, chain) == [(first, 2), (second, 4)]
    assert store.stats()["segments"] == 3


def plainly(path: list[str], records: list[SegmentRecord]) -> list[tuple[str, int]]:
    """The definition of `cover`, word for word and slow."""
    chosen, index = [], 0
    while index < len(path):
        best: tuple[tuple[int, bool, bool, int, str], str, int] | None = None
        for record in records:
            count = 0
            while record.messages[: count + 1] == tuple(path[index : index + count + 1]) and count < len(
                record.messages
            ):
                count += 1
            beyond = count < len(record.messages)
            order = (-count, beyond, record.kind != "sealed", record.end, record.id)
            if count and not (beyond and record.from_file) and (best is None or order < best[0]):
                best = order, record.id, count
        if best is not None:
            chosen.append((best[1], best[2]))
        index += best[2] if best is not None else 1
    return chosen


spans = st.tuples(st.integers(0, 7), st.integers(1, 8), st.sampled_from(["sealed", "open"]), st.booleans())


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(spans, max_size=12), st.integers(0, 8), st.integers(0, 8), st.booleans())
def test_cover_is_what_its_definition_says(
    store: Store, parts: list[tuple[int, int, str, bool]], shared: int, length: int, on_fork: bool
) -> None:
    for record in [store.segment(row["id"]) for row in store._rows("SELECT id FROM segments")]:
        assert record is not None
        store.drop_segment(record.id)
    main = talk(None, *(f"m{number}" for number in range(8)))
    fork = [*main[:shared], *talk(main[shared - 1] if shared else None, *(f"fork {n}" for n in range(8 - shared)))]
    name = f"s{len(store.sessions())}"
    info = store.create_session(name, MODEL, {})
    store.add_messages(info.id, main, None)
    store.set_tip(info.id, None)
    store.add_messages(info.id, fork, None)
    for number, (first, size, kind, foreign) in enumerate(parts):
        path = fork if number % 2 else main
        fingerprint = "f2" if foreign else "f1"
        last = min(8, first + size)
        record, frames = segment(path, first, last, kind, fingerprint, str(number), 1, 1)  # type: ignore[arg-type]
        put(store, (replace(record, from_file=number % 3 == 0), frames))
    asked = [message.id for message in (fork if on_fork else main)[:length]]
    records = [store.segment(row["id"]) for row in store._rows("SELECT id FROM segments")]
    usable = [record for record in records if record is not None and record.fingerprint == "f1"]
    assert [(record.id, count) for record, count in store.cover(asked, "f1")] == plainly(asked, usable)


def test_what_segments_share_is_stored_once_and_goes_with_the_last(store: Store) -> None:
    _, chain = converse(store, "trip", *WORDS)
    ids = [put(store, (replace(record, basis=b"shared"), frames)) for record, frames in pairs(chain)]
    found = [store.segment(identity) for identity in ids]
    assert [one.basis for one in found if one] == [b"shared", b"shared"]
    assert count_bases(store) == 1
    store.drop_segment(ids[0])
    assert count_bases(store) == 1
    store.drop_segment(ids[1])
    assert count_bases(store) == 0


def pairs(chain: list[Message]) -> list[tuple[SegmentRecord, Frames]]:
    """Two segments that follow each other."""
    return [segment(chain, 0, 2), segment(chain, 2, 4)]


def count_bases(store: Store) -> int:
    """Rows of the table."""
    return len(store._rows("SELECT id FROM bases"))
