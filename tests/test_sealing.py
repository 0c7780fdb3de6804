"""Sealed rows come straight from their codes, equal in every bit to what is read back; they are written later."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from kvchat import worker
from kvchat.cache.pack import _uploaded
from kvchat.cache.ragged import SegmentedCache
from kvchat.codecs import coded_frame, decode_frame, decoded
from kvchat.codecs.coded import coded_planes
from kvchat.codecs.encode import pack_frame, read_segment
from kvchat.compress.compressor import rank
from kvchat.config import Config
from kvchat.engine import Engine
from kvchat.errors import StoreError
from kvchat.events import Notice
from kvchat.handle import Session
from kvchat.residence import saving
from kvchat.store.shed import Allowance
from kvchat.store.store import Store
from kvchat.worker import Worker
from tests.store_parts import copy_of
from tests.test_correct import Played
from tests.test_session import QUESTIONS, SETTINGS, probe
from tests.tiny import make_model

CODECS: list[str | list[str]] = ["raw", "k8v8", "k4v4", "k8v4", "k4v2", "eb5", ["k8v8", "k4v4", "k4v2", "raw"]]
CPU = torch.device("cpu")

Open = Callable[..., Worker]


@pytest.fixture
def opener(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Open]:
    """Makes workers that write nothing in spare time."""
    monkeypatch.setattr(worker, "SAVE_AFTER_S", 60.0)
    workers: list[Worker] = []

    def start(listener: Any = None, dtype: torch.dtype = torch.bfloat16, **settings: Any) -> Worker:
        given = {key.replace("__", "."): value for key, value in settings.items()}
        config = Config.load(overrides={"store.path": str(tmp_path / "s.db"), **SETTINGS, **given})
        workers.append(Worker(config, listener, lambda *_: make_model(dtype=dtype)))
        return workers[-1]

    yield start
    for one in workers:
        one.close()


def unsaved(session: Session) -> int:
    return session._call(lambda: len(session._conversation.residence.saver))


def segments(session: Session) -> int:
    return int(session._call(lambda: session._conversation.store.stats()["segments"]))


def cache_of(session: Session) -> SegmentedCache:
    """Read when nothing is under way any more."""
    return session._call(lambda: session._conversation.residence.cache)


# -- rows --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", CODECS, ids=str)
@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 1e6), (torch.bfloat16, 1.0), (torch.float16, 1000.0)])
def test_rows_from_planes_equal_those_of_the_written_frames(
    codec: str | list[str], dtype: torch.dtype, size: float
) -> None:
    generator = torch.Generator().manual_seed(3)
    # Room behind each head's tokens, as in a tail.
    room = [(torch.randn(3, 90, 16, generator=generator) * size).to(dtype) for _ in range(4)]
    keys, values = [part[:, :77] for part in room[:2]], [part[:, :77] for part in room[2:]]
    scores = torch.rand(2, 3, 77, generator=generator)
    scores[1, 2] = 0
    reading = read_segment(codec, keys, values, rank(scores, [False] * 77, (0.2, 0.5, 0.8, 1.0), 100))
    for one in reading.frames:
        blob = pack_frame(reading.header, one.chunk, one.group, one.planes)
        plain = decode_frame(reading.header, one.chunk, one.group, blob, CPU)
        read = coded_frame(reading.header, one.chunk, one.group, blob)
        for found, again, expected in zip(coded_planes(reading, one), read, plain, strict=True):
            assert found.form == again.form and (found.runs == again.runs).all()
            for plane, other in zip((*found.planes, found.positions), (*again.planes, again.positions), strict=True):
                assert torch.equal(plane, other) and plane.dtype == other.dtype
            rows = decoded(found)
            assert torch.equal(rows.keys, expected.keys) and torch.equal(rows.values, expected.values)


@pytest.mark.parametrize("residence", ["encoded", "decoded"])
@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_a_session_that_sealed_holds_what_one_holds_that_resumed(
    opener: Open, codec: str | list[str], residence: str
) -> None:
    how = {"codec__name": codec, "model__residence": residence}
    first = opener(**how)
    live = first.open("trip")
    for question in QUESTIONS:
        live.ask(question)
    live.settle()
    again = opener(**how)
    fork = live.fork("other")  # one that shares it, restored from the store
    fork.settle()
    one, other = cache_of(live), cache_of(fork)
    assert one.pieces == other.pieces and one.num_sealed_rows == other.num_sealed_rows > 0
    for layer, restored in zip(one.layers, other.layers, strict=True):
        for form, read in zip(layer.forms, restored.forms, strict=True):
            assert form.form == read.form and (form.runs == read.runs).all()
            for plane, same in zip((*form.planes, form.positions), (*read.planes, read.positions), strict=True):
                assert torch.equal(plane, same)
    again.close()


def test_chunks_that_memory_does_not_hold_are_never_made_rows(opener: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    made, make = list[int](), saving.coded_planes
    monkeypatch.setattr(saving, "coded_planes", lambda reading, one: [made.append(one.chunk), make(reading, one)][1])
    session = opener(compress__recent_tokens=0).open("trip")
    session.ask(QUESTIONS[0] * 3)
    [segment] = session.stats()["segments"]
    assert set(made) == set(range(segment["chunks_held"])) and segment["chunks_held"] < segment["num_chunks"]


@pytest.mark.parametrize("codec", ["raw", "k8v8", "k4v4", ["k8v8", "k4v4", "raw"]], ids=str)
@pytest.mark.parametrize("position", [1, 25, 40, 41, 60, 200])
def test_rows_before_a_position_are_those_of_all_rows(codec: Any, position: int) -> None:
    played = Played(Engine(make_model("qwen2", heads=6, kv_heads=2), 16, "encoded"), 0.6, codec)
    for layer in played.cache.layers:
        rows, found = layer.sealed, layer.sealed_before(position)
        early = rows.positions < position
        assert torch.equal(found.keys, rows.keys[early]) and torch.equal(found.positions, rows.positions[early])
        assert torch.equal(found.values, rows.values[early]) and found.bounds[-1] == int(early.sum())


def test_the_beginning_of_a_conversation_is_decoded_once_and_again_when_it_changes() -> None:
    played = Played(Engine(make_model("qwen2", heads=6, kv_heads=2), 16, "encoded"), 0.6, "k8v8")
    cache, layer = played.cache, played.cache.layers[0]
    start = max(piece.start for piece in layer.pieces)
    early = layer.sealed_before(start)
    played.engine.forward(cache, [9] * 40)
    played.seal("late", 0.6, "k8v8")
    assert layer.sealed_before(start) is early, "a later segment changes nothing"
    assert layer.sealed_before(start - 1) is not early
    for change in (lambda: cache.keep(sorted(cache.pieces)[1:]), lambda: cache.crop(start - 5), cache.clear):
        before = layer.sealed_before(start)
        change()
        rows, found = layer.sealed, layer.sealed_before(start)
        assert found is not before and torch.equal(found.positions, rows.positions[rows.positions < start])


# -- writing later -----------------------------------------------------------------------------------------------------


def test_a_turn_does_not_wait_for_what_is_still_to_be_written(opener: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, pack = threading.Event(), pack_frame

    def packed(*frame: Any) -> bytes:
        gate.wait(5)
        return pack(*frame)

    monkeypatch.setattr(saving, "pack_frame", packed)
    # What a question brings back must have been written.
    session = opener(compress__segment_min=1, recall__by="off").open("trip")
    for number, question in enumerate(QUESTIONS, 1):
        assert session.ask(question).text
        assert unsaved(session) == number
    assert segments(session) == 0
    gate.set()
    session.settle()
    assert unsaved(session) == 0
    stats = session.stats()
    assert [one["end"] for one in stats["segments"]][-1] == stats["num_tokens"] and stats["stored"] == 1


def test_it_is_written_when_no_job_waits(opener: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "SAVE_AFTER_S", 0.0)
    put, written = Store.put_segment, threading.Event()

    def told(store: Store, *segment: Any) -> bool:
        done = put(store, *segment)
        written.set()
        return done

    monkeypatch.setattr(Store, "put_segment", told)
    opener().open("trip").ask(QUESTIONS[0] * 3)
    assert written.wait(30)


def test_what_was_not_written_is_computed_again(opener: Open, tmp_path: Path) -> None:
    # In 16 bits what is computed in other portions may have another likeliest token.
    exact = {"codec__name": "raw", "compress__keep_ratio": 1.0, "dtype": torch.float32}
    live = opener(**exact).open("trip")
    for question in QUESTIONS:
        live.ask(question)
    assert unsaved(live)
    copy = copy_of(tmp_path / "s.db", 0)  # what a kill leaves
    said = [message.content for message in live.messages()]
    store = Store(copy)
    assert store.verify() == []
    store.close()
    other = opener(**exact, store__path=str(copy))
    resumed = other.open("trip")
    assert [message.content for message in resumed.messages()] == said
    assert resumed.ask("And then?").text == live.ask("And then?").text
    assert resumed.stats()["stored"] == 1


def test_a_store_without_room_says_so_and_the_rows_stay(opener: Open) -> None:
    session = opener().open("trip")
    session.ask(QUESTIONS[0] * 3)
    assert unsaved(session) == 1
    before = cache_of(session).num_sealed_rows
    session._conversation.store.allowance = Allowance(disk_budget=1)
    session.settle()
    assert unsaved(session) == segments(session) == 0 and cache_of(session).num_sealed_rows == before > 0
    [notice] = [event.text for event in session.send("And then?") if isinstance(event, Notice)]
    assert "as full as store.disk_budget allows" in notice and "stays in memory only" in notice
    session.settle()
    assert not [event for event in session.send("So?") if isinstance(event, Notice)]
    stats = session.stats()
    assert stats["stored"] == 0 and stats["num_seen"] == stats["num_tokens"]
    assert all(one["rows"] and not (one["stored_chunks"] or one["bytes_on_disk"]) for one in stats["segments"])


def test_no_more_waits_than_host_memory_may_hold(opener: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saving, "MOST_WAITING", 60_000)
    session = opener(compress__segment_min=1).open("trip")
    saver, waiting = session._conversation.residence.saver, []
    for question in QUESTIONS * 3:
        session.ask(question)
        waiting.append(sum(one.nbytes for one in session._call(lambda: list(saver._waiting))))
    assert 0 < max(waiting) <= 60_000 and segments(session) > 0


def test_taking_much_in_writes_on_the_way(opener: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    most, put_off = list[int](), saving.Saver.put_off

    def watched(saver: saving.Saver, *given: Any) -> Any:
        yield from put_off(saver, *given)
        most.append(len(saver))

    monkeypatch.setattr(saving.Saver, "put_off", watched)
    session = opener().open("trip")
    said = [{"role": ("user", "assistant")[i % 2], "content": f"Line {i} of a long talk."} for i in range(40)]
    session.append(said)
    assert len(most) > 4 and max(most) <= 2


@pytest.mark.parametrize("what", ["stats", "rewind", "fork", "check", "close"])
def test_whoever_looks_at_the_store_finds_everything(opener: Open, tmp_path: Path, what: str) -> None:
    session = opener().open("trip")
    session.ask(QUESTIONS[0] * 3)
    assert unsaved(session) == 1
    looks: dict[str, Callable[[], object]] = {
        "stats": session.stats,
        "rewind": session.rewind,
        "fork": lambda: session.fork("other"),
        "check": session.check,
        "close": session.close,
    }
    looks[what]()
    store = Store(tmp_path / "s.db")
    assert store.stats()["kinds"] == {"sealed": 1} and store.verify() == []
    store.close()


def test_a_segment_that_comes_back_before_it_is_written_is_written_once(opener: Open) -> None:
    session = opener(compress__segment_min=1).open("trip")
    session.ask(QUESTIONS[0])
    before = probe(session)
    session.ask(QUESTIONS[1])
    session.rewind()
    assert probe(session) == before
    session.ask(QUESTIONS[1])
    session.settle()
    stats = session.stats()
    assert stats["stored"] == 1 and len(stats["segments"]) == 2


SAID = [
    {"role": "user", "content": "Where?"},
    {"role": "assistant", "content": "By the river, in a small street behind the old market, as you know."},
    {"role": "user", "content": "Cost?"},
    {"role": "assistant", "content": "Ninety, and Ann paid for all of us in the end, which was kind."},
]


def test_what_another_session_wrote_of_the_same_messages_takes_the_place_of_ours(opener: Open) -> None:
    told: list[Any] = []
    how = {"compress__segment_min": 60, "compress__recent_tokens": 20, "compress__keep_ratio": 0.55}
    one, two = opener(**how | {"compress__keep_ratio": 0.3}).open("one"), opener(told.append, **how).open("two")
    for session in (one, two):
        session.append(SAID)
    one.settle()
    two.settle()
    residence = two._conversation.residence
    assert residence.saver.superseded
    two.append(
        [{"role": "user", "content": "And then what?"}, {"role": "assistant", "content": "Then we walked home."}]
    )
    two.settle()
    assert not residence.saver.superseded
    held = two._call(lambda: {one.id: one.header.to_bytes() for one in residence.tiers.residents})
    assert held == two._call(lambda: {name: residence.store.segment(name).header for name in held})  # type: ignore[union-attr]
    assert not [event for event in told if isinstance(event, Notice)]


def test_an_error_of_the_store_passes_and_does_not_block_for_ever(
    opener: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "SAVE_AFTER_S", 0.0)
    session = opener(compress__segment_min=1).open("trip")
    store, put = session._conversation.store, session._conversation.store.put_segment

    def busy(*segment: Any) -> bool:
        raise StoreError("busy")

    monkeypatch.setattr(store, "put_segment", busy)
    session.ask(QUESTIONS[0])
    with pytest.raises(StoreError):
        session.settle()
    monkeypatch.setattr(store, "put_segment", put)
    session.ask(QUESTIONS[1])
    session.settle()
    assert unsaved(session) == 0 and session.stats()["stored"] == 1
    monkeypatch.setattr(store, "put_segment", busy)
    session.ask(QUESTIONS[0])
    for _ in range(saving.MOST_TRIES):
        with suppress(StoreError):
            session.settle()
    assert unsaved(session) == 0 and session.ask(QUESTIONS[1]).text
    monkeypatch.setattr(store, "put_segment", put)


def test_scales_of_two_dtypes_are_joined_in_the_wider() -> None:
    planes = [torch.ones(2, 4, dtype=torch.float16), torch.full((1, 4), 1e6)]
    assert torch.equal(_uploaded(planes, CPU), torch.cat(planes)) and _uploaded(planes, CPU).dtype == torch.float32
