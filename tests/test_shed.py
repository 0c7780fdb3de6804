"""The disk budget: what gives way, in which order, and that memory holds what the store holds."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvchat.codecs.frame import pack
from kvchat.errors import CorruptFrame
from kvchat.sections import CODEC_NAMES
from kvchat.store.shed import BITS, Allowance, Holding, Room, Sacrifice, bits, free_bytes, grouped, sacrifices
from kvchat.store.store import Kind, Message, SegmentRecord, Store
from tests.store_parts import FINGERPRINT, MODEL, Frames, converse, segment, talk

CHUNKS, CHUNK_BYTES = 4, 40_000
SMALL = 400_000
"""More than the empty tables and the text of a few messages take."""

rng = np.random.default_rng(0)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(tmp_path / "kvchat.db")
    yield store
    store.close()


def weigh(parts: tuple[SegmentRecord, Frames], nbytes: int = CHUNK_BYTES) -> tuple[SegmentRecord, Frames]:
    """A segment with frames of so many bytes, which cannot be compressed."""
    record, frames = parts
    plane = rng.integers(0, 256, nbytes, np.uint8)
    return record, [(chunk, grp, pack({}, {"rows": plane})) for chunk, grp, _ in frames]


def sealed(path: Sequence[Message], first: int, last: int, tag: str = "", **shape: Any) -> tuple[SegmentRecord, Frames]:
    """Four chunks of 40 kB."""
    return weigh(segment(path, first, last, tag=tag, **{"num_chunks": CHUNKS, "num_groups": 1, **shape}))


def fill(store: Store, names: str, segments: int = 2) -> dict[str, list[str]]:
    """A session for each letter, the first the coldest, with so many segments; the ids of these."""
    ids: dict[str, list[str]] = {}
    for name in names:
        _, chain = converse(store, name, *(f"{name}{number}" for number in range(2 * segments)))
        parts = [sealed(chain, 2 * number, 2 * number + 2) for number in range(segments)]
        assert all(store.put_segment(*one) for one in parts)
        ids[name] = [record.id for record, _ in parts]
    return ids


def stored(store: Store, ids: dict[str, list[str]]) -> dict[str, list[int]]:
    """How many chunks each segment has left."""
    return {name: [store.stored_chunks(each).get(one, 0) for one in each] for name, each in ids.items()}


def limit(store: Store, disk_budget: int, **rest: Any) -> None:
    """Set a budget; `held` says how many chunks memory would hold of each."""
    held = rest.pop("held", 2)
    store.allowance = Allowance(
        disk_budget, held=lambda records, end: [min(held, one.stored_chunks) for one in records], **rest
    )


def in_use(store: Store) -> int:
    return store.room().in_use


def keeps_to(store: Store) -> bool:
    """Whether the budget holds, or nothing but text is left."""
    return in_use(store) <= store.room().allowed or store.stats()["segments"] == 0


# -- what goes first -------------------------------------------------------------------------------------------------


def test_cold_sessions_give_way_step_by_step_and_open_ones_last(store: Store) -> None:
    ids = fill(store, "abc")
    opened = {store.session("a").id}
    total, seen = in_use(store), []
    for budget in range(total, SMALL // 2, -20_000):
        limit(store, budget, spared=lambda _: opened)
        store.shed()
        assert store.verify() == []
        state = stored(store, ids)
        seen += [state] if not seen or state != seen[-1] else []
    steps = [[state[name] for state in seen] for name in "bca"]
    whole, first, gone = [4, 4], [1, 1], [0, 0]
    b, c, a = steps
    assert b[0] == c[0] == a[0] == whole and seen[-1] == {"a": gone, "b": gone, "c": gone}
    for now_b, now_c, now_a in zip(b, c, a, strict=True):
        if now_c != whole:
            assert max(now_b) <= 2  # the colder one has given what memory would not hold
        if min(now_b) < 2:
            assert max(now_c) <= 2
        if now_b == gone:
            assert max(now_c) <= 1
        if now_c == gone:
            assert now_b == gone
        if now_a != whole:
            assert now_b == now_c == gone
    assert [1, 1] in b and [2, 2] in b and [1, 1] in c and first in a


def test_the_last_chunk_of_all_segments_goes_before_the_one_before_it(store: Store) -> None:
    ids = fill(store, "a", segments=3)
    states = []
    for budget in range(in_use(store), SMALL // 2, -30_000):
        limit(store, budget, held=1)
        store.shed()
        states += [stored(store, ids)["a"]]
    assert all(max(state) - min(state) <= 1 for state in states)
    assert [3, 4, 4] in states and [2, 2, 3] in states


def test_fewer_bits_come_before_text_only_and_not_for_open_sessions(store: Store) -> None:
    ids = fill(store, "ab")
    calls: list[tuple[list[str], str, list[int]]] = []

    def recode(records: Sequence[SegmentRecord], codec: str) -> None:
        calls.append(([record.id for record in records], codec, [record.stored_chunks for record in records]))
        for record in records:  # half of the bytes
            store._db.execute("UPDATE segments SET codec = ? WHERE id = ?", [codec, record.id])
            store._db.execute("UPDATE frames SET body = substr(body, 1, 20000) WHERE segment_id = ?", [record.id])
        store._db.conn.commit()

    store._db.execute("UPDATE segments SET codec = 'k8v8'")
    store._db.conn.commit()
    opened = {store.session("b").id}
    limit(store, 1, recode=recode, spared=lambda _: opened)
    store.shed()
    first, second = ids["a"]
    assert calls == [([first], "k4v4", [1]), ([second], "k4v4", [1]), ([first, second], "archive", [1, 1])]
    assert store.stats()["segments"] == 0


def test_a_recoding_that_makes_room_saves_what_is_left(store: Store) -> None:
    ids = fill(store, "ab")
    store._db.execute("UPDATE segments SET codec = 'k8v8'")
    store._db.conn.commit()

    def recode(records: Sequence[SegmentRecord], codec: str) -> None:
        with store._write():
            for record in records:
                store._db.execute("DELETE FROM segments WHERE id = ?", [record.id])

    limit(store, in_use(store) - 2 * 2 * 3 * CHUNK_BYTES - CHUNK_BYTES, recode=recode)
    store.shed()
    assert stored(store, ids)["b"] == [1, 1] and sum(stored(store, ids)["a"]) == 1


def test_a_session_that_was_opened_meanwhile_is_not_recoded_and_goes_last(store: Store) -> None:
    ids = fill(store, "abc")
    store._db.execute("UPDATE segments SET codec = 'k8v8'")
    store._db.conn.commit()
    opened, asked = set[int](), list[set[int]]()
    cold, others = store.session("a").id, {store.session("b").id, store.session("c").id}
    fork = store.fork("a", "fork", store.path(store.session("a").tip)[0].id).id  # holds a part of the first segment

    @contextmanager
    def closed(sessions: Collection[int]) -> Iterator[bool]:
        asked.append({*sessions})
        opened.add(cold)
        yield cold not in sessions

    recoded: list[str] = []
    limit(
        store,
        in_use(store) - 19 * CHUNK_BYTES,
        held=1,
        recode=lambda records, codec: recoded.extend(record.id for record in records),
        closed=closed,
        spared=lambda _: opened,
    )
    store.shed()
    assert {cold, fork} in asked and {cold} in asked
    assert {*recoded} == {*ids["b"], *ids["c"]} and all(not one & others or one <= others for one in asked)
    state = stored(store, ids)
    assert state == {"a": [1, 1], "b": [0, 0], "c": [1, 1]} and keeps_to(store)


def test_a_segment_is_as_warm_as_the_warmest_session_that_reaches_one_of_its_messages(store: Store) -> None:
    ids = fill(store, "ab")
    chain = store.path(store.session("a").tip)
    fork = store.fork("a", "fork", chain[1].id)  # reaches the first of the two segments
    store.add_messages(fork.id, talk(chain[1], "more"), chain[1].id)
    # All that no open session reaches goes first.
    limit(store, in_use(store) - 3 * CHUNKS * CHUNK_BYTES, held=4, spared=lambda _: {fork.id})
    store.shed()
    assert stored(store, ids) == {"a": [4, 0], "b": [0, 0]}


def test_what_memory_would_hold_is_asked_for_each_session_with_its_end(store: Store) -> None:
    fill(store, "ab")
    asked: list[tuple[int, int]] = []

    def held(records: Sequence[SegmentRecord], end: int) -> list[int]:
        asked.append((len(records), end))
        return [1 for _ in records]

    store.allowance = Allowance(1, held=held)
    store.shed()
    assert asked == [(2, store.session(name).num_tokens) for name in "ab"]


# -- order, against its definition -----------------------------------------------------------------------------------

trees = st.lists(st.tuples(st.integers(0, 12), st.booleans()), min_size=1, max_size=12)


@given(trees, st.data())
def test_warmth_is_what_its_definition_says(tree: list[tuple[int, bool]], data: st.DataObject) -> None:
    parents = {number: parent for number, (parent, _) in enumerate(tree, 1) if 0 < parent < number}
    numbers = st.integers(1, len(tree))
    tips = data.draw(st.lists(numbers, min_size=1, max_size=5))
    ends = [{"session_id": n, "updated": str(n % 3), "number": tip} for n, tip in enumerate(tips, 1)]
    spared = data.draw(st.sets(st.integers(1, 5)))
    owner = data.draw(st.none() | st.integers(1, 5))
    rows = [
        {"id": f"s{number}", "start_token": 0, "kind": "sealed", "codec": "raw", "stored_chunks": 1, "number": number}
        for number in parents.keys() | set(tips)
    ]

    def reaches(tip: int | None, number: int) -> bool:
        while tip is not None and tip != number:
            tip = parents.get(tip)
        return tip == number

    def warmth(number: int) -> tuple[int, str, int]:
        reached = [end for end in ends if reaches(end["number"], number)]  # type: ignore[arg-type]
        ranks = [
            (2, "", 0) if e["session_id"] == owner else (int(e["session_id"] in spared), e["updated"], e["session_id"])
            for e in reached
        ]
        return max(ranks, default=(0, "", 0))  # type: ignore[arg-type, type-var]

    groups = grouped(ends, parents, rows, spared, owner)  # type: ignore[arg-type]
    found = [[sorted(one.id for one in session) for session in group] for group in groups]
    keys = {row["id"]: warmth(row["number"]) for row in rows}  # type: ignore[arg-type]
    expected = [
        [sorted(str(one) for one in keys if keys[one] == each) for each in sorted({*keys.values()}) if each[0] == group]
        for group in range(3)
    ]
    assert found == expected


def holding(name: str, chunks: int, codec: str = "k8v8", sealed: bool = True) -> Holding:
    return Holding(name, int(name[1:]), sealed, codec, chunks)


def test_the_order_of_sacrifice_in_full() -> None:
    a, b = [holding("a0", 3), holding("a1", 2, sealed=False)], [holding("b0", 2, "k4v4"), holding("b1", 3)]
    c, d = [holding("c0", 2)], [holding("d0", 2), holding("d1", 2)]
    held = {"a0": 2, "b0": 2, "b1": 1, "c0": 5, "d0": 1, "d1": 1}
    found = list(sacrifices([[a, b], [c], [d]], lambda _: held, ("k4v4", "archive"), "d1"))
    assert found == [
        *[Sacrifice(("a0",), 2), Sacrifice(("b1",), 2), Sacrifice(("b1",), 1)],
        *[Sacrifice(("a0",), 1), Sacrifice(("b0",), 1)],
        *[Sacrifice(("a0",), codec="k4v4"), Sacrifice(("b1",), codec="k4v4")],
        *[Sacrifice(("a0",), codec="archive"), Sacrifice(("b0", "b1"), codec="archive")],
        *[Sacrifice(("a0", "a1")), Sacrifice(("b0", "b1"))],
        *[Sacrifice(("c0",), 1), Sacrifice(("c0",))],
        *[Sacrifice(("d0",), 1), Sacrifice(("d1",), 1), Sacrifice(("d1",)), Sacrifice(("d0", "d1"))],
    ]


def test_what_is_archived_already_lends_its_basis_to_what_comes_after() -> None:
    session = [holding("a0", 1, "archive"), holding("a1", 1), holding("a2", 1, "newer"), holding("a3", 1, sealed=False)]
    found = list(sacrifices([[session], [], []], lambda _: {}, ("archive",)))
    assert found == [Sacrifice(("a0", "a1"), codec="archive"), Sacrifice(("a0", "a1", "a2", "a3"))]
    session = [holding("a0", 1, "archive"), holding("a2", 1, "newer")]
    assert list(sacrifices([[session], [], []], lambda _: {}, ("archive",))) == [Sacrifice(("a0", "a2"))]


@pytest.mark.parametrize(
    ("codec", "size"), [("raw", 11), ("k8v8,k4v4", 8.2), ("eb2", 5.9), ("k4v4", 4.6), ("archive", 1.9), ("newer", 0)]
)
def test_what_counts_as_fewer_bits(codec: str, size: float) -> None:
    assert bits(codec) == size


def test_every_codec_has_its_bits_and_the_rungs_go_down() -> None:
    assert BITS.keys() == {*CODEC_NAMES, "archive"}
    assert bits("eb5") <= bits("k4v4") < bits("eb2") < bits("k8v4") and bits("archive") == min(BITS.values())


def test_the_lower_limit_counts_and_is_named() -> None:
    room = Room(in_use=100, reusable=20, free=50, disk_budget=0, min_free=0)
    assert room.allowed == float("inf") and room.limit == ""
    assert (replace(room, min_free=60).allowed, replace(room, min_free=60).limit) == (110, "store.min_free")
    both = replace(room, min_free=60, disk_budget=105)
    assert (both.allowed, both.limit) == (105, "store.disk_budget")


# -- writing ---------------------------------------------------------------------------------------------------------


def test_a_new_segment_makes_cold_ones_give_way_and_is_whole(store: Store) -> None:
    ids = fill(store, "ab")
    info, chain = converse(store, "c", "one", "two")
    limit(store, in_use(store) + 50_000)
    assert store.put_segment(*sealed(chain, 0, 2), owner=info.id)
    assert keeps_to(store) and store.verify() == []
    assert stored(store, ids) == {"a": [2, 2], "b": [4, 4]}
    assert store.session("a").stored == pytest.approx(0.5) and store.session("b").stored == 1


def test_the_worst_chunks_of_a_new_segment_go_with_those_of_its_own_session(store: Store) -> None:
    ids = fill(store, "a", segments=3)
    info, chain = store.session("a"), store.path(store.session("a").tip)
    more = talk(chain[-1], "more", "and more")
    store.add_messages(info.id, more, chain[-1].id)
    record, frames = sealed([*chain, *more], 6, 8)
    ids["a"].append(record.id)
    limit(store, in_use(store) + 10_000, held=4)
    assert store.put_segment(record, frames, owner=info.id)
    state = stored(store, ids)["a"]
    assert state == sorted(state) and state[0] == state[-1] - 1 and keeps_to(store)
    while state[-1] > 3:
        limit(store, in_use(store) - 1, held=4)
        store.shed()
        state = stored(store, ids)["a"]
    assert list(store.frames(record.id, range(3))) == frames[:3]
    with pytest.raises(CorruptFrame, match="chunk 3: group 0 is missing"):
        list(store.frames(record.id, [3]))
    kept = store.segment(record.id)
    assert kept is not None and kept.nbytes == len(record.header) + sum(len(body) for _, _, body in frames[:3])


def test_what_has_no_room_is_not_written_and_nobody_gives_way_for_it(store: Store) -> None:
    fill(store, "a", segments=1)
    info, chain = converse(store, "b", "one", "two", "three", "four")
    waiting = weigh(segment(chain, 0, 2, kind="open", num_chunks=1, num_groups=1), 20_000)
    assert store.put_segment(*waiting, owner=info.id)
    limit(store, in_use(store))
    large = weigh(segment(chain, 0, 4, num_chunks=1, num_groups=1), 2_000_000)
    assert not store.put_segment(*large, [waiting[0].id], owner=info.id)
    assert store.segment(large[0].id) is None and store.segment(waiting[0].id) is not None
    assert store.session("a").stored == 1 and keeps_to(store) and store.verify() == []


def test_a_store_that_text_alone_fills_keeps_all_text_and_no_kv(store: Store) -> None:
    ids = fill(store, "a")
    info, chain = converse(store, "b", "one", "two")
    limit(store, 1)
    assert not store.put_segment(*sealed(chain, 0, 2), owner=info.id)
    assert stored(store, ids) == {"a": [0, 0]} and store.stats()["segments"] == 0
    assert len(store.path(store.session("a").tip)) == 4 and store.search("a1") and store.verify() == []


def test_what_a_segment_replaces_makes_room_for_it(store: Store) -> None:
    ids = fill(store, "a")
    info, chain = converse(store, "b", "one", "two")
    waiting = weigh(segment(chain, 0, 2, kind="open", num_chunks=1, num_groups=1), 240_000)
    assert store.put_segment(*waiting, owner=info.id)
    limit(store, in_use(store) + 20_000)
    assert store.put_segment(*sealed(chain, 0, 2), [waiting[0].id], owner=info.id)
    assert stored(store, ids) == {"a": [4, 4]} and store.segment(waiting[0].id) is None


def test_a_segment_of_no_known_session_is_written_too(store: Store) -> None:
    fill(store, "a")
    _, chain = converse(store, "b", "one", "two")
    limit(store, in_use(store))
    record, frames = sealed(chain, 0, 2)
    assert store.put_segment(record, frames) and keeps_to(store)
    assert store.stored_chunks([record.id]) == {record.id: CHUNKS}


def test_nothing_is_asked_while_others_wait(store: Store) -> None:
    fill(store, "ab", segments=3)
    info, chain = store.session("b"), store.path(store.session("b").tip)
    more = talk(chain[-1], "more", "and more")
    store.add_messages(info.id, more, chain[-1].id)
    asked: list[str] = []

    def held(records: Sequence[SegmentRecord], end: int) -> list[int]:
        assert not store._db.conn.in_transaction
        asked.append("held")
        return [1 for _ in records]

    def spared(sessions: Collection[int]) -> Collection[int]:
        assert not store._db.conn.in_transaction
        asked.append("spared")
        return ()

    store.allowance = Allowance(in_use(store) - 14 * CHUNK_BYTES, held=held, spared=spared)
    assert store.put_segment(*sealed([*chain, *more], 6, 8), owner=info.id)
    assert {*asked} == {"held", "spared"} and keeps_to(store) and store.stats()["segments"] > 0


def test_room_that_another_process_took_meanwhile_is_made_again(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = fill(store, "a")
    info, chain = converse(store, "b", "one", "two")
    _, others = converse(store, "c", "three", "four")
    limit(store, in_use(store) + 250_000)
    other, place = Store(store.file), store._place_within

    def late(*given: Any) -> bool:
        if other.stats()["segments"] == 2:
            other.put_segment(*sealed(others, 0, 2))
        return place(*given)

    monkeypatch.setattr(store, "_place_within", late)
    assert store.put_segment(*sealed(chain, 0, 2), owner=info.id)
    assert keeps_to(store) and sum(stored(store, ids)["a"]) < 8
    other.close()


def test_pages_that_are_free_are_used_before_anything_goes(store: Store) -> None:
    ids = fill(store, "ab")
    store.drop_segment(ids["a"].pop())
    info, chain = converse(store, "c", "one", "two")
    limit(store, in_use(store) + 200_000, held=1)
    assert store.put_segment(*sealed(chain, 0, 2), owner=info.id)
    assert stored(store, ids) == {"a": [4], "b": [4, 4]}


def test_the_floor_counts_the_disk_and_gives_pages_back(store: Store) -> None:
    ids = fill(store, "ab")
    info, chain = converse(store, "c", "one", "two")
    store.allowance = Allowance(min_free=1_000_000, disk_free=lambda _: 1_000_000 - 150_000)
    store._shrink()
    size = store.file.stat().st_size
    assert store.put_segment(*sealed(chain, 0, 2), owner=info.id)
    assert sum(map(sum, stored(store, ids).values())) < 16 - 150_000 // CHUNK_BYTES
    assert store.room().reusable == 0 and store.file.stat().st_size <= size - 100_000
    assert store.verify() == []


def test_room_on_the_disk_leaves_all_as_it_is(store: Store) -> None:
    ids = fill(store, "ab")
    store.allowance = Allowance(disk_budget=1 << 40, min_free=1)
    assert store.shed() == 0 and stored(store, ids) == {"a": [4, 4], "b": [4, 4]}
    assert free_bytes(store.file) == pytest.approx(shutil.disk_usage(store.file.parent).free, rel=0.1)


def test_a_write_that_fails_half_way_gives_back_what_gave_way(store: Store) -> None:
    ids = fill(store, "a")
    info, chain = converse(store, "b", "one", "two")
    limit(store, in_use(store) + 4 * CHUNK_BYTES + 60_000, spared=lambda _: {store.session("a").id})
    record, frames = sealed(chain, 0, 2)
    with pytest.raises(AssertionError):
        store.put_segment(record, frames[:3], owner=info.id)
    assert stored(store, ids) == {"a": [4, 4]} and store.segment(record.id) is None and store.verify() == []


# -- what verify, fork and delete make of it -------------------------------------------------------------------------


def test_verify_misses_a_frame_before_the_stored_ones_end_and_none_beyond(store: Store) -> None:
    ids = fill(store, "a")
    limit(store, in_use(store) - 90_000, held=1)
    store.shed()
    assert stored(store, ids)["a"] == [2, 3] and store.verify() == []
    execute(store.file, f"DELETE FROM frames WHERE segment_id = '{ids['a'][1]}' AND chunk = 2")
    assert [line for line in store.verify() if "chunk 2: group 0 is missing" in line]
    execute(store.file, f"UPDATE segments SET stored_chunks = 9 WHERE id = '{ids['a'][1]}'")
    assert [line for line in store.verify() if "it says that 9 of its 4 rank chunks are stored" in line]


def execute(path: Path, statement: str) -> None:
    """Tamper with the file as another program might."""
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute(statement)
    connection.close()


def test_a_fork_adds_next_to_nothing_and_deleting_frees_just_what_only_it_used(store: Store) -> None:
    info, chain = converse(store, "origin", *(f"message {number} " * 100 for number in range(60)))
    for first in range(0, 60, 10):
        assert store.put_segment(*sealed(chain, first, first + 10))
    before = in_use(store)
    store.fork("origin", "fork", chain[39].id)
    assert in_use(store) - before < 64 << 10
    store.delete("fork")
    assert in_use(store) <= before and store.room().reusable == 0
    store.fork("origin", "fork", chain[39].id)
    store.delete("origin")
    freed, own = before - in_use(store), 2 * CHUNKS * CHUNK_BYTES
    assert own <= freed <= own + 300_000
    assert len(store.cover([message.id for message in chain], "f1")) == 4
    assert len(store.path(store.session("fork").tip)) == 40 and store.verify() == []
    assert info.num_turns == 30


# -- any sequence ----------------------------------------------------------------------------------------------------

operations = st.lists(
    st.tuples(
        st.sampled_from(["say", "seal", "seal", "wait", "fork", "delete", "budget", "rewind"]),
        st.integers(0, 3),
        st.integers(0, 1_000_000),
    ),
    min_size=5,
    max_size=25,
)


@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(operations)
def test_after_any_sequence_the_budget_holds_and_text_is_all_there(
    store: Store, steps: list[tuple[str, int, int]]
) -> None:
    for info in store.sessions():
        store.delete(info.name)
    limit(store, 0)
    said: dict[str, list[Message]] = {}
    for number, (step, which, size) in enumerate(steps):
        names = sorted(said)
        name = names[which % len(names)] if names else None
        if step == "budget":
            limit(store, SMALL // 2 + size, held=1 + which)
            store.shed()
            assert keeps_to(store)
        elif step == "fork" and name:
            store.fork(name, f"s{number}", said[name][-1].id)
            said[f"s{number}"] = list(said[name])
        elif step == "delete" and name and which == 0:
            store.delete(name)
            del said[name]
        elif step == "rewind" and name and len(said[name]) > 2:
            said[name] = said[name][:-1]
            store.set_tip(store.session(name).id, said[name][-1].id)
        elif step in ("say", "fork", "delete", "budget", "rewind") or name is None:
            name = name or f"s{number}"
            if name not in said:
                store.create_session(name, MODEL, FINGERPRINT)
            path = said.get(name, [])
            more = talk(path[-1] if path else None, f"{number} asks", f"{number} answers")
            store.add_messages(store.session(name).id, more, path[-1].id if path else None)
            said[name] = [*path, *more]
        else:
            kind: Kind = "open" if step == "wait" else "sealed"
            first = which % len(said[name])
            shape = {"num_chunks": 1 if kind == "open" else 1 + which, "num_groups": 1, "kind": kind}
            parts = weigh(segment(said[name], first, len(said[name]), tag=str(number), **shape), 1 + size // 8)  # type: ignore[arg-type]
            written = store.put_segment(*parts, owner=store.session(name).id)
            assert keeps_to(store) and written == (store.segment(parts[0].id) is not None)
    assert store.verify() == []
    assert {info.name: store.path(info.tip) for info in store.sessions()} == said


budgets = st.integers(100_000, 2_000_000)


@settings(deadline=None, max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(budgets, st.integers(1, 4), st.sets(st.sampled_from("abcd")))
def test_whatever_the_budget_the_order_holds(store: Store, budget: int, held: int, opened: set[str]) -> None:
    for info in store.sessions():
        store.delete(info.name)
    store.allowance = Allowance()
    ids = fill(store, "abcd")
    spared = {store.session(name).id for name in opened}
    limit(store, budget, held=held, spared=lambda _: spared)
    store.shed()
    assert keeps_to(store)
    state, whole, gone = stored(store, ids), [4, 4], [0, 0]
    closed = [state[name] for name in "abcd" if name not in opened]
    for group in (closed, [state[name] for name in "abcd" if name in opened]):
        for colder, warmer in pairwise(group):
            assert warmer == whole or max(colder) <= held  # step 1, the coldest first
            assert colder == gone or min(warmer) >= 1 or warmer != gone  # step 4
        if any(min(each) < min(held, 4) for each in group):
            assert all(max(each) <= held for each in group)
        if gone in group:
            assert all(max(each) <= 1 for each in group)
    if any(state[name] != whole for name in opened):
        assert all(each == gone for each in closed)


def taken(store: Store, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, str]]:
    """What shedding does from now on: segment, chunks that it keeps, codec that it gets."""
    log: list[tuple[str, int, str]] = []
    give, recode = store._give, store._recode

    def given(sacrifice: Sacrifice) -> None:
        log.extend((identity, sacrifice.chunks, "") for identity in sacrifice.ids)
        give(sacrifice)

    def recoded(ids: Sequence[str], codec: str) -> dict[str, str] | None:
        log.extend((identity, 0, codec) for identity in ids)
        return recode(ids, codec)

    monkeypatch.setattr(store, "_give", given)
    monkeypatch.setattr(store, "_recode", recoded)
    return log


@pytest.mark.parametrize("part", [0.0, 0.2, 0.4, 0.6, 0.8, 0.95, 1.0])
def test_what_is_foreseen_goes_in_that_order(store: Store, monkeypatch: pytest.MonkeyPatch, part: float) -> None:
    fill(store, "abc", segments=3)

    def recode(records: Sequence[SegmentRecord], codec: str) -> None:
        share = BITS[codec] / bits(store.segment(records[0].id).codec)  # type: ignore[union-attr]
        for record in records:
            store._db.execute("UPDATE segments SET codec = ? WHERE id = ?", [codec, record.id])
            for row in store._rows("SELECT rowid, nbytes FROM frames WHERE segment_id = :id", id=record.id):
                size = int(share * row["nbytes"])
                store._db.execute(
                    "UPDATE frames SET body = substr(body, 1, ?), nbytes = ? WHERE rowid = ?",
                    [size, size, row["rowid"]],
                )
        store._db.conn.commit()

    store._db.execute("UPDATE segments SET codec = 'k8v8'")
    store._db.conn.commit()
    opened = {store.session("a").id}
    text = in_use(store) - int(store.stats()["kv_bytes"])
    limit(store, int(text + part * (in_use(store) - text)) or 1, recode=recode, spared=lambda _: opened)
    told = [(step.id, step.chunks, step.codec) for step in store.would_shed(store.allowance)]
    assert store.would_shed(replace(store.allowance, disk_budget=0)) == []
    log = taken(store, monkeypatch)
    freed = store.shed()
    assert bool(told) == bool(freed) == (part < 1)
    common = min(len(told), len(log))
    assert told[:common] == log[:common] and abs(len(told) - len(log)) <= 3  # pages are not bytes
    if not part:
        assert not store.stats()["segments"] and told == log
