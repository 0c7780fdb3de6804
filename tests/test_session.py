"""Sessions on a tiny random model, through the worker and the store, as front ends use them."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from kvchat.anatomy import Anatomy
from kvchat.asynchronous import AsyncSession
from kvchat.config import Config
from kvchat.errors import CapacityError, ConfigError, FingerprintMismatch, InputError, SessionNotFound, StoreError
from kvchat.events import Delta, Notice, Progress, TurnDone
from kvchat.handle import Session
from kvchat.residence.residence import Residence, Steps
from kvchat.store.store import Store
from kvchat.worker import Worker
from tests.store_parts import copy_of
from tests.tiny import make_model

SETTINGS = {
    "generate.temperature": 0,
    "generate.max_new_tokens": 12,
    "compress.segment_min": 60,
    "compress.recent_tokens": 20,
    "compress.keep_ratio": 0.3,
    "model.prefill_chunk_size": 32,
}

QUESTIONS = ["Where did we stay in Rome?", "What did it cost?", "Was it far from the river?", "Who was with us?"]

Open = Callable[..., Worker]


@pytest.fixture
def opener(tmp_path: Path) -> Iterator[Open]:
    """Makes workers on one store; each new one stands for a new process."""
    workers: list[Worker] = []

    def start(
        family: str = "llama", dtype: torch.dtype = torch.float32, listener: Any = None, **settings: Any
    ) -> Worker:
        given = {
            "store.path": str(tmp_path / "s.db"),
            **SETTINGS,
            **{k.replace("__", "."): v for k, v in settings.items()},
        }
        workers.append(Worker(Config.load(overrides=given), listener, lambda *_: make_model(family, dtype)))
        return workers[-1]

    yield start
    for worker in workers:
        worker.close()


def play(session: Session, questions: list[str] = QUESTIONS) -> list[str]:
    return [session.ask(question).text for question in questions]


def probe(session: Session) -> list[tuple[str, float]]:
    """Exact log-probabilities: equal only if every bit of the state is."""
    return session.logprobs("And the second night?", "It was quiet.")


@pytest.mark.parametrize("codec", ["raw", "k8v8"])
@pytest.mark.parametrize(
    ("family", "dtype"), [("llama", torch.float32), ("qwen2", torch.bfloat16), ("qwen3", torch.bfloat16)]
)
def test_a_resumed_session_goes_on_bit_for_bit_as_if_it_had_never_been_closed(
    opener: Open, tmp_path: Path, family: str, dtype: torch.dtype, codec: str
) -> None:
    how = {"family": family, "dtype": dtype, "codec__name": codec}
    worker = opener(**how)
    live = worker.open("trip")
    for number, question in enumerate(QUESTIONS):
        live.ask(question)
        live.settle()
        again = opener(**how, store__path=str(copy_of(tmp_path / "s.db", number)))
        resumed = again.open("trip")
        assert probe(resumed) == probe(live), f"after turn {number + 1}"
        again.close()
    kinds = [segment["kind"] for segment in live.stats()["segments"]]
    assert "sealed" in kinds
    live.close()
    worker.close()


def test_nothing_is_computed_again_after_resuming(opener: Open) -> None:
    first = opener()
    with first.open("trip") as session:
        play(session)
        total = session.stats()["num_tokens"]
    first.close()
    reply = opener().open("trip").ask("And then?")
    assert reply.usage.cached_tokens == total
    # One token a byte, and one for each <|im_start|> and <|im_end|>.
    assert reply.usage.prefilled_tokens == 1 + len("user\nAnd then?") + 1 + len("\n") + 1 + len("assistant\n")
    assert reply.usage.prompt_tokens == reply.usage.cached_tokens + reply.usage.prefilled_tokens


def test_a_turn_emits_progress_and_text_and_ends_with_the_same_text(opener: Open) -> None:
    events = list(opener().open("trip").send(QUESTIONS[0]))
    assert isinstance(events[-1], TurnDone)
    assert any(isinstance(event, Progress) and event.phase == "prefill" for event in events)
    assert "".join(event.text for event in events if isinstance(event, Delta)) == events[-1].text
    assert len(events[-1].timings.itl_s) == events[-1].usage.completion_tokens - 1


def test_a_fork_and_its_parent_never_see_each_others_later_turns(opener: Open) -> None:
    worker = opener()
    parent = worker.open("trip")
    play(parent)
    before = probe(parent)
    fork = parent.fork("other", at=2)
    assert [message.content for message in fork.messages() if message.role == "user"] == QUESTIONS[:2]
    fork.ask("Something else?")
    assert probe(parent) == before
    alone = opener(store__path=str(worker.config.store_path.with_name("alone.db"))).open("trip")
    play(alone, QUESTIONS[:2])
    alone.ask("Something else?")
    assert [m.content for m in alone.messages()] == [m.content for m in fork.messages()]


def test_rewinding_takes_turns_back_and_leaves_the_session_as_it_was_before_them(opener: Open) -> None:
    # Each turn is a segment of its own, so that what is left is as it was, to the bit.
    session = opener(compress__segment_min=1).open("trip")
    play(session, QUESTIONS[:1])
    before = probe(session)
    play(session, QUESTIONS[1:2])
    assert session.rewind() == QUESTIONS[1]
    assert probe(session) == before


def test_rewinding_into_a_sealed_segment_equals_resuming_there(opener: Open) -> None:
    worker = opener(compress__segment_min=150)
    session = worker.open("trip")
    play(session)
    assert session.stats()["segments"][0]["turns"] == [1, 3]
    session.rewind(2)
    live = probe(session)
    worker.close()
    assert probe(opener(compress__segment_min=150).open("trip")) == live


def test_regenerating_keeps_the_former_answer_as_a_branch(opener: Open, tmp_path: Path) -> None:
    worker = opener()
    session = worker.open("trip")
    first = session.ask(QUESTIONS[0], temperature=1.0, seed=1)
    again = session.regenerate(temperature=1.0, seed=2)
    assert again.text != first.text
    assert session.regenerate(temperature=1.0, seed=1).text == first.text
    session.regenerate(temperature=1.0, seed=2)
    worker.close()
    store = Store(tmp_path / "s.db")
    tips = [store.path(tip)[-1].content for tip in store.branches(store.session("trip").id)]
    assert first.text in tips
    store.close()


def test_stop_ends_the_turn_and_keeps_what_was_said(opener: Open) -> None:
    session = opener(generate__max_new_tokens=200).open("trip")
    events = session.send(QUESTIONS[0])
    text = ""
    for event in events:
        if isinstance(event, Delta):
            text += event.text
            session.stop()
    assert isinstance(event, TurnDone)
    assert event.finish_reason == "interrupted"
    assert 0 < event.usage.completion_tokens < 200
    assert session.messages()[-1].content == event.text == text
    assert session.ask("Go on.").finish_reason in ("length", "stop")


def test_a_question_that_was_never_answered_can_be_answered_later(opener: Open, tmp_path: Path) -> None:
    worker = opener()
    play(worker.open("trip"), QUESTIONS[:2])
    worker.close()
    # What a process leaves that is killed while it prefills: the message without an answer.
    worker = opener()
    conversation_only = worker.open("trip")
    stopped = conversation_only.send("Who was with us?")
    conversation_only.stop()
    list(stopped)
    worker.close()
    store = Store(tmp_path / "s.db")
    path = store.path(store.session("trip").tip)
    if path[-1].role == "assistant":
        store.set_tip(store.session("trip").id, path[-2].id)
    store.close()
    session = opener().open("trip")
    assert session.messages()[-1].content == "Who was with us?"
    done = list(session.resend())[-1]
    assert isinstance(done, TurnDone)
    assert done.usage.completion_tokens > 0
    assert session.messages()[-1].role == "assistant"


def flip_a_bit(path: Path, table: str, column: str, where: str) -> None:
    with sqlite3.connect(path) as database:
        row, blob = database.execute(f"SELECT rowid, {column} FROM {table} WHERE {where} LIMIT 1").fetchone()
        damaged = bytearray(blob)
        damaged[len(damaged) // 2] ^= 4
        database.execute(f"UPDATE {table} SET {column} = ? WHERE rowid = ?", (bytes(damaged), row))
    database.close()


@pytest.mark.parametrize(
    ("table", "column", "where"),
    [
        (
            "frames",
            "body",
            "chunk = 0 AND segment_id = (SELECT id FROM segments WHERE kind = 'sealed' ORDER BY start_token LIMIT 1)",
        ),
        ("segments", "header", "kind = 'sealed' AND start_token > 0"),
        ("frames", "body", "segment_id IN (SELECT id FROM segments WHERE kind = 'open')"),
    ],
)
def test_a_flipped_bit_is_found_said_and_mended_from_the_ids(
    opener: Open, tmp_path: Path, table: str, column: str, where: str
) -> None:
    worker = opener()
    session = worker.open("trip")
    play(session, [*QUESTIONS, "So?"])
    said = [message.content for message in session.messages()]
    segments = session.stats()["segments"]
    assert {segment["kind"] for segment in segments} == {"sealed", "open"}
    worker.close()
    flip_a_bit(tmp_path / "s.db", table, column, where)
    store = Store(tmp_path / "s.db")
    assert len(store.verify("trip")) == 1
    store.close()
    told: list[Any] = []
    worker = opener(listener=told.append)
    session = worker.open("trip")
    reply = session.ask("And then?")
    assert any(isinstance(event, Notice) and "damaged" in event.text for event in told)
    assert reply.usage.prefilled_tokens > 1 + len("user\nAnd then?") + 1 + len("\n") + 1 + len("assistant\n")
    assert [message.content for message in session.messages()][: len(said)] == said
    session.settle()
    worker.close()
    store = Store(tmp_path / "s.db")
    assert store.verify("trip") == []
    store.close()


def test_a_session_of_another_model_is_refused_by_name_and_can_be_rebuilt(opener: Open) -> None:
    worker = opener()
    play(worker.open("trip"), QUESTIONS[:2])
    worker.close()
    other = opener("qwen3")
    with pytest.raises(FingerprintMismatch, match=r"differs in weights.*--rebuild"):
        other.open("trip")
    session = other.open("trip", rebuild=True)
    assert [m.content for m in session.messages() if m.role == "user"] == QUESTIONS[:2]
    assert session.ask("And then?").usage.prefilled_tokens > 100
    other.close()
    assert opener("qwen3").open("trip").ask("So?").usage.prefilled_tokens < 60


def test_an_appended_conversation_is_sealed_on_the_way_and_resumes(opener: Open) -> None:
    worker = opener()
    session = worker.open("trip", model=None)
    said = [{"role": "system", "content": "Be brief."}]
    said += [{"role": ("user", "assistant")[i % 2], "content": f"Line {i} of a long talk."} for i in range(20)]
    usage = session.append(said)
    assert [m.content for m in session.messages()] == [m["content"] for m in said]
    stats = session.stats()
    assert stats["num_seen"] == stats["num_tokens"] == usage.prompt_tokens
    ends = [(segment["start"], segment["end"]) for segment in stats["segments"]]
    assert ends[0][0] == 0
    assert ends[-1][1] == stats["num_seen"]
    assert all(a[1] == b[0] for a, b in pairwise(ends))
    before = probe(session)
    worker.close()
    assert probe(opener().open("trip")) == before


def test_what_does_not_fit_is_refused_before_anything_is_saved(opener: Open) -> None:
    session = opener().open("trip")
    play(session, QUESTIONS[:1])
    count = len(session.messages())
    for attempt in (lambda: session.ask("x" * 5000), lambda: session.append([{"role": "user", "content": "x" * 5000}])):
        with pytest.raises(CapacityError, match="window of 4096") as caught:
            attempt()
        assert "\n" not in str(caught.value)
    assert len(session.messages()) == count


def test_a_nearly_full_window_is_announced_and_ends_the_answer_without_cutting_anything(
    opener: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Anatomy, "turns", False)  # else the conversation goes on at smaller positions
    session = opener(generate__max_new_tokens=1000).open("trip")
    events = list(session.send("x" * 4000))
    assert any(isinstance(event, Notice) and "nearly full" in event.text for event in events)
    assert events[-1].finish_reason in ("context", "stop")
    assert session.stats()["num_seen"] <= session.context_window
    assert session.messages()[1 if len(session.messages()) == 3 else 0].content == "x" * 4000


@pytest.mark.parametrize(
    ("messages", "error"),
    [
        ([{"role": "user", "content": "  "}], "empty"),
        ([{"role": "tool", "content": "x"}], "known roles"),
        ([{"role": "user", "content": "x"}, {"role": "system", "content": "x"}], "only the first"),
    ],
)
def test_wrong_messages_are_named_and_nothing_is_saved(opener: Open, messages: list[Any], error: str) -> None:
    session = opener().open("trip")
    with pytest.raises(InputError, match=error):
        session.append(messages)
    assert [message for message in session.messages() if message.content] == []


def test_a_wrong_sampling_value_names_the_setting(opener: Open) -> None:
    session = opener().open("trip")
    with pytest.raises(ConfigError, match=r"generate\.top_p"):
        session.ask("x", top_p=2)
    with pytest.raises(ConfigError, match=r"known here: .*temperature"):
        session.ask("x", temp=2)


def test_an_unknown_session_is_not_created_when_it_must_exist(opener: Open) -> None:
    with pytest.raises(SessionNotFound):
        opener().open("trip", create=False)


def test_two_sessions_of_one_worker_do_not_mix(opener: Open) -> None:
    worker = opener()
    one, two = worker.open("one"), worker.open("two")
    for question in QUESTIONS[:2]:
        one.ask(question)
        two.ask(question[::-1])
    alone = worker.open("three")
    play(alone, QUESTIONS[:2])
    assert probe(alone) == probe(one)
    assert {info.name for info in worker.sessions()} == {"one", "two", "three"}


def test_a_failure_while_saving_is_raised_by_the_next_call_and_the_session_goes_on(
    opener: Open, tmp_path: Path
) -> None:
    worker = opener()
    session = worker.open("trip")
    session.ask(QUESTIONS[0])
    session.settle()
    with sqlite3.connect(tmp_path / "s.db") as database:
        database.execute("ALTER TABLE frames RENAME TO lost")
    reply = session.ask(QUESTIONS[1])
    assert reply.text
    with pytest.raises((StoreError, sqlite3.Error)):
        session.settle()
    with sqlite3.connect(tmp_path / "s.db") as database:
        database.execute("ALTER TABLE lost RENAME TO frames")
    database.close()
    assert session.ask(QUESTIONS[2]).text
    session.settle()
    before = probe(session)
    worker.close()
    assert probe(opener().open("trip")) == before


def test_memory_holds_what_the_ratio_allows_and_the_store_all(opener: Open) -> None:
    session = opener(compress__recent_tokens=0).open("trip")
    play(session, QUESTIONS * 2)
    for segment in session.stats()["segments"]:
        if segment["kind"] == "sealed":
            assert segment["rows"] < segment["rows_total"]
            assert segment["chunks_held"] < segment["num_chunks"]
    stats = session.stats()
    assert sum(turn["tokens"] for turn in stats["turns"]) == stats["num_tokens"]
    assert stats["bytes_in_memory"] < stats["bytes_dense"]


def test_the_newest_tokens_hold_all_their_pairs(opener: Open) -> None:
    session = opener(compress__recent_tokens=80).open("trip")
    play(session, QUESTIONS * 2)
    stats = session.stats()
    sealed = [segment for segment in stats["segments"] if segment["kind"] == "sealed"]
    whole = [segment["rows"] == segment["rows_total"] for segment in sealed]
    assert whole == [segment["end"] > stats["num_tokens"] - 80 for segment in sealed]
    assert any(whole) and not all(whole)


@pytest.mark.parametrize("recent", [0, 80])
def test_a_message_that_waits_does_not_make_the_ones_before_it_old(opener: Open, recent: int) -> None:
    worker = opener(compress__recent_tokens=recent)
    session = worker.open("trip")
    play(session, QUESTIONS * 2)
    before = chunks_held(session)
    session.append([{"role": "user", "content": "We left Rome by train. " * 20}])
    live = chunks_held(session)
    worker.close()
    again = opener(compress__recent_tokens=recent).open("trip")
    assert again.logprobs("Where to?", "Home.")
    assert chunks_held(again) == live
    if recent:
        assert live[: len(before)] == before
    else:
        assert all(held < of for held, of in live)


def chunks_held(session: Session) -> list[tuple[int, int]]:
    """Of each sealed segment, and of how many."""
    segments = session.stats()["segments"]
    return [(one["chunks_held"], one["num_chunks"]) for one in segments if one["kind"] == "sealed"]


def test_what_is_taken_in_at_once_is_computed_from_the_newest_tokens_whole(
    opener: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = list[float]()
    seal = Residence._seal

    def watch(residence: Residence, *args: Any) -> Steps:
        yield from seal(residence, *args)
        newest = residence.tiers.residents[-1]
        held.append(newest.chunks / newest.header.ranking.num_chunks)

    monkeypatch.setattr(Residence, "_seal", watch)
    session = opener(compress__recent_tokens=80).open("trip")
    said = [
        {"role": role, "content": f"{text} {n}"}
        for n, text in enumerate(QUESTIONS * 2)
        for role in ("user", "assistant")
    ]
    session.append(said)
    assert len(held) > 2 and set(held) == {1.0}
    assert chunks_held(session)[0][0] < chunks_held(session)[0][1]


async def test_the_asynchronous_session_mirrors_the_synchronous_one(opener: Open) -> None:
    async with AsyncSession(opener().open("trip")) as session:
        events = [event async for event in session.send(QUESTIONS[0])]
        assert isinstance(events[-1], TurnDone)
        assert (await session.ask(QUESTIONS[1])).text
        assert len([m for m in await session.messages() if m.role == "user"]) == 2
        assert (await session.stats())["num_turns"] == 2
    public = {name for name in vars(Session) if not name.startswith("_")} - {"name", "model", "context_window"}
    assert public <= {name for name in vars(AsyncSession) if not name.startswith("_")}


def test_a_closed_session_says_so(opener: Open) -> None:
    session = opener().open("trip")
    session.close()
    with pytest.raises(InputError, match="closed"):
        session.ask("x")


def test_a_turn_that_nobody_follows_to_its_end_is_stopped(opener: Open) -> None:
    session = opener(generate__max_new_tokens=2000).open("trip")
    for event in session.send(QUESTIONS[0]):
        if isinstance(event, Delta):
            break
    assert session.messages()[-1].finish_reason == "interrupted"


def test_a_stop_belongs_to_the_turn_that_was_running(opener: Open) -> None:
    session = opener(generate__max_new_tokens=30).open("trip")
    running = session.send(QUESTIONS[0])
    next(running)
    running = session.send(QUESTIONS[1])
    *_, done = running
    assert isinstance(done, TurnDone)
    assert done.finish_reason in ("length", "stop")


def test_a_listener_that_raises_does_not_stop_the_thread(opener: Open) -> None:
    def refuse(event: Any) -> None:
        raise RuntimeError("no")

    session = opener(listener=refuse).open("trip")
    with pytest.raises(RuntimeError, match="no"):
        for question in QUESTIONS * 2:
            session.ask(question)
            session.settle()
    assert session.ask("Still there?").text


def test_damage_in_chunks_that_were_not_held_is_found_when_they_are_wanted(opener: Open, tmp_path: Path) -> None:
    worker = opener(compress__segment_min=1, store__host_cache="0")  # host memory may have a sound frame
    session = worker.open("trip")
    play(session)
    session.settle()
    where = "chunk = 6 AND segment_id = (SELECT id FROM segments WHERE start_token > 0 ORDER BY start_token LIMIT 1)"
    flip_a_bit(tmp_path / "s.db", "frames", "body", where)
    session.rewind(2)
    events = list(session.send("And then?"))
    assert any(isinstance(event, Notice) and "damaged" in event.text for event in events)
    session.settle()
    stats = session.stats()
    assert stats["num_seen"] == stats["num_tokens"]
    worker.close()
    store = Store(tmp_path / "s.db")
    assert store.verify() == []
    store.close()


def test_a_rebuild_that_fails_changes_nothing(opener: Open) -> None:
    worker = opener()
    session = worker.open("trip")
    play(session, QUESTIONS[:2])
    said = [message.content for message in session.messages()]
    worker.close()
    narrow = Worker(
        worker.config,
        None,
        lambda *_: replace(make_model("qwen3"), context_window=30, fingerprint={"tokenizer": "another"}),
    )
    with pytest.raises(CapacityError):
        narrow.open("trip", rebuild=True)
    narrow.close()
    assert [message.content for message in opener().open("trip").messages()] == said
