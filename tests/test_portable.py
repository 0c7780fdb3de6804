"""Portable files: what is written comes back whole, and what was tampered with is refused and changes nothing."""

from __future__ import annotations

import hashlib
import io
import json
import random
import re
import stat
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvchat import portable
from kvchat.cli.app import main
from kvchat.codecs import frame
from kvchat.config import Config
from kvchat.download import BUILTIN, is_here
from kvchat.errors import InputError, SessionExists
from kvchat.files import written
from kvchat.fingerprint import fingerprint_id
from kvchat.handle import Session
from kvchat.model import Model
from kvchat.portable import form, intake
from kvchat.portable.form import Description, End, Manifest
from kvchat.store.records import Message, SegmentRecord, segment_id
from kvchat.store.shed import Allowance
from kvchat.store.store import Store
from kvchat.worker import Worker
from tests.store_parts import FINGERPRINT, MODEL, converse, copy_of, read_all, say
from tests.tiny import make_model

SETTINGS = {
    "generate.temperature": 0,
    "generate.max_new_tokens": 12,
    "compress.segment_min": 60,
    "compress.recent_tokens": 20,
    "compress.keep_ratio": 0.3,
    "compress.rank_chunks": [0.3, 1.0],
}
QUESTIONS = ["Where did we stay in Rome?", "What did it cost?", "Was it far from the river?", "Who was with us?"]
OWN = fingerprint_id(FINGERPRINT)
RANKS = np.zeros((2, 2, 1000), np.uint8)

Open = Callable[..., Worker]


# -- a file with made-up KV: no model, no torch ------------------------------------------------------------------------


def put(store: Store, path: list[Any], first: int, last: int, *, codec: str = "raw", basis: bytes = b"") -> None:
    """A sealed segment over messages [first, last), of two chunks and two groups."""
    start = sum(len(message.token_ids) for message in path[:first])
    end = start + sum(len(message.token_ids) for message in path[first:last])
    frames = [
        (chunk, group, frame.pack({"kind": "rows", "chunk": chunk, "group": group}, {"x": np.arange(40, dtype="<u2")}))
        for chunk in range(2)
        for group in range(2)
    ]
    names = (path[first].id, path[last - 1].id)
    record = SegmentRecord(
        id=segment_id(OWN, "sealed", "kvzip", codec, *names),
        fingerprint=OWN,
        start=start,
        end=end,
        kind="sealed",
        codec=codec,
        scorer="kvzip",
        messages=tuple(message.id for message in path[first:last]),
        header=frame.pack({"kind": "segment", "start": start, "head_dim": 8}, {"chunk_of": RANKS[:, :, : end - start]}),
        num_chunks=2,
        num_groups=2,
        stored_chunks=2,
        basis=basis,
    )
    store.put_segment(record, frames)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A file of six messages and two segments."""
    store = Store(tmp_path_factory.mktemp("small") / "s.db")
    info, path = converse(store, "trip", "Where?", "In Rome, at the Sole.", "When?", "In May.")
    usage = {"prompt_tokens": 9, "cached_tokens": 8, "prefilled_tokens": 1, "completion_tokens": 2, "recalled": [0, 31]}
    timings = {"load_s": 0.0, "ttft_s": 0.25, "itl_s": [0.1, 0.2], "seal_s": None}
    last = [say(path[-1], "user", "Schön 🙂")]
    last.append(say(last[0], "assistant", "Ja.", finish_reason="stop", usage=usage, timings=timings))
    store.add_messages(info.id, last, path[-1].id)
    basis = frame.pack({"kind": "basis"}, {"b": np.ones(30, "<f4")})
    put(store, path, 0, 2, basis=basis)
    put(store, path, 2, 4, basis=basis)
    stream = io.BytesIO()
    portable.write(store, "trip", stream)
    store.close()
    return stream.getvalue()


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(tmp_path / "other.db")
    converse(store, "mine", "Where?", "In Oslo.")
    yield store
    store.close()


def contents(store: Store) -> str:
    """Every row of the store."""
    return "\n".join(store._db.conn.iterdump())


def bring(store: Store, data: bytes, folder: Path, name: str | None = None, vocabulary: int = 2000) -> None:
    """Take a file in as a worker does."""
    file = folder / "in.kvchat"
    file.write_bytes(data)
    manifest = portable.read_manifest(file)
    portable.take_in(store, file, manifest, name or manifest.name, "here", kv=True, vocabulary=vocabulary)


def blocks_of(data: bytes) -> list[bytes]:
    """The blocks of a sound file."""
    blocks, at = [], form.START.size
    while at < len(data):
        length = form.LENGTH.unpack_from(data, at)[0]
        blocks.append(data[at + form.LENGTH.size : at + form.LENGTH.size + length])
        at += form.LENGTH.size + length
    return blocks


def joined(blocks: list[bytes]) -> bytes:
    """A file of these blocks and an end that agrees with them, as one who means harm would write it."""
    body = form.START.pack(form.MAGIC, form.VERSION) + b"".join(form.LENGTH.pack(len(one)) + one for one in blocks)
    end = End(len(blocks), hashlib.sha256(body).hexdigest()).to_bytes()
    return body + form.LENGTH.pack(len(end)) + end


def changed(blob: bytes, **values: Any) -> bytes:
    """A frame with other values in its head, and a checksum that is right."""
    head, planes = frame.unpack(blob, limit=1 << 20)
    return frame.pack({**head, **values}, planes, dict.fromkeys(planes, 0.0))


def refused(store: Store, data: bytes, folder: Path) -> str:
    """What is said of a file that is not taken in; the store must be as before."""
    before = contents(store)
    with pytest.raises(InputError) as caught:
        bring(store, data, folder)
    assert contents(store) == before
    assert str(caught.value).startswith(f"{folder / 'in.kvchat'}: ") and "\n" not in str(caught.value)
    return str(caught.value)


def test_a_file_brings_messages_and_segments_back_as_they_were(small: bytes, store: Store, tmp_path: Path) -> None:
    bring(store, small, tmp_path)
    there = store.session("trip")
    path = store.path(there.tip)
    assert [message.content for message in path][-2:] == ["Schön 🙂", "Ja."]
    assert path[-1].timings == {"load_s": 0.0, "ttft_s": 0.25, "itl_s": [0.1, 0.2], "seal_s": None}
    assert (path[-1].usage or {})["cached_tokens"] == 8 and path[-1].finish_reason == "stop"
    assert (path[-1].usage or {})["recalled"] == [0, 31]
    assert there.fingerprint == FINGERPRINT and there.model == "here"
    cover = store.cover([message.id for message in path], OWN)
    assert [(record.start, record.end, used) for record, used in cover] == [(0, 31, 2), (31, 47, 2)]
    assert {record.basis for record, _ in cover} == {frame.pack({"kind": "basis"}, {"b": np.ones(30, "<f4")})}
    assert store.verify() == []
    again = io.BytesIO()
    portable.write(store, "trip", again)
    assert blocks_of(again.getvalue())[2:-1] == blocks_of(small)[2:-1]  # one message was here, with its own date


def test_the_common_basis_is_written_once(small: bytes) -> None:
    basis = frame.pack({"kind": "basis"}, {"b": np.ones(30, "<f4")})
    assert blocks_of(small).count(basis) == 1


def test_kv_of_a_file_serves_nobody_who_says_something_else(small: bytes, store: Store, tmp_path: Path) -> None:
    mine = [message.id for message in store.path(store.session("mine").tip)]
    bring(store, small, tmp_path)
    theirs = [message.id for message in store.path(store.session("trip").tip)]
    assert mine[0] == theirs[0] and store.cover(mine, OWN) == []
    assert [used for _, used in store.cover(theirs, OWN)] == [2, 2]
    assert [used for _, used in store.cover(theirs[:3], OWN)] == [2]


def test_kv_of_no_more_than_a_system_prompt_is_left_out(store: Store, tmp_path: Path) -> None:
    info = store.create_session("long", MODEL, FINGERPRINT)
    path = [say(None, "system", "Be brief.")]
    path.append(say(path[0], "user", "One"))
    path.append(say(path[1], "assistant", "Two"))
    store.add_messages(info.id, path, None)
    put(store, path, 0, 1)
    put(store, path, 1, 3)
    stream = io.BytesIO()
    assert portable.write(store, "long", stream).segments == 2
    other = Store(tmp_path / "third.db")
    bring(other, stream.getvalue(), tmp_path)
    assert [record.start for record, _ in other.cover([message.id for message in path], OWN)] == [11]
    other.close()


def header_of(small: bytes, planes: dict[str, Any], **values: Any) -> bytes:
    """The file with another header in its first segment, and a manifest that agrees."""
    blocks = blocks_of(small)[:-1]
    place = next(index for index, block in enumerate(blocks) if frame.read_head(block).get("kind") == "segment")
    head, old = frame.unpack(blocks[place], limit=1 << 20)
    new = frame.pack({**head, **values}, {**old, **planes})
    kv_bytes = Manifest.from_bytes(blocks[0]).kv_bytes + len(new) - len(blocks[place])
    return joined([changed(blocks[0], kv_bytes=kv_bytes), *blocks[1:place], new, *blocks[place + 1 :]])


@pytest.mark.parametrize(
    ("planes", "values", "reason"),
    [
        ({"chunk_of": np.zeros((32, 32, 1 << 14), np.uint8)}, {}, "not its 31 tokens"),
        ({"chunk_of": np.zeros((2, 62), np.uint8)}, {}, "not its 31 tokens"),
        ({"chunk_of": np.zeros((2, 2, 31), "<u2")}, {}, "not its 31 tokens"),
        ({"chunk_of": np.zeros((1 << 10, 1 << 9, 31), np.uint8)}, {}, "no model has that"),
        ({"chunk_of": np.zeros((0, 2, 31), np.uint8)}, {}, "no model has that"),
        ({}, {"head_dim": 1 << 30}, "no model has that"),
        ({}, {"head_dim": None}, "no model has that"),
        ({"key_scale": np.zeros(1 << 22, "<f4")}, {}, "larger than one may be"),
    ],
    ids=range(8),
)
def test_a_header_that_grows_when_it_is_read_is_refused(
    planes: dict[str, Any], values: dict[str, Any], reason: str, small: bytes, store: Store, tmp_path: Path
) -> None:
    data = header_of(small, planes, **values)
    assert len(data) < len(small) + 3000
    assert reason in refused(store, data, tmp_path)


def test_others_write_while_a_file_is_read(
    small: bytes, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other, check = Store(store.file, busy_timeout_s=0), form.check_header
    names = iter("abcdefgh")

    def write_and_check(*given: Any) -> None:
        other.create_session(next(names), MODEL, FINGERPRINT)
        check(*given)

    monkeypatch.setattr(form, "check_header", write_and_check)
    bring(store, small, tmp_path)
    assert next(names) == "e"  # two segments, read twice
    other.close()


@pytest.mark.parametrize("place", [1, -3], ids=["messages", "last frame"])
def test_a_file_that_changes_while_it_is_read_leaves_nothing(
    place: int, small: bytes, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks, check = blocks_of(small)[:-1], intake._check
    head, planes = frame.unpack(blocks[place], limit=1 << 20)
    if place == 1:  # still a sound file: another date of the same length
        planes["text"] = np.frombuffer(planes["text"].tobytes().replace(b"2026-", b"2027-"), np.uint8)
    else:
        planes["x"] = planes["x"][::-1].copy()
    blocks[place] = frame.pack(head, planes, dict.fromkeys(planes, 0.0 if place == 1 else 0.97))
    bring(store, joined(blocks), tmp_path, "sound")
    store.delete("sound")
    before = contents(store)

    def check_and_change(*given: Any) -> None:
        check(*given)
        (tmp_path / "in.kvchat").write_bytes(joined(blocks))

    monkeypatch.setattr(intake, "_check", check_and_change)
    with pytest.raises(InputError, match="changed while it was read; nothing was taken in"):
        bring(store, small, tmp_path)
    assert without_counters(contents(store)) == without_counters(before)
    assert store.verify() == []


def without_counters(rows: str) -> str:
    """Rows without those of the search index and of the numbers given out."""
    return "\n".join(row for row in rows.splitlines() if "messages_fts" not in row and "sqlite_sequence" not in row)


def test_what_is_taken_in_keeps_to_the_budget(small: bytes, store: Store, tmp_path: Path) -> None:
    store.allowance = Allowance(disk_budget=1)
    bring(store, small, tmp_path)
    assert store.stats()["segments"] == 0 and len(store.path(store.session("trip").tip)) == 6
    store.allowance = Allowance(disk_budget=store.room().in_use + (1 << 20))
    bring(store, small, tmp_path, "again")
    assert store.stats()["segments"] == 2 and store.verify() == []


def test_segments_that_are_there_already_stay(small: bytes, store: Store, tmp_path: Path) -> None:
    bring(store, small, tmp_path)
    before = store.stats()
    bring(store, small, tmp_path, "again")
    after = store.stats()
    assert (after["messages"], after["segments"], after["frames"]) == (
        before["messages"],
        before["segments"],
        before["frames"],
    )
    store.delete("trip")
    assert store.verify() == []


def test_an_empty_session_is_a_file_too(store: Store, tmp_path: Path) -> None:
    store.create_session("empty", MODEL, FINGERPRINT)
    stream = io.BytesIO()
    assert portable.write(store, "empty", stream).messages == 0
    bring(store, stream.getvalue(), tmp_path, "copy")
    assert store.session("copy").tip is None


def test_a_fork_takes_no_kv_of_messages_that_are_not_its_own(store: Store, tmp_path: Path) -> None:
    _, path = converse(store, "long", "One", "Two", "Three", "Four")
    put(store, path, 0, 2)
    put(store, path, 2, 4)
    store.fork("long", "short", path[2].id)
    stream = io.BytesIO()
    assert portable.write(store, "short", stream).segments == 1
    assert b"Four" not in stream.getvalue()
    other = Store(tmp_path / "third.db")
    bring(other, stream.getvalue(), tmp_path)
    assert other.session("short").num_tokens == sum(len(message.token_ids) for message in path[:3])
    assert other.stats()["segments"] == 1
    other.close()


def test_a_damaged_segment_is_left_out(store: Store, tmp_path: Path) -> None:
    _, path = converse(store, "long", "One", "Two", "Three", "Four")
    put(store, path, 0, 2)
    put(store, path, 2, 4)
    store._db.execute("UPDATE frames SET body = zeroblob(9) WHERE chunk = 1 AND segment_id LIKE 'b2:%' AND rowid = 4")
    store._db.conn.commit()
    stream = io.BytesIO()
    assert portable.write(store, "long", stream).segments == 1
    bring(store, stream.getvalue(), tmp_path, "copy")


def test_a_segment_of_which_the_last_chunks_were_given_up_keeps_the_first(store: Store, tmp_path: Path) -> None:
    _, path = converse(store, "long", "One", "Two")
    put(store, path, 0, 2)
    store._db.execute("DELETE FROM frames WHERE chunk = 1")
    store._db.execute("UPDATE segments SET stored_chunks = 1")
    store._db.conn.commit()
    stream = io.BytesIO()
    assert portable.write(store, "long", stream).frames == 2
    other = Store(tmp_path / "third.db")
    bring(other, stream.getvalue(), tmp_path)
    ids = [message.id for message in path]
    [(record, _)] = other.cover(ids, OWN)
    assert (record.stored_chunks, record.num_chunks) == (1, 2)
    other.close()


def test_a_file_cut_short_anywhere_is_refused(small: bytes, store: Store, tmp_path: Path) -> None:
    ends = [*accumulate((form.LENGTH.size + len(block) for block in blocks_of(small)), initial=form.START.size)]
    assert ends[-1] == len(small)
    places = {*ends[:-1], *(end + 2 for end in ends[:-1]), *random.Random(0).sample(range(len(small)), 30)}
    for place in places:
        refused(store, small[:place], tmp_path)
    assert "something follows" in refused(store, small + b"\0", tmp_path)


def test_a_flipped_bit_anywhere_is_refused(small: bytes, store: Store, tmp_path: Path) -> None:
    for place in [*range(40), *random.Random(1).sample(range(40, len(small)), 60)]:
        spoiled = bytearray(small)
        spoiled[place] ^= 1 << place % 8
        refused(store, bytes(spoiled), tmp_path)


def test_missing_doubled_and_exchanged_blocks_are_refused_whatever_the_end_says(
    small: bytes, store: Store, tmp_path: Path
) -> None:
    blocks = blocks_of(small)[:-1]
    assert joined(blocks) == small
    for place in range(len(blocks)):
        refused(store, joined(blocks[:place] + blocks[place + 1 :]), tmp_path)
        refused(store, joined([*blocks[:place], blocks[place], *blocks[place:]]), tmp_path)
        if place:
            exchanged = [*blocks[: place - 1], blocks[place], blocks[place - 1], *blocks[place + 1 :]]
            refused(store, joined(exchanged), tmp_path)
    refused(store, small[: -len(blocks_of(small)[-1])] + blocks_of(joined(blocks[:3]))[-1], tmp_path)


LONG = "x" * 3000


@pytest.mark.parametrize(
    "values",
    [
        {"messages": 5},
        {"messages": 7},
        {"messages": 1 << 40},
        {"messages": -1},
        {"messages": True},
        {"messages": "6"},
        {"tokens": 20},
        {"tokens": 10**9},
        {"text_bytes": 10},
        {"text_bytes": 10**4},
        {"segments": 1},
        {"segments": 3},
        {"frames": 7},
        {"frames": 9},
        {"kv_bytes": 100},
        {"kv_bytes": 10**5},
        {"name": LONG},
        {"name": 5},
        {"name": "a\nb"},
        {"name": ""},
        {"model": LONG},
        {"created": "yesterday"},
        {"fingerprint": {"weights": 5}},
        {"fingerprint": "w1"},
        {"fingerprint": {str(number): "" for number in range(60)}},
        {"more": 1},
        {"block": "segment"},
    ],
    ids=str,
)
def test_a_manifest_that_lies_is_refused(values: dict[str, Any], small: bytes, store: Store, tmp_path: Path) -> None:
    blocks = blocks_of(small)[:-1]
    data = joined([changed(blocks[0], **values), *blocks[1:]])
    if values == {"name": ""} or values == {"name": "a\nb"}:
        with pytest.raises(InputError):
            bring(store, data, tmp_path)
    else:
        refused(store, data, tmp_path)


@pytest.mark.parametrize(
    "values",
    [
        {"first": 1},
        {"first": 5, "count": 2},
        {"first": -1},
        {"count": 0},
        {"count": 1 << 33},
        {"start": 1},
        {"end": 5},
        {"end": 2.0},
        {"kind": "ajar"},
        {"kind": "open"},
        {"codec": "../../x y"},
        {"codec": LONG},
        {"scorer": None},
        {"num_chunks": 1},
        {"num_chunks": 300},
        {"num_groups": 1},
        {"num_groups": 3},
        {"num_groups": 1 << 31},
        {"stored_chunks": 0},
        {"stored_chunks": 1},
        {"stored_chunks": 3},
        {"seal_s": float("nan")},
        {"seal_s": "long"},
        {"has_basis": False},
        {"has_basis": 1},
        {"shares_basis": True},
    ],
    ids=str,
)
def test_a_segment_that_does_not_fit_the_messages_is_refused(
    values: dict[str, Any], small: bytes, store: Store, tmp_path: Path
) -> None:
    blocks = blocks_of(small)[:-1]
    place = next(index for index, block in enumerate(blocks) if frame.read_head(block).get("block") == "segment")
    spoiled = [*blocks[:place], changed(blocks[place], **values), *blocks[place + 1 :]]
    refused(store, joined(spoiled), tmp_path)


def test_segments_that_overlap_are_refused(small: bytes, store: Store, tmp_path: Path) -> None:
    blocks = blocks_of(small)[:-1]
    size = (len(blocks) - 2 - 1) // 2  # the first segment has the basis
    first, second = blocks[2 : 2 + size + 1], blocks[2 + size + 1 :]
    assert Description.from_bytes(second[0]).first == 2
    manifest = Manifest.from_bytes(blocks[0])
    doubled = changed(blocks[0], segments=3, frames=12, kv_bytes=manifest.kv_bytes + sum(map(len, first[1:])))
    assert "covers messages of another" in refused(
        store, joined([doubled, blocks[1], *first, *first, *second]), tmp_path
    )


def message_block(small: bytes, **planes: Any) -> bytes:
    """The file with other planes in its block of messages; a function makes one from the old one."""
    blocks = blocks_of(small)[:-1]
    head, old = frame.unpack(blocks[1], limit=1 << 20)
    new = {name: planes[name](plane.copy()) if name in planes else plane for name, plane in old.items()}
    return joined([blocks[0], frame.pack(head, new, dict.fromkeys(new, 0.0)), *blocks[2:]])


def put_at(place: Any, value: int) -> Callable[[Any], Any]:
    def change(plane: Any) -> Any:
        plane[place] = value
        return plane

    return change


@pytest.mark.parametrize(
    "planes",
    [
        {"ids": put_at(3, 7)},
        {"ids": lambda ids: ids[:-1]},
        {"ids": lambda ids: ids.astype("<u2")},
        {"text": put_at(0, ord("w"))},
        {"text": put_at(0, 0xFF)},
        {"text": lambda text: text[1:]},
        {"digests": put_at((2, 0), 0)},
        {"digests": lambda digests: digests[:, :8]},
        {"fields": put_at((0, 0), 3)},
        {"fields": put_at((2, 0), 0)},
        {"fields": put_at((1, 2), 2**32 - 1)},
        {"fields": put_at((1, 1), 30)},
        {"fields": put_at((1, 3), 2**32 - 1)},
        {"fields": put_at((1, 4), 2**32 - 1)},
        {"fields": lambda fields: fields[:0]},
        {"fields": lambda fields: fields.reshape(-1)},
        {"fields": lambda fields: fields.astype("<f4")},
    ],
    ids=range(17),
)
def test_messages_that_are_not_what_their_ids_say_are_refused(
    planes: dict[str, Any], small: bytes, store: Store, tmp_path: Path
) -> None:
    refused(store, message_block(small, **planes), tmp_path)


def used(more: bytes) -> bytes:
    """A note of four counts and something more."""
    counts = b'"prompt_tokens": 9, "cached_tokens": 8, "prefilled_tokens": 1, "completion_tokens": 2'
    return b'{"created": "2026-01-01", "finish_reason": null, "timings": null, "usage": {' + counts + more + b"}}"


@pytest.mark.parametrize(
    "note",
    [
        b"",
        b"null",
        b"[" * 100_000,
        b'{"created": "2026-01-01", "finish_reason": null, "usage": null}',
        b'{"created": "2026-01-01", "finish_reason": "bored", "usage": null, "timings": null}',
        b'{"created": "2026-01-01", "finish_reason": null, "usage": {"prompt_tokens": 1}, "timings": null}',
        b'{"created": "2026-01-01", "finish_reason": null, "usage": null, "timings": {"seal_s": 1}}',
        b'{"created": "2026-01-01", "finish_reason": null, "usage": null, "timings": '
        b'{"load_s": NaN, "ttft_s": 0, "itl_s": [], "seal_s": null}}',
        b'{"created": "2026-01-01", "finish_reason": null, "usage": null, "timings": '
        b'{"load_s": 1' + b"0" * 4000 + b', "ttft_s": 0, "itl_s": [], "seal_s": null}}',
        b'{"created": "2026-01-01", "finish_reason": null, "usage": null, "timings": '
        b'{"load_s": 1' + b"0" * 5000 + b', "ttft_s": 0, "itl_s": [], "seal_s": null}}',
        b" " * (form.MAX_NOTE + 1),
        used(b', "recalled": null'),
        used(b', "recalled": 7'),
        used(b', "recalled": [-1]'),
        used(b', "recalled": [true]'),
        used(b', "recalled": ["0"]'),
        used(b', "recalled": [[0]]'),
        used(b', "recalled": [4194305]'),
        used(b', "recalled": [' + b"0, " * form.MAX_TOTALS["segments"] + b"0]"),
        used(b', "called": []'),
    ],
    ids=range(20),
)
def test_a_note_of_another_form_is_refused(note: bytes) -> None:
    with pytest.raises(form.CorruptFrame):
        form.read_note(note)


@pytest.mark.parametrize("recalled", [b"", b', "recalled": []', b', "recalled": [0, 512, 4194304]'], ids=range(3))
def test_a_note_may_say_what_came_back(recalled: bytes) -> None:
    note = form.read_note(used(recalled))
    assert note == json.loads(used(recalled))
    message = Message.new(None, "assistant", "Ja.", (1,), (0, 1), usage=note["usage"], created=note["created"])
    assert form.read_note(form.note_of(message)) == note


def test_absurd_lengths_are_refused_without_being_allocated(small: bytes, store: Store, tmp_path: Path) -> None:
    blocks = blocks_of(small)[:-1]
    start = small[: form.START.size]
    bomb = frame.pack({"block": "messages"}, {"text": np.zeros(1 << 25, np.uint8)})
    assert len(bomb) < 10_000
    tracemalloc.start()
    try:
        for length in (0, 1, form.MAX_BLOCK, form.MAX_BLOCK + 1, 2**32 - 1):
            refused(store, start + form.LENGTH.pack(length) + blocks[0], tmp_path)
        refused(store, joined([blocks[0], bomb, *blocks[2:]]), tmp_path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1 << 21


def test_a_newer_version_and_another_kind_of_file_are_told_apart(small: bytes, store: Store, tmp_path: Path) -> None:
    newer = form.START.pack(form.MAGIC, form.VERSION + 1) + small[form.START.size :]
    assert "version 2, this program reads 1: update kvchat" in refused(store, newer, tmp_path)
    assert "no portable file" in refused(store, b"## User\n\nHi\n", tmp_path)


def test_token_ids_that_the_model_does_not_know_are_refused(small: bytes, store: Store, tmp_path: Path) -> None:
    before = contents(store)
    with pytest.raises(InputError, match="token id 1001 is not one of the model's 1001"):
        bring(store, small, tmp_path, vocabulary=1001)
    assert contents(store) == before


def test_a_name_that_is_taken_changes_nothing(small: bytes, store: Store, tmp_path: Path) -> None:
    before = contents(store)
    with pytest.raises(SessionExists):
        bring(store, small, tmp_path, "mine")
    assert contents(store) == before


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_mutations_raise_named_errors_and_allocate_little(
    data: st.DataObject, small: bytes, store: Store, tmp_path: Path
) -> None:
    blocks = blocks_of(small)[:-1]
    if data.draw(st.booleans()):  # what one who knows the form would write: every checksum is right
        place = data.draw(st.integers(0, len(blocks) - 1))
        head, planes = frame.unpack(blocks[place], limit=1 << 20)
        if head and data.draw(st.booleans()):
            values = st.none() | st.booleans() | st.integers(-1, 2**63) | st.floats() | st.text(max_size=5)
            key = data.draw(st.sampled_from(sorted(head)))
            head[key] = data.draw(values | st.dictionaries(st.text(max_size=3), values, max_size=3))
        elif planes:
            name = data.draw(st.sampled_from(sorted(planes)))
            flat = planes[name].copy().reshape(-1)
            flat[data.draw(st.integers(0, flat.size - 1))] = data.draw(st.integers(0, 255))
            planes = {**planes, name: flat.reshape(planes[name].shape)}
        blocks[place] = frame.pack(head, planes, dict.fromkeys(planes, 0.0))
        spoiled = joined(blocks)
    else:
        low, high = sorted(data.draw(st.tuples(*[st.integers(0, len(small))] * 2)))
        spoiled = small[:low] + data.draw(st.binary(max_size=64)) + small[high:]
    file = tmp_path / "in.kvchat"
    file.write_bytes(spoiled)
    tracemalloc.start()
    try:
        for part in read_all(file):
            assert isinstance(part, list) or all(len(body) < len(spoiled) for _, _, body in part[1])
    except InputError as error:
        assert str(error).startswith(f"{file}: ")
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 1 << 20


# -- commands and models -----------------------------------------------------------------------------------------------


class Machine:
    """A store and a model, on which command lines are run."""

    def __init__(self, folder: Path, model: Callable[[], Model], capsys: pytest.CaptureFixture[str]) -> None:
        folder.mkdir(exist_ok=True)
        self.store, self._model, self._capsys = folder / "s.db", model, capsys
        self.asked: list[str] = []

    def worker(self, config: Config | None = None, listener: Any = None, key: Any = None) -> Worker:
        def load(model: Any, _: Any) -> Model:
            self.asked.append(model.name)
            return self._model()

        return Worker(config or Config.load(overrides=SETTINGS | {"store.path": str(self.store)}), listener, load)

    def run(self, *argv: str, code: int = 0) -> str:
        flags = [f"--set={key}={json.dumps(value)}" for key, value in SETTINGS.items()]
        assert main([argv[0], "--store", str(self.store), *flags, *argv[1:]], self.worker) == code
        return self._capsys.readouterr().err


@pytest.fixture
def here(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Iterator[Machine]:
    """A machine with the session "trip" of four turns, exported to trip.kvchat."""
    machine = Machine(tmp_path / "here", make_model, capsys)
    worker = machine.worker()
    with worker.open("trip", system="Be brief.") as session:
        for question in QUESTIONS:
            session.ask(question)
    worker.close()
    machine.run("export", "trip", "--format", "kvchat", "--output", str(tmp_path / "trip.kvchat"))
    yield machine


def machine_like(machine: Machine, folder: Path, model: Callable[[], Model] = make_model) -> Machine:
    return Machine(folder, model, machine._capsys)


def probe(session: Session) -> list[tuple[str, float]]:
    return session.logprobs("And the second night?", "It was quiet.")


def test_a_session_goes_on_elsewhere_as_it_would_have_here(here: Machine, tmp_path: Path) -> None:
    there = machine_like(here, tmp_path / "there")
    told = there.run("import", str(tmp_path / "trip.kvchat"))
    assert re.fullmatch(r"trip: 9 messages, \d+ tokens, all from the file\n", told)
    workers = [machine.worker() for machine in (here, there)]
    sessions = [worker.open("trip") for worker in workers]
    assert probe(sessions[0]) == probe(sessions[1])
    assert [one["kind"] for one in sessions[0].stats()["segments"]] == [
        one["kind"] for one in sessions[1].stats()["segments"]
    ]
    replies = [session.ask("And then?") for session in sessions]
    assert replies[0].usage == replies[1].usage and replies[0].text == replies[1].text
    assert replies[1].usage.cached_tokens == int(told.split()[3])
    for worker in workers:
        worker.close()


def test_what_is_made_of_kv_from_a_file_is_from_a_file_too(here: Machine, tmp_path: Path) -> None:
    there = machine_like(here, tmp_path / "there")
    there.run("import", str(tmp_path / "trip.kvchat"))
    worker = there.worker()
    session = worker.open("trip")
    kinds = [one["kind"] for one in session.stats()["segments"]]
    assert kinds[-1] == "open"
    length = session.stats()["num_tokens"]
    for question in QUESTIONS * 2:
        session.ask(question)
    session.settle()
    worker.close()
    store = Store(there.store)
    rows = store._rows("SELECT kind, start_token, from_file FROM segments ORDER BY start_token")
    store.close()
    assert rows[-1]["start_token"] > length and [row["kind"] for row in rows[: len(kinds)]] == ["sealed"] * len(kinds)
    assert [bool(row["from_file"]) for row in rows] == [row["start_token"] < length for row in rows]


def test_after_a_rewind_memory_holds_no_part_of_a_segment_from_a_file(here: Machine, tmp_path: Path) -> None:
    there = machine_like(here, tmp_path / "there")
    there.run("import", str(tmp_path / "trip.kvchat"))
    worker = there.worker()
    session = worker.open("trip")
    session.ask("And then?")
    for turns in (1, 2, 1):
        session.rewind(turns)
        session.settle()
        resumed = machine_like(here, tmp_path / "none")
        resumed.store = copy_of(there.store, turns + session.stats()["num_tokens"])
        other = resumed.worker()
        assert probe(other.open("trip")) == probe(session)
        other.close()
    worker.close()


def test_kv_of_another_model_is_not_used_and_not_even_stored(here: Machine, tmp_path: Path) -> None:
    there = machine_like(here, tmp_path / "there", lambda: make_model(seed=1))
    told = there.run("import", str(tmp_path / "trip.kvchat"), "--name", "other")
    notice, end = told.splitlines()
    assert "as it is loaded now differs in weights: only the text is taken over" in notice
    assert re.fullmatch(r"other: 9 messages, (\d+) tokens: 0 from the file, \1 read again", end)
    worker = there.worker()
    with worker.open("other") as session:  # no --rebuild: it is this model's now
        assert [message.content for message in session.messages() if message.role == "user"] == QUESTIONS
        assert session.ask("And then?").usage.cached_tokens == int(end.split()[3])
    worker.close()
    store = Store(there.store)
    own = fingerprint_id(make_model(seed=1).fingerprint)
    assert {row["fingerprint"] for row in store._rows("SELECT fingerprint FROM segments")} == {own}
    store.close()


def test_another_tokenizer_reads_the_text_anew(here: Machine, tmp_path: Path) -> None:
    def other() -> Model:
        model = make_model(chat_template=make_model().tokenizer.chat_template.replace("\\n", " "))
        model.fingerprint["template"] = "another"
        return model

    there = machine_like(here, tmp_path / "there", other)
    assert "differs in template" in there.run("import", str(tmp_path / "trip.kvchat"))
    store = Store(there.store)
    path = store.path(store.session("trip").tip)
    assert [message.content for message in path if message.role == "user"] == QUESTIONS
    assert ord("\n") not in path[1].token_ids
    store.close()


def test_rebuild_computes_all_from_the_text(here: Machine, tmp_path: Path) -> None:
    there = machine_like(here, tmp_path / "there")
    assert " 0 from the file" in there.run("import", "--rebuild", str(tmp_path / "trip.kvchat"))


def test_the_files_model_is_taken_only_if_it_is_on_this_machine(
    here: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, found in (("a", True), ("b", False)):
        there = machine_like(here, tmp_path / name)
        monkeypatch.setattr("kvchat.engines.is_here", lambda _, found=found: found)
        there.run("import", str(tmp_path / "trip.kvchat"), "--set", "model.name=configured")
        assert there.asked[0] == ("tiny-llama" if found else "configured")
    there.run("import", str(tmp_path / "trip.kvchat"), "--name", "c", "--model", "mine")
    assert there.asked[-1] == "mine"


def test_a_window_that_is_too_small_leaves_no_session(here: Machine, tmp_path: Path) -> None:
    def narrow() -> Model:
        model = make_model(seed=1)
        model.fingerprint["template"] = "another"
        object.__setattr__(model, "context_window", 64)
        return model

    there = machine_like(here, tmp_path / "there", narrow)
    assert "does not fit" in there.run("import", str(tmp_path / "trip.kvchat"), code=1)
    store = Store(there.store)
    assert (store.sessions(), store.stats()["messages"]) == ([], 0)
    store.close()


def test_a_session_that_fills_the_window_can_still_be_taken_in(here: Machine, tmp_path: Path) -> None:
    store = Store(here.store)
    tokens = store.session("trip").num_tokens
    store.close()

    def full() -> Model:
        model = make_model()
        object.__setattr__(model, "context_window", tokens)
        return model

    assert "all from the file" in machine_like(here, tmp_path / "there", full).run(
        "import", str(tmp_path / "trip.kvchat")
    )


def test_a_header_that_does_not_fit_the_model_is_a_miss(here: Machine, tmp_path: Path) -> None:
    blocks = blocks_of((tmp_path / "trip.kvchat").read_bytes())[:-1]
    place = next(index for index, block in enumerate(blocks) if frame.read_head(block).get("kind") == "segment")
    head, planes = frame.unpack(blocks[place], limit=1 << 24)
    planes["chunk_of"] = planes["chunk_of"][:, :1].copy()
    spoiled = frame.pack(head, planes)
    manifest = Manifest.from_bytes(blocks[0])
    blocks[0] = changed(blocks[0], kv_bytes=manifest.kv_bytes + len(spoiled) - len(blocks[place]))
    (tmp_path / "bad.kvchat").write_bytes(joined([*blocks[:place], spoiled, *blocks[place + 1 :]]))
    there = machine_like(here, tmp_path / "there")
    notice, end = there.run("import", str(tmp_path / "bad.kvchat")).splitlines()
    assert "is damaged and removed; it is computed again" in notice
    assert "read again" in end


def test_a_broken_file_and_a_taken_name_are_one_line(here: Machine, tmp_path: Path) -> None:
    data = (tmp_path / "trip.kvchat").read_bytes()
    (tmp_path / "cut.kvchat").write_bytes(data[:-10])
    there = machine_like(here, tmp_path / "there")
    line = (
        rf"kvchat: {re.escape(str(tmp_path))}/cut.kvchat: it is cut short in block \d+, at byte {len(data) - 10}; .*\n"
    )
    assert re.fullmatch(line, there.run("import", str(tmp_path / "cut.kvchat"), code=1))
    taken = here.run("import", str(tmp_path / "trip.kvchat"), code=1)
    assert taken == "kvchat: a session named 'trip' is there already; give another with --name\n"


def test_the_form_is_found_by_its_first_bytes(here: Machine, tmp_path: Path) -> None:
    (tmp_path / "plain.md").write_bytes((tmp_path / "trip.kvchat").read_bytes())
    there = machine_like(here, tmp_path / "there")
    assert "all from the file" in there.run("import", str(tmp_path / "plain.md"))
    (tmp_path / "text.kvchat").write_text("## User\n\nHi\n")
    assert "no portable file" in there.run("import", str(tmp_path / "text.kvchat"), code=1)


@pytest.mark.parametrize("format", ["md", "kvchat"])
def test_exports_are_private_whole_and_never_overwrite_unasked(format: str, here: Machine, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    command = ("export", "trip", "--format", format, "--output", str(out / "x"))
    here.run(*command)
    assert stat.S_IMODE((out / "x").stat().st_mode) == 0o600
    first = (out / "x").read_bytes()
    assert "add --force to overwrite it" in here.run(*command, code=1)
    here.run(*command, "--force")
    assert (out / "x").read_bytes() == first
    here.run("export", "nobody", "--format", format, "--output", str(out / "y"), code=1)
    assert [file.name for file in out.iterdir()] == ["x"]
    assert "cannot be written: No such file or directory" in here.run(*command[:-1], str(out / "no" / "x"), code=1)


def test_an_export_that_breaks_off_leaves_nothing(
    here: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "x").write_text("mine")

    def fail(*_: Any) -> bytes:
        raise InputError("no")

    monkeypatch.setattr(End, "to_bytes", fail)
    here.run("export", "trip", "--format", "kvchat", "--output", str(out / "x"), "--force", code=1)
    assert [file.read_text() for file in out.iterdir()] == ["mine"]


def test_a_pipe_takes_the_file_and_a_terminal_does_not(
    here: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal(io.TextIOWrapper):
        def isatty(self) -> bool:
            return True

    for stream in (io.TextIOWrapper(io.BytesIO()), Terminal(io.BytesIO())):
        monkeypatch.setattr(sys, "stdout", stream)
        told = here.run("export", "trip", "--format", "kvchat", code=int(stream.isatty()))
        if stream.isatty():
            assert told == "kvchat: a portable file is no text for a terminal; add --output FILE\n"
        else:
            assert stream.buffer.getvalue() == (tmp_path / "trip.kvchat").read_bytes()  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["", "\0", "~nobody/x", "../" * 5000, "a/b/c", "no/such-model-here", "\U0001f600"])
def test_any_name_of_a_model_may_be_asked_for(name: str) -> None:
    assert not is_here(name)


def test_what_is_a_path_too_is_not_taken_for_a_model_of_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("kvchat.download._snapshot_here", lambda name: tmp_path)
    (tmp_path / "org" / "model").mkdir(parents=True)
    assert not is_here("org/model") and not is_here(str(tmp_path)) and is_here("org/other") and is_here(BUILTIN)


def test_a_device_is_written_to_and_not_replaced(tmp_path: Path) -> None:
    link = tmp_path / "null"
    link.symlink_to("/dev/null")
    with written(link, force=True) as stream:
        stream.write(b"x")
    assert link.is_char_device()


def test_no_block_is_anything_but_a_frame_and_heads_are_plain_values(small: bytes) -> None:
    for block in blocks_of(small):
        frame.check(block)
        assert msgpack.packb(frame.read_head(block))
