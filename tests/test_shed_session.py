"""Sessions on a tiny random model whose store has too little room: memory holds what the store holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kvchat.config import Config
from kvchat.errors import ConfigError
from kvchat.events import Notice
from kvchat.fingerprint import fingerprint_id
from kvchat.handle import Session
from kvchat.residence.tiers import would_hold
from kvchat.store.limited import LimitedStore
from kvchat.store.store import SessionInfo, Store
from kvchat.worker import Worker
from tests.store_parts import copy_of
from tests.test_session import QUESTIONS, SETTINGS, play, probe
from tests.tiny import make_model

Open = Callable[..., Worker]
Figures = list[dict[str, Any]]

SHAPE = {"layers": 4, "heads": 4, "kv_heads": 4, "head_dim": 64}
"""Large enough that a rank chunk fills pages of its own."""


@pytest.fixture
def opener(tmp_path: Path) -> Iterator[Open]:
    """Makes workers on one store; each new one stands for a new process."""
    workers: list[Worker] = []

    def start(budget: int | str = 0, listener: Any = None, **settings: Any) -> Worker:
        given = {
            "store.path": str(tmp_path / "s.db"),
            "store.disk_budget": budget,
            "store.min_free": 0,
            **SETTINGS,
            **{key.replace("__", "."): value for key, value in settings.items()},
        }
        model = make_model("llama", torch.float32, **SHAPE)
        workers.append(Worker(Config.load(overrides=given), listener, lambda *_: model))
        return workers[-1]

    yield start
    for worker in workers:
        worker.close()


def sealed(session: Session) -> Figures:
    return [segment for segment in session.stats()["segments"] if segment["kind"] == "sealed"]


def in_use(session: Session) -> int:
    return int(session.stats()["store"]["bytes_in_use"])


BASE = 491_520
"""What the empty tables take."""


@pytest.mark.parametrize(("codec", "room"), [("k8v8", 560_000), ("raw", 1_200_000)])
def test_what_goes_on_under_a_small_budget_equals_what_is_resumed_bit_for_bit(
    opener: Open, tmp_path: Path, codec: str, room: int
) -> None:
    budget, told = BASE + room, list[Any]()
    how = {"budget": budget, "codec__name": codec}
    worker = opener(**how, listener=told.append)
    live = worker.open("trip")
    for number, question in enumerate(QUESTIONS * 2):
        live.ask(question)
        live.settle()
        again = opener(**how, store__path=str(copy_of(tmp_path / "s.db", number)))
        resumed = again.open("trip")
        assert probe(resumed) == probe(live), f"after turn {number + 1}"
        assert resumed.stats()["segments"] == live.stats()["segments"]
        again.close()
        assert in_use(live) <= budget
    figures = sealed(live)
    assert all(1 <= one["chunks_held"] <= one["stored_chunks"] for one in figures)
    assert any(one["stored_chunks"] < one["num_chunks"] for one in figures)
    assert 0 < live.stats()["stored"] < 1
    assert len([event for event in told if isinstance(event, Notice) and "better part" in event.text]) <= 1
    worker.close()
    store = Store(tmp_path / "s.db")
    assert store.verify() == []
    store.close()


def test_kv_that_has_no_room_stays_exact_in_memory_and_is_said_once(opener: Open) -> None:
    exact = opener(store__path=str(Path(opener().config.store.path).with_name("exact.db")), compress__segment_min=9999)
    told: list[Any] = []
    worker = opener(budget=BASE, listener=told.append)
    session = worker.open("trip")
    assert play(session) == play(exact.open("trip"))
    session.settle()
    stats = session.stats()
    assert stats["segments"] == [] and stats["stored"] == 0 and stats["num_kept"] == stats["num_pairs"]
    [notice] = [event.text for event in told if isinstance(event, Notice)]
    assert "as full as store.disk_budget allows" in notice and "stays in memory only" in notice
    total = stats["num_tokens"]
    worker.close()
    again = opener(budget=BASE).open("trip")
    usage = again.ask("And then?").usage
    assert usage.cached_tokens == 0 and usage.prefilled_tokens > total


def test_room_that_comes_back_is_used_when_twice_as_much_waits(opener: Open, tmp_path: Path) -> None:
    worker = opener(budget=BASE + 100_000)
    session = worker.open("trip")
    play(session, QUESTIONS[:2])
    session.settle()
    assert session.stats()["segments"] == []
    worker._store.allowance = opener(store__path=str(tmp_path / "other.db"))._store.allowance
    play(session, QUESTIONS * 2)
    session.settle()
    stats = session.stats()
    assert stats["segments"][0]["start"] == 0 and stats["segments"][-1]["end"] == stats["num_tokens"]
    assert stats["stored"] == 1


def test_an_open_session_lets_go_of_what_the_store_gave_up_for_another(opener: Open, tmp_path: Path) -> None:
    how: dict[str, Any] = {"budget": BASE + 800_000, "compress__keep_ratio": 1.0}
    worker = opener(**how)
    with worker.open("cold") as cold:
        play(cold, [question.upper() for question in QUESTIONS])
    first, second = worker.open("first"), worker.open("second")
    play(first)
    before = sealed(first)
    play(second, [question[::-1] for question in QUESTIONS])
    second.settle()
    live = probe(first)
    after = sealed(first)
    assert [one["id"] for one in before] == [one["id"] for one in after]
    assert all(one["chunks_held"] == one["num_chunks"] for one in before)
    assert any(one["chunks_held"] < one["num_chunks"] for one in after)
    assert [one["chunks_held"] for one in after] == [one["stored_chunks"] for one in after]
    assert {info.name for info in worker.sessions() if not info.stored} == {"cold"}
    again = opener(**how, store__path=str(copy_of(tmp_path / "s.db", 0)))
    assert probe(again.open("first")) == live
    assert first.ask("And then?").text == again.open("first").ask("And then?").text


def test_what_goes_first_is_not_missed_by_a_session_that_is_resumed(opener: Open, tmp_path: Path) -> None:
    worker = opener()
    session = worker.open("cold")
    play(session, QUESTIONS * 2)
    session.settle()
    live, used = probe(session), in_use(session)
    worker.close()
    told: list[Any] = []
    worker = opener(budget=used - 330_000, listener=told.append)
    session = worker.open("cold")
    assert probe(session) == live
    stored = [(one["chunks_held"], one["stored_chunks"]) for one in sealed(session)]
    assert all(count < 7 for _, count in stored[:-1]) and all(held <= count for held, count in stored)
    [notice] = [event.text for event in told if isinstance(event, Notice)]
    assert "were given up to keep to store.disk_budget" in notice


def test_a_lower_limit_is_kept_to_at_start_and_all_text_stays(opener: Open, tmp_path: Path) -> None:
    worker = opener()
    said = {}
    for name in ("one", "two"):
        with worker.open(name) as session:
            play(session, QUESTIONS[:2])
            said[name] = [message.content for message in session.messages()]
    worker.close()
    worker = opener(budget=1)
    assert {info.name: info.stored for info in worker.sessions()} == {"one": 0, "two": 0}
    assert {name: [message.content for message in worker.open(name).messages()] for name in said} == said
    worker.close()
    store = Store(tmp_path / "s.db")
    assert store.stats()["segments"] == 0 and store.verify() == []
    store.close()


def test_cold_kv_is_written_with_fewer_bits_before_all_of_it_goes(opener: Open, tmp_path: Path) -> None:
    one_chunk = {"compress__rank_chunks": [1.0], "compress__keep_ratio": 1.0}
    worker = opener(**one_chunk)
    with worker.open("cold") as session:
        play(session, QUESTIONS * 2)
        used, tokens = in_use(session), session.stats()["num_tokens"]
    worker.close()
    seen = []
    for less in (20_000, 500_000):
        opener(used - less, **one_chunk).close()
        store = Store(tmp_path / "s.db")
        seen.append([row["codec"] for row in store._rows("SELECT codec FROM segments ORDER BY start_token")])
        assert store.verify() == [] and store.session("cold").stored == 1
        store.close()
    assert seen == [["k4v4", "k8v8", "k8v8", "k8v8"], ["archive"] * 4]
    assert opener(used - 500_000, **one_chunk).open("cold").ask("And then?").usage.cached_tokens == tokens


def test_what_is_opened_while_room_is_made_is_not_written_anew(
    opener: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one_chunk = {"compress__rank_chunks": [1.0], "compress__keep_ratio": 1.0}
    worker, told = opener(**one_chunk), list[Session]()
    for name, questions in (("cold", QUESTIONS), ("warm", [question[::-1] for question in QUESTIONS])):
        with worker.open(name) as session:
            play(session, questions * 2)
            used = in_use(session)
    worker.close()
    other, plan = opener(**one_chunk), LimitedStore._plan

    def plan_and_open(*given: Any) -> Any:
        found = plan(*given)
        told.extend([] if told else [other.open("cold")])  # just after it was asked who is open
        return found

    monkeypatch.setattr(LimitedStore, "_plan", plan_and_open)
    opener(used - 20_000, **one_chunk).close()
    monkeypatch.undo()
    live = probe(told[0])
    copy = copy_of(tmp_path / "s.db", 0)
    assert probe(opener(store__path=str(copy), **one_chunk).open("cold")) == live
    store = Store(copy)
    codecs = {info.name: codecs_of(store, info) for info in store.sessions()}
    store.close()
    assert codecs["cold"] == {"k8v8"} and "k4v4" in codecs["warm"]


def test_the_header_of_another_segment_says_nothing_of_what_memory_would_hold(opener: Open, tmp_path: Path) -> None:
    worker = opener()
    with worker.open("trip") as session:
        play(session, QUESTIONS * 2)
        held = [one["chunks_held"] for one in sealed(session)]
    worker.close()
    store = Store(tmp_path / "s.db")
    info = store.session("trip")
    cover = store.cover([message.id for message in store.path(info.tip)], fingerprint_id(info.fingerprint))
    records = [record for record, _ in cover if record.kind == "sealed"]
    store.close()
    config = Config.load(overrides=SETTINGS).compress
    assert would_hold(config, records, info.num_tokens) == held and held[0] < 7
    moved = replace(records[0], start=records[0].start + 1)
    more = replace(records[0], num_chunks=8)
    for other in (moved, more):
        assert would_hold(config, [other, *records[1:]], info.num_tokens) == [7, *held[1:]]


def codecs_of(store: Store, info: SessionInfo) -> set[str]:
    """Those of its sealed segments."""
    cover = store.cover([message.id for message in store.path(info.tip)], fingerprint_id(info.fingerprint))
    return {record.codec for record, _ in cover if record.kind == "sealed"}


def test_sizes_are_read_with_their_unit() -> None:
    limits = Config.load(overrides={"store.disk_budget": "20GiB", "store.min_free": "0"}).store
    assert (limits.disk_budget, limits.min_free) == (20 << 30, 0)
    assert Config.load(overrides={"store.disk_budget": ""}).store.disk_budget == 0
    for wrong in ("much", "-1", "20 bananas"):
        with pytest.raises(ConfigError, match=r"setting store\.disk_budget"):
            Config.load(overrides={"store.disk_budget": wrong})
