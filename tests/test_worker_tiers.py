"""Many open sessions under one limit of memory: who gives way, and that nothing is computed when one is used again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvchat.balance import held_bytes
from kvchat.config import Config
from kvchat.handle import Session
from kvchat.planning import would_decide
from kvchat.worker import Worker
from tests.tiny import make_model

SETTINGS = {
    "generate.temperature": 0,
    "generate.max_new_tokens": 8,
    "compress.segment_min": 60,
    "compress.recent_tokens": 20,
    "compress.keep_ratio": 0.5,
    "model.prefill_chunk_size": 32,
}
QUESTIONS = ["Where did we stay in Rome?", "What did it cost, and was it far from the river?", "Who was with us then?"]
KEPT = 350_000
"""Bytes that about four of these sessions have in memory, in float32."""

Open = Callable[..., Worker]


@pytest.fixture
def opener(tmp_path: Path) -> Iterator[Open]:
    """Makes workers, each on a store of that name."""
    workers: list[Worker] = []

    def start(store: str = "s.db", listener: Any = None, **settings: Any) -> Worker:
        given = {
            "store.path": str(tmp_path / store),
            **SETTINGS,
            **{k.replace("__", "."): v for k, v in settings.items()},
        }
        workers.append(Worker(Config.load(overrides=given), listener, lambda *_: make_model()))
        return workers[-1]

    yield start
    for worker in workers:
        worker.close()


def sessions(worker: Worker, count: int) -> list[Session]:
    """Open sessions that have said different things."""
    opened = []
    for number in range(count):
        opened.append(worker.open(f"s{number}"))
        for question in QUESTIONS:
            opened[-1].ask(f"{number}: {question}")
    return opened


def held(worker: Worker) -> int:
    """Bytes in memory of all open sessions."""
    return worker.jobs.call(lambda: sum(held_bytes(one.residence) for one in worker._conversations()))


def probe(session: Session) -> list[tuple[str, float]]:
    """Exact log-probabilities: equal only if every bit of the state is."""
    return session.logprobs("And the second night?", "It was quiet.")


@pytest.mark.parametrize(("host_cache", "count"), [("256MiB", 10), ("0", 6)])
def test_ten_sessions_under_a_limit_go_on_bit_for_bit_and_compute_nothing(
    opener: Open, host_cache: str, count: int
) -> None:
    kept = KEPT * count // 10
    free = opener("free.db")
    expected = sessions(free, count)
    worker = opener(model__memory_budget=kept, store__host_cache=host_cache)
    opened = sessions(worker, count)
    assert held(free) > 2.5 * kept
    for turn, order in enumerate([(3, 0, 9, 3, 5, 1, 2, 4, 6, 7, 8), (0, 5, 1, 0)]):
        for number in [number for number in order if number < count]:
            plain, reply = (one[number].ask(f"And then, {turn}?") for one in (expected, opened))
            assert reply.text == plain.text
            assert reply.usage == plain.usage  # nothing but the question is computed
            opened[number].settle()
            assert held(worker) <= kept
    for plain_session, session in zip(expected, opened, strict=True):
        assert probe(session) == probe(plain_session)
    stats = opened[0].stats()
    assert stats["why"] and any("moves to host" in line or "is let go" in line for line in stats["why"])
    assert (stats["host"] is None) == (host_cache == "0")
    assert stats["bandwidths"].keys() == {"disk", "decode", "prefill"} and stats["memory_budget"] == kept


def test_without_a_limit_nobody_gives_way(opener: Open) -> None:
    worker = opener()
    opened = sessions(worker, 4)
    assert opened[0].stats()["why"] == []
    assert all(worker.balance.is_whole(one) for one in worker._conversations())


def test_the_session_that_is_used_seldom_gives_way_first(opener: Open) -> None:
    worker = opener(model__memory_budget=KEPT)
    often, seldom = worker.open("often"), worker.open("seldom")
    for question in QUESTIONS:
        seldom.ask(question)
    for question in QUESTIONS * 2:
        often.ask(question)
    new = worker.open("new")
    while worker.jobs.call(lambda: not worker.balance.why):
        new.ask(QUESTIONS[1])
    assert worker.jobs.call(lambda: [*worker.balance.why])[0].startswith("seldom ")
    assert worker.jobs.call(lambda: worker.balance.is_whole(often._conversation))


def test_chores_leave_a_session_alone_that_gave_way(opener: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = opener(model__memory_budget=KEPT)
    sessions(worker, 8)
    away = worker.jobs.call(
        lambda: {one.info.id for one in worker._conversations() if not worker.balance.is_whole(one)}
    )
    assert away
    before = held(worker)
    worker.jobs.call(lambda: worker._mend(lambda: False))
    worker.jobs.call(lambda: worker._probe(lambda: False))
    still = worker.jobs.call(
        lambda: {one.info.id for one in worker._conversations() if not worker.balance.is_whole(one)}
    )
    assert still == away and held(worker) <= max(before, KEPT)


def test_prefetch_brings_a_session_back_before_it_is_asked(opener: Open) -> None:
    worker = opener(model__memory_budget=KEPT)
    opened = sessions(worker, 8)
    first = opened[0]._conversation
    assert worker.jobs.call(lambda: not worker.balance.is_whole(first))
    opened[0].prefetch()
    assert (
        worker.jobs.call(lambda: worker.balance.is_whole(first) and first.residence.cache.num_seen) == first.num_tokens
    )
    worker.jobs.call(lambda: worker.balance.host and worker.balance.host.stats())
    assert held(worker) <= KEPT


def test_frames_of_what_gave_way_are_read_from_host_memory(opener: Open) -> None:
    worker = opener(model__memory_budget=KEPT)
    opened = sessions(worker, 8)
    for one in opened:
        one.ask("Go on.")
    for one in opened:
        one.ask("Go on.")
    stats = opened[0].stats()["host"]
    assert stats["hits"] > 0 and stats["nbytes"] <= stats["cap"]


def test_what_would_be_decided_for_stored_sessions_can_be_asked(opener: Open, tmp_path: Path) -> None:
    worker = opener()
    sessions(worker, 4)
    worker.close()
    worker = opener()
    config = worker.config
    assert worker.jobs.call(lambda: would_decide(worker._store, config)) == []
    tight = config.replaced({"model.memory_budget": 200_000, "store.disk_budget": 60_000})
    told = [str(one) for one in worker.jobs.call(lambda: would_decide(worker._store, tight))]
    assert any(" of memory for " in line for line in told) and any(" of disk for " in line for line in told)
    assert told[0].startswith("s0 ")  # not used for longest
