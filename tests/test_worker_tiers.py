"""Many open sessions under one limit of memory: who gives way, and that nothing is computed when one is used again."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from kvchat.config import Config
from kvchat.episodes.embedder import HiddenStates
from kvchat.episodes.vectors import Vectors
from kvchat.errors import ModelError, StoreDamaged, StoreError
from kvchat.footprint import held_bytes
from kvchat.handle import Session
from kvchat.planning import would_decide
from kvchat.worker import Worker
from tests.test_attach import TEXT
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


@pytest.mark.parametrize("by", ["text+embedding", "text"])
def test_vectors_are_made_before_a_question_waits_for_them(opener: Open, by: str) -> None:
    worker = opener(recall__by=by)
    session = sessions(worker, 1)[0]
    (conversation,) = worker._conversations()
    missing = partial(Vectors(worker._store, HiddenStates(conversation.engine)).missing, conversation.path)
    worker.jobs.call(lambda: worker._embed(lambda: False))
    left = [message.id for message in worker.jobs.call(missing)]
    assert left == ([] if "embedding" in by else [message.id for message in conversation.path])
    session.ask("And then?")


def test_what_a_draft_concerns_is_read_before_it_is_asked(opener: Open) -> None:
    names = ["Marlene", "Ottokar", "Sieglinde", "Walburga"]
    small = {"recall__by": "text", "recall__turns": 1, "compress__keep_ratio": 0.1, "compress__segment_min": 20}
    with closing(opener(**small)) as worker:
        session = worker.open("trip")
        for name in names:
            session.ask(f"{name} is the name that I like best of all.")
    worker = opener(**small)  # of which nothing was read but what is held
    session = worker.open("trip")
    (conversation,) = worker._conversations()
    host = worker.balance.host
    assert host
    segments = {entry.id: entry.num_chunks for entry in worker.jobs.call(lambda: conversation.residence.known)}
    first, chunks = next(iter(segments.items()))
    held = worker.jobs.call(lambda: {one.id: one.chunks for one in conversation.residence.tiers.residents})
    assert held[first] < chunks and host.chunks().get(first, 0) < chunks
    session.set_draft("  ")
    worker.jobs.call(lambda: worker._foresee(lambda: False))
    assert not host._ahead
    session.set_draft("What do I think of Marlene?")
    worker.jobs.call(lambda: worker._foresee(lambda: False))
    wait([future for future in host._ahead if not future.cancelled()], 60)
    assert host.chunks()[first] == chunks
    assert any(host.chunks().get(name, 0) < count for name, count in segments.items() if name != first)
    hits = host.stats()["hits"]
    session.ask("What do I think of Marlene?")
    assert host.stats()["hits"] >= hits + chunks


def test_an_embedder_that_is_not_there_is_told_who_asks(opener: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(self: HiddenStates, texts: object) -> None:
        raise ModelError("no network")

    told: list[Any] = []
    worker = opener(recall__by="embedding", listener=told.append)
    session = sessions(worker, 1)[0]
    monkeypatch.setattr(HiddenStates, "embed", refused)
    worker.jobs.call(lambda: worker._embed(lambda: False))
    assert not [event for event in told if "no network" in str(event)]
    with pytest.raises(ModelError, match="no network"):
        session.ask("Where was that?")


def test_giving_way_looks_for_nothing_else_to_free(opener: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    released: list[object] = []
    monkeypatch.setattr("kvchat.memory.release", released.append)
    worker = opener(model__memory_budget=KEPT)
    opened = sessions(worker, 8)
    gone = worker.jobs.call(lambda: [one for one in worker._conversations() if not one.residence.cache.num_seen])
    assert gone and not released and held(worker) <= KEPT
    assert opened[0].ask("Where was that?")


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
    assert any(" of memory for " in line for line in told) and any(" of disk, of " in line for line in told)
    assert told[0].startswith("s0 ")  # not used for longest


def gave_way(worker: Worker, session: Session) -> bool:
    """Whether part of it is in memory, and part is not."""
    one = session._conversation
    return worker.jobs.call(lambda: not worker.balance.is_whole(one) and bool(one.residence.tiers.residents))


def test_a_session_with_a_limit_of_its_own_asks_no_more_of_others_than_that(opener: Open) -> None:
    worker = opener()
    sessions(worker, 2)
    with worker.open("long") as long:
        for number in range(8):
            for question in QUESTIONS:
                long.ask(f"{number}: {question}")
    worker.close()
    worker = opener(compress__kv_budget="256 rows", model__memory_budget=500_000)
    for name in ("s0", "s1"):
        worker.open(name).ask("Go on.")
    worker.open("long").prefetch()
    assert worker.jobs.call(lambda: [*worker.balance.why]) == [] and held(worker) <= 500_000


def test_others_give_way_to_what_is_computed_in_spare_time(opener: Open) -> None:
    worker = opener()
    lost, *_ = sessions(worker, 4)
    for question in QUESTIONS * 2:
        lost.ask(question)
    lost.settle()
    said = [message.id for message in lost.messages()]
    cover = worker.jobs.call(lambda: worker._store.cover(said, lost._conversation.residence.fingerprint))
    worker.close()
    worker = opener(model__memory_budget=KEPT * 6 // 10)
    for record, _ in cover:
        worker.jobs.call(partial(worker._store.drop_segment, record.id))
    lost, *others = [worker.open(f"s{number}") for number in range(4)]
    for one in others:
        one.ask("And then?")
    most = 0

    def watched(event: Any) -> None:
        nonlocal most
        most = max(most, sum(held_bytes(one.residence) for one in worker._conversations()))

    worker.jobs._listener = watched
    worker.jobs.call(lambda: worker._mend(lambda: False))
    assert lost._conversation.residence.cache.num_seen == lost._conversation.num_tokens
    mine = held_bytes(lost._conversation.residence)
    assert held(worker) <= max(KEPT * 6 // 10, mine) and most < 300_000  # by no more than is computed at once


def test_what_could_not_come_back_comes_before_anything_is_computed(
    opener: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    free, worker = opener("free.db"), opener(model__memory_budget=KEPT * 6 // 10)
    expected, opened = sessions(free, 6), sessions(worker, 6)
    number = 0
    while not any(gave_way(worker, one) for one in opened):
        for each in (expected, opened):
            each[number].ask("More?")
        number += 1
    number = next(number for number, one in enumerate(opened) if gave_way(worker, one))
    with monkeypatch.context() as patch:
        patch.setattr(worker._store, "stored_chunks", lambda ids: raising(StoreError("database is locked")))
        with pytest.raises(StoreError, match="locked"):
            opened[number].logprobs("a", "b")
    assert probe(opened[number]) == probe(expected[number])


def raising(error: Exception) -> Any:
    raise error


def test_what_gave_way_and_is_gone_from_the_store_is_computed_again(opener: Open) -> None:
    worker = opener(model__memory_budget=250_000)
    with worker.open("one", system="Be brief.") as one:
        done = one.attach("report.txt", TEXT)
        one.ask("Where is it?")
        one.settle()
        whole = [*one._conversation.residence.tiers.residents]
        for number in range(8):
            worker.open(f"s{number}").ask(QUESTIONS[1])
            if gave_way(worker, one):
                break
        assert gave_way(worker, one)
        worker.delete(done.document)
        one.logprobs("a", "b")
        now = [(each.start, each.chunks) for each in one._conversation.residence.tiers.residents]
        assert now == [(each.start, each.chunks) for each in whole]


def test_a_session_that_cannot_be_read_keeps_no_other_from_its_turn(
    opener: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = opener(model__memory_budget=KEPT // 2)
    opened = sessions(worker, 3)
    monkeypatch.setattr(worker._store, "frame_bytes", lambda ids: raising(StoreDamaged("a page")))
    for one in opened:
        assert one.ask("And then?").finish_reason
    assert held(worker) <= KEPT // 2


def test_what_is_appended_is_finished_before_it_gives_way(opener: Open) -> None:
    worker = opener(model__memory_budget=160_000)
    one, other = sessions(worker, 2)
    messages = [
        {"role": "user", "content": "words and more " * 10},
        {"role": "assistant", "content": "yes " * 10},
    ]
    gate, threads = threading.Event(), list[threading.Thread]()
    worker.jobs.put(lambda: (gate.wait(10), None)[1])
    for work in (lambda: one.append(messages), lambda: other.ask("long " * 30)):  # before `append` is finished
        threads.append(threading.Thread(target=work))
        threads[-1].start()
        while worker.jobs._jobs.qsize() < len(threads):
            pass
    gate.set()
    for thread in threads:
        thread.join()
    assert one.ask("So?").usage.prefilled_tokens < 60


def test_of_each_turn_is_learnt_once(opener: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvchat.balance.MANY_TOKENS", 8)
    worker, learnt = opener(), list[int]()
    monkeypatch.setattr(worker.balance.bandwidths, "add_prefill", lambda tokens, seconds: learnt.append(tokens))
    one = worker.open("one")
    one.ask("Hello, how are you today?")
    one.append([{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}])
    one.settle()
    assert len(learnt) == 1


def test_host_memory_lets_go_what_a_deleted_session_had(opener: Open) -> None:
    worker = opener(model__memory_budget=120_000)
    opened = sessions(worker, 3)
    for one in opened:
        one.ask("Go on.")
    opened[0].close()
    host = worker.balance.host
    before = set(worker.jobs.call(lambda: host and host.chunks()) or ())
    worker.delete("s0")
    assert before - worker.jobs.call(lambda: worker._store.stored_chunks(before)).keys()
    for one in opened[1:]:
        one.ask("And then?")
    there = worker.jobs.call(lambda: host and host.chunks()) or {}
    assert there and worker.jobs.call(lambda: worker._store.stored_chunks([*there])).keys() == there.keys()


def test_what_two_sessions_share_counts_once_on_disk(opener: Open) -> None:
    worker = opener()
    [one] = sessions(worker, 1)
    one.settle()
    one.fork("two")
    used = worker.jobs.call(lambda: worker._store.room().in_use)
    for limit, least in ((1.1, 0), (0.8, 1)):
        config = worker.config.replaced({"store.disk_budget": int(limit * used)})
        told = worker.jobs.call(partial(would_decide, worker._store, config))
        assert min(1, len(told)) == least and len(told) == len({*map(str, told)})
