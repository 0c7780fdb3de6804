"""Segments written anew in another codec, whole or in part, and sessions that go on with them."""

from __future__ import annotations

import json
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kvchat import recode as recode_module
from kvchat.cache.segment import Ranking
from kvchat.cli.app import main
from kvchat.codecs import SegmentHeader, encode_segment
from kvchat.codecs.channel import GROUP
from kvchat.codecs.fit import Part
from kvchat.codecs.frame import pack, unpack
from kvchat.config import Config
from kvchat.errors import CodecError, CorruptFrame, UnknownCodec
from kvchat.recode import CPU, _fill, read_part, recode
from kvchat.store.records import segment_id
from kvchat.store.store import SegmentRecord, Store
from kvchat.worker import Worker
from tests.store_parts import converse
from tests.test_codecs import normal, random_ranking
from tests.test_session import QUESTIONS, SETTINGS
from tests.tiny import make_model

SHAPE = (2, 2, 90, 16)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = Store(tmp_path / "s.db")
    yield opened
    opened.close()


def segments(store: Store, codec: str = "k8v8", number: int = 2) -> list[SegmentRecord]:
    """Stored segments of one conversation, of random numbers, in four chunks."""
    _, path = converse(store, "trip", *("x" * 43 for _ in range(2 * number)))
    found = []
    for index in range(number):
        messages = path[2 * index : 2 * index + 2]
        start = sum(len(message.token_ids) for message in path[: 2 * index])
        ranking = random_ranking(*SHAPE[:3], 4, start)
        keys, values = normal(*SHAPE, torch.bfloat16, index), normal(*SHAPE, torch.bfloat16, index + 50)
        header, frames = encode_segment(codec, [k + 30 for k in keys], values, ranking)
        identity = segment_id("f1", "sealed", "random", codec, messages[0].id, messages[1].id)
        names = tuple(message.id for message in messages)
        record = SegmentRecord(
            *(identity, "f1", start, start + 90, "sealed", codec, "random", names, header.to_bytes(), 4),
            num_groups=header.num_groups,
            stored_chunks=4,
        )
        store.put_segment(record, frames)
        found.append(record.id)
    return [one for one in map(store.segment, found) if one]


def thin(store: Store, record: SegmentRecord, chunks: int) -> SegmentRecord:
    """Only the first chunks stay."""
    with store._write("NORMAL"):
        store._db.execute("DELETE FROM frames WHERE segment_id = ? AND chunk >= ?", [record.id, chunks])
        nbytes = "(SELECT total(nbytes) FROM frames WHERE segment_id = id) + length(header)"
        store._db.execute(f"UPDATE segments SET stored_chunks = ?, nbytes = {nbytes} WHERE id = ?", [chunks, record.id])
    found = store.segment(record.id)
    assert found
    return found


def stored(store: Store) -> list[SegmentRecord]:
    ids = [row["id"] for row in store._rows("SELECT id FROM segments ORDER BY start_token")]
    return [one for one in map(store.segment, ids) if one]


@pytest.mark.parametrize("codec", ["k4v4", "eb10", "archive"])
def test_a_segment_takes_the_place_of_the_old_one(store: Store, codec: str) -> None:
    old = segments(store)
    exact = [read_part(store, one) for one in old]
    new = recode(store, old, codec)
    found = stored(store)
    assert [one.id for one in found] == [one.id for one in new] and len({one.id for one in [*old, *new]}) == 4
    for before, after, part in zip(old, found, exact, strict=True):
        kept = replace(after, id=before.id, codec=before.codec, header=before.header, nbytes=before.nbytes, basis=b"")
        assert kept == before and after.codec == codec
        again = read_part(store, after)
        assert again.ranking.start == part.ranking.start
        assert (again.ranking.chunk_of == part.ranking.chunk_of).all()
        late = slice(4, None)
        lost = (again.values[:, :, late].float() - part.values[:, :, late].float()).square().mean()
        assert 0 < float(lost) < 0.7 * float(part.values.float().square().mean())
        assert float((again.keys - part.keys).float().abs().mean()) < 1
    assert store.verify() == []
    rows = store._rows("SELECT id FROM bases")
    assert len(rows) == (codec == "archive")


def test_the_archive_shares_one_basis_which_goes_with_the_last(store: Store) -> None:
    new = recode(store, segments(store), "archive")
    assert new[0].basis == new[1].basis != b""
    for one in new:
        assert len(store._rows("SELECT id FROM bases")) == 1
        store.drop_segment(one.id)
    assert store._rows("SELECT id FROM bases") == []


def test_a_later_segment_takes_the_basis_that_is_there(store: Store) -> None:
    first, second = segments(store)
    (archived,) = recode(store, [first], "archive")
    (later,) = recode(store, [archived, second], "archive")
    assert later.basis == archived.basis and store.segment(archived.id) is not None


def test_what_is_in_the_codec_already_or_open_or_gone_is_left_alone(store: Store) -> None:
    first, second = segments(store)
    assert recode(store, [first, second], "k8v8") == []
    assert recode(store, [replace(first, kind="open")], "k4v4") == []
    (new,) = recode(store, [first], "k4v4")
    assert store.replace_segment(first.id, replace(new, id="b2:other"), []) is False
    assert [one.id for one in stored(store)] == [new.id, second.id]


@pytest.mark.parametrize("codec", ["k8v8", "k4v4", "archive"])
def test_of_a_thinned_segment_what_is_stored_is_written(store: Store, codec: str) -> None:
    (old, _) = segments(store, codec="raw")
    old = thin(store, old, 2)
    exact = read_part(store, old)
    assert int(exact.present.sum()) == int((exact.ranking.chunk_of < 2).sum())
    (new,) = recode(store, [old], codec)
    found = store.segment(new.id)
    assert found and (found.stored_chunks, found.num_chunks) == (2, 4)
    assert [chunk for chunk, _, _ in store.frames(new.id, range(2))] == [0, 1]
    with pytest.raises(CorruptFrame):
        list(store.frames(new.id, [2]))
    assert store.verify() == []
    again, there = read_part(store, found), exact.present.unsqueeze(3)
    error = ((again.keys - exact.keys).float() * there).abs().amax()
    # Zeros in the places of what is missing would stretch the range to the bias of 30.
    assert float(error) < {"k8v8": 0.15, "k4v4": 0.5, "archive": 4}[codec]


def test_missing_pairs_are_their_heads_mean(store: Store) -> None:
    (old, _) = segments(store, codec="raw")
    part = read_part(store, thin(store, old, 1))
    for layer, head in ((0, 0), (1, 1)):
        there = part.present[layer, head]
        mean = part.keys[layer, head, there].double().mean(0)
        missing = part.keys[layer, head, ~there].double()
        torch.testing.assert_close(missing, mean.expand_as(missing), rtol=1e-2, atol=1e-2)


def test_precision_by_rank_is_written_chunk_by_chunk(store: Store) -> None:
    (new, _) = recode(store, segments(store), ["k8v8", "k4v4"])
    header = SegmentHeader.from_bytes(new.header)
    assert new.codec == "k8v8,k4v4" and header.codecs == ("k8v8", "k4v4")


def test_a_damaged_segment_stops_it_and_stays(store: Store) -> None:
    first, second = segments(store)
    with store._write("NORMAL"):
        store._db.execute("UPDATE frames SET body = zeroblob(9) WHERE segment_id = ?", [second.id])
    with pytest.raises(CodecError):
        recode(store, [first, second], "k4v4")
    assert [one.codec for one in stored(store)] == ["k4v4", "k8v8"]
    with pytest.raises(UnknownCodec, match="'k1v1'"):
        recode(store, [first, second], "k1v1")


def test_going_down_the_ladder_costs_hardly_more_than_going_at_once() -> None:
    x = normal(1, 1, 256, 16, torch.bfloat16)
    ranking = Ranking.single(0, 1, 1, 256)
    assert 256 % GROUP == 0
    from kvchat.recode import CPU, dense

    def after(codec: str, keys: list[torch.Tensor]) -> list[torch.Tensor]:
        header, frames = encode_segment(codec, keys, keys, ranking)
        return list(dense(header, frames, CPU)[0])

    at_once, by_steps = after("k4v4", x), after("k4v4", after("k8v8", x))
    errors = [float((out[0] - x[0]).float().square().mean()) for out in (at_once, by_steps)]
    assert errors[1] < 1.1 * errors[0]


def test_one_segment_at_a_time_is_in_memory(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    old, made, alive = segments(store, number=3), list[weakref.ref[torch.Tensor]](), list[int]()

    def watched(store: Store, record: SegmentRecord, device: torch.device = CPU) -> Part:
        alive.append(sum(one() is not None for one in made))
        part = read_part(store, record, device)
        made.extend([weakref.ref(part.keys), weakref.ref(part.values)])
        return part

    monkeypatch.setattr(recode_module, "read_part", watched)
    for codec in ("eb5", "archive"):
        old = recode(store, old, codec)
    assert alive == [0] * 9


def test_what_is_not_there_is_the_mean_of_its_head() -> None:
    rows, there = torch.randn(2, 3, 20, 4), torch.rand(2, 3, 20, 1) < 0.5
    there[0, 0], filled = False, rows.clone()
    _fill(filled, there)
    assert torch.equal(filled.where(there, 0), rows.where(there, 0))
    for layer, head in np.ndindex(2, 3):
        here = there[layer, head, :, 0]
        mean = rows[layer, head, here].mean(0) if here.any() else torch.zeros(4)
        assert torch.allclose(filled[layer, head, ~here], mean.expand(int((~here).sum()), 4), atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"head_dim": 1 << 62}, "not a segment's header"),
        ({"head_dim": 1 << 20}, "not a segment's header"),
        ({"head_dim": 4096}, "its header asks for"),
        ({"start": 7}, "tokens from 7 on"),
        ({"group_size": 1}, "chunks and groups"),
    ],
)
def test_a_header_that_is_not_that_of_its_record_is_refused(
    store: Store, changes: dict[str, int], problem: str
) -> None:
    old, _ = segments(store, "raw")
    head, planes = unpack(old.header, limit=1 << 20)
    with store._write("NORMAL"):
        lie = pack({**head, **changes}, planes)
        store._db.execute("UPDATE segments SET header = ? WHERE id = ?", [lie, old.id])
    found = store.segment(old.id)
    assert found
    with pytest.raises(CorruptFrame, match=problem):
        recode(store, [found], "k4v4")
    with pytest.raises(CorruptFrame):
        recode(store, [found], "archive")


# Sessions


def worker(path: Path) -> Worker:
    config = Config.load(overrides={"store.path": str(path), **SETTINGS, "compress.keep_ratio": 1.0})
    model = make_model("llama", torch.float32)
    return Worker(config, None, lambda *_: model)


@pytest.fixture
def database(tmp_path: Path) -> Path:
    """A store with the closed session "trip"."""
    running = worker(tmp_path / "s.db")
    with running.open("trip") as session:
        for question in QUESTIONS:
            session.ask(question)
    running.close()
    return tmp_path / "s.db"


def run(database: Path, capsys: pytest.CaptureFixture[str], *argv: str, code: int = 0) -> Any:
    assert main([argv[0], "--store", str(database), *argv[1:]]) == code
    return capsys.readouterr()


def test_an_archived_session_resumes_and_goes_on(database: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for codec in ("k4v4", "archive"):
        said = json.loads(run(database, capsys, "archive", "trip", "--codec", codec, "--json").out)
        assert said["codec"] == codec and said["recoded"] > 0
    store = Store(database)
    kinds = {(one.kind, one.codec) for one in stored(store)}
    store.close()
    assert ("sealed", "archive") in kinds and kinds <= {("sealed", "archive"), ("open", "raw")}
    running = worker(database)
    with running.open("trip") as session:
        session.ask("And the second night?")
        done = session.stats()
    running.close()
    assert "archive" in {segment["codec"] for segment in done["segments"]}
    assert done["last"]["usage"]["cached_tokens"] > 100


def test_the_command_says_what_it_did(database: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = run(database, capsys, "archive", "trip", "--codec", "eb10,eb20").out
    assert said.startswith("trip: ") and " before, " in said
    again = json.loads(run(database, capsys, "archive", "trip", "--codec", "eb10,eb20", "--json").out)
    assert again["recoded"] == 0 and again["bytes_before"] == again["bytes_after"]


def test_an_unknown_codec_or_session_is_one_line(database: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "known: raw" in run(database, capsys, "archive", "trip", "--codec", "k1v1", code=1).err
    assert "'trap'" in run(database, capsys, "archive", "trap", code=1).err


def test_an_open_session_is_refused_and_what_it_shares_is_left(
    database: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    running = worker(database)
    with running.open("trip"):
        assert "trip" in run(database, capsys, "archive", "trip", code=1).err
        run(database, capsys, "fork", "trip", "trip-2")
        shared = json.loads(run(database, capsys, "archive", "trip-2", "--json").out)
    running.close()
    assert shared["recoded"] == 0 and shared["segments"] > 0
