"""Branches, answers that go on, and answers that a crash cut off, on a tiny random model."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from kvchat.anatomy import Anatomy
from kvchat.asynchronous import AsyncSession
from kvchat.branching import first_line
from kvchat.config import Config
from kvchat.errors import CapacityError, InputError, OutOfMemory, StoreError
from kvchat.events import Delta, Event, Notice, TurnDone
from kvchat.handle import Session
from kvchat.store.store import Message, Store
from kvchat.unfinished import AFTER_S, Unfinished
from kvchat.worker import Worker
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

    def start(store: str = "s.db", window: int = 4096, **settings: Any) -> Worker:
        model = replace(make_model(), context_window=window)
        given = {
            "store.path": str(tmp_path / store),
            **SETTINGS,
            **{k.replace("__", "."): v for k, v in settings.items()},
        }
        workers.append(Worker(Config.load(overrides=given), None, lambda *_: model))
        return workers[-1]

    yield start
    for worker in workers:
        worker.close()


def probe(session: Session) -> list[tuple[str, float]]:
    """Exact log-probabilities: equal only if every bit of the state is."""
    return session.logprobs("And the second night?", "It was quiet.")


def said(session: Session) -> list[str]:
    return [message.content for message in session.messages() if message.role != "system"]


def unfinished(session: Session) -> tuple[str, list[int]] | None:
    conversation = session._conversation
    return session._worker.jobs.call(lambda: conversation.store.unfinished(conversation.info.id))


def done(events: Iterator[Event]) -> TurnDone:
    *_, last = events
    assert isinstance(last, TurnDone)
    return last


# -- branches ------------------------------------------------------------------------------------------------------


def test_an_edited_old_turn_keeps_the_later_ones_as_a_branch_to_return_to(opener: Open) -> None:
    session = opener().open("trip")
    for question in QUESTIONS:
        session.ask(question)
    old, before = said(session), probe(session)
    end = session.messages()[-1].id
    reply = done(session.edit(2, "What was the name of the street?"))
    assert said(session) == [*old[:2], "What was the name of the street?", reply.text]
    session.ask("And then?")
    session.switch(end)
    assert said(session) == old
    assert probe(session) == before


def test_editing_refuses_what_cannot_be_and_leaves_all_as_it_was(opener: Open) -> None:
    session = opener().open("trip")
    session.ask(QUESTIONS[0])
    before = session.messages()
    for turn, text, error in [(2, "x", InputError), (0, "x", InputError), (1, " ", InputError)]:
        with pytest.raises(error):
            done(session.edit(turn, text))
    with pytest.raises(CapacityError):
        done(session.edit(1, "x" * 5000))
    assert session.messages() == before and len(session.tree()) == 2


def test_at_no_moment_an_edited_session_has_neither_its_old_path_nor_the_new_one(
    opener: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = opener().open("trip")
    session.ask(QUESTIONS[0])
    store, paths = session._conversation.store, list[list[str]]()
    write = store._write

    @contextmanager
    def watched(*how: Any) -> Iterator[None]:
        with write(*how):
            yield
        paths.append([one.content for one in store.path(store.session("trip").tip) if one.role == "user"])

    monkeypatch.setattr(store, "_write", watched)
    done(session.edit(1, "Where did we eat?"))
    session.settle()
    assert paths[0] == [QUESTIONS[0]] and paths[-1] == ["Where did we eat?"]
    assert all(path in (paths[0], paths[-1]) for path in paths)


def test_switching_brings_sealed_kv_back_without_prefill(opener: Open) -> None:
    session = opener(compress__segment_min=1).open("trip")
    for question in QUESTIONS[:2]:
        session.ask(question)
    end, total = session.messages()[-1].id, session.stats()["num_tokens"]
    done(session.edit(1, "Where did we stay in Naples?"))
    session.settle()
    session.switch(end)
    reply = session.ask(QUESTIONS[2])
    assert reply.usage.cached_tokens == total
    assert reply.usage.prefilled_tokens == reply.usage.prompt_tokens - total


def test_switching_goes_to_the_newest_end_below_a_message(opener: Open) -> None:
    worker = opener()
    session = worker.open("trip")
    session.ask(QUESTIONS[0])
    session.ask(QUESTIONS[1])
    asked = session.messages()[-2].id
    first = session.messages()[-1].id
    newest = session.regenerate(temperature=1.5, seed=3).text
    session.switch(first)
    assert session.messages()[-1].id == first
    session.switch(asked)
    assert session.messages()[-1].content == newest
    session.switch(asked)  # it is there already
    assert session.messages()[-1].content == newest
    with pytest.raises(InputError, match="no message"):
        session.switch("b2:0")
    session.close()
    assert opener().open("trip").messages()[-1].content == newest


def test_the_tree_has_every_branch_with_turns_and_parents(opener: Open) -> None:
    session = opener().open("trip")
    session.ask(QUESTIONS[0])
    session.ask("Two lines:\nwhat did it cost?")
    done(session.edit(2, "  \n  " + "long " * 40))
    nodes = session.tree()
    assert sorted((node.turn, node.on_path, node.role) for node in nodes) == [
        *((1, True, "assistant"), (1, True, "user"), (2, False, "assistant"), (2, False, "user")),
        *((2, True, "assistant"), (2, True, "user")),
    ]
    by_id = {node.id: node for node in nodes}
    assert nodes[0].parent is None
    for place, node in enumerate(nodes[1:], 1):
        assert node.parent is not None and nodes.index(by_id[node.parent]) < place
    two, long = (node for node in nodes if node.role == "user" and node.turn == 2)
    two, long = (two, long) if two.text.startswith("Two") else (long, two)
    assert two.text == "Two lines:" and len(long.text) <= 80 and long.text.startswith("long long")


def test_a_first_line_is_one_line_without_what_stands_around_it() -> None:
    assert first_line("\n \n a b \nc") == "a b"
    assert first_line("") == ""
    assert first_line("x" * 81) == "x" * 79 + "…"


# -- answers that go on --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("segment_min", "keep", "codec"), [(4000, 0.3, "k8v8"), (1, 0.3, "k8v8"), (90, 1.0, "raw")], ids=str
)
def test_an_answer_that_goes_on_says_what_it_would_have_said(
    opener: Open, segment_min: int, keep: float, codec: str
) -> None:
    how: dict[str, Any] = {"compress__segment_min": segment_min, "compress__keep_ratio": keep, "codec__name": codec}
    how["compress__recent_tokens"] = 0
    whole = opener("whole.db", **how).open("trip")
    session = opener(**how).open("trip")
    for one in (whole, session):
        one.ask(QUESTIONS[0])
    expected = whole.ask(QUESTIONS[1], max_new_tokens=30)
    short = session.ask(QUESTIONS[1], max_new_tokens=11)
    assert short.finish_reason == "length"
    events = list(session.go_on(max_new_tokens=19))
    reply = events[-1]
    assert isinstance(reply, TurnDone) and reply.text == expected.text
    deltas = "".join(event.text for event in events if isinstance(event, Delta))
    assert (short.text.rstrip("\ufffd") + deltas) in (reply.text, expected.text)  # the cut may be inside a character
    assert reply.usage.completion_tokens == expected.usage.completion_tokens - 11
    assert [one.token_ids for one in session.messages()] == [one.token_ids for one in whole.messages()]
    if segment_min > 1000:  # not a token but the last is read once more
        assert reply.usage.prefilled_tokens == 1
        assert probe(session) == probe(whole)
    assert any(node.text == first_line(short.text) and not node.on_path for node in session.tree())


def test_an_answer_goes_on_as_often_as_it_is_cut_and_after_opening_again(opener: Open) -> None:
    expected = opener("whole.db").open("trip").ask(QUESTIONS[0], max_new_tokens=12).text
    worker = opener()
    session = worker.open("trip")
    session.ask(QUESTIONS[0], max_new_tokens=4)
    done(session.go_on(max_new_tokens=4))
    worker.close()
    again = opener().open("trip")
    assert done(again.go_on(max_new_tokens=4)).text == expected
    again.ask(QUESTIONS[1])
    assert len(said(again)) == 4


def test_only_an_answer_that_was_cut_off_can_go_on(opener: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    session = opener().open("trip")
    with pytest.raises(InputError, match="no answer"):
        done(session.go_on())
    session.ask(QUESTIONS[0])
    engine = session._conversation.engine
    monkeypatch.setattr(engine, "decode", lambda *_: (end for end in engine.model.stop_ids))
    assert done(session.go_on()).finish_reason == "stop"
    with pytest.raises(InputError, match="ended its answer itself"):
        done(session.go_on())
    assert len(said(session)) == 2


def test_an_answer_that_cannot_go_on_is_as_it_was(opener: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    session = opener().open("trip")
    session.ask(QUESTIONS[0])
    before, state = session.messages(), probe(session)
    engine = session._conversation.engine

    def fails(*_: Any) -> Iterator[int]:
        yield 65
        raise OutOfMemory("there is no memory for that")

    with monkeypatch.context() as patched:
        patched.setattr(engine, "decode", fails)
        with pytest.raises(OutOfMemory):
            done(session.go_on())
    assert session.messages() == before
    assert probe(session) == state
    assert unfinished(session) is None


def test_an_answer_that_went_on_and_could_not_be_stored_is_a_branch(
    opener: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvchat.unfinished.AFTER_S", 0.0)
    session = opener().open("trip")
    cut = session.ask(QUESTIONS[0]).text
    before, state, store = session.messages(), probe(session), session._conversation.store
    add = store.add_messages

    def fails(*_: Any) -> None:
        monkeypatch.setattr(store, "add_messages", add)
        raise StoreError("busy")

    monkeypatch.setattr(store, "add_messages", fails)
    with pytest.raises(StoreError, match="busy"):
        done(session.go_on(max_new_tokens=5))
    assert session.messages() == before and probe(session) == state
    assert unfinished(session) is None
    longer = next(node for node in session.tree() if not node.on_path)
    session.switch(longer.id)
    assert session.messages()[-1].content.startswith(cut.rstrip("\ufffd"))
    assert len(session.messages()[-1].token_ids) == len(before[-1].token_ids) + 5


@pytest.mark.parametrize("again", [True, False])
def test_what_was_said_before_memory_ran_out_is_a_branch_of_what_comes_next(
    opener: Open, monkeypatch: pytest.MonkeyPatch, again: bool
) -> None:
    monkeypatch.setattr("kvchat.unfinished.AFTER_S", 0.0)
    session = opener().open("trip")
    engine = session._conversation.engine

    def fails(*_: Any) -> Iterator[int]:
        yield from engine.model.template.assistant("Partly").ids[11:-2]
        raise OutOfMemory("there is no memory for that")

    with monkeypatch.context() as patched:
        patched.setattr(engine, "decode", fails)
        with pytest.raises(OutOfMemory):
            session.ask(QUESTIONS[0])
    whole = session.regenerate() if again else session.ask(QUESTIONS[1])
    assert said(session) == [QUESTIONS[0], *([] if again else [QUESTIONS[1]]), whole.text]
    assert [node.text for node in session.tree() if not node.on_path] == ["Partly"]
    assert unfinished(session) is None


def test_stopping_before_a_new_word_leaves_the_answer_as_it_was(opener: Open) -> None:
    session = opener().open("trip")
    session.ask(QUESTIONS[0])
    before = session.messages()
    conversation = session._conversation
    settings = conversation.residence.config.sampling({})
    events = session._worker.jobs.call(lambda: list(conversation.go_on(settings, lambda: True, 0.0)))
    assert isinstance(events[-1], TurnDone) and events[-1].finish_reason == "interrupted"
    assert session.messages() == before


def test_a_stopped_answer_goes_on(opener: Open) -> None:
    expected = opener("whole.db").open("trip").ask(QUESTIONS[0], max_new_tokens=120)
    session = opener().open("trip")
    events = session.send(QUESTIONS[0], max_new_tokens=120)
    for event in events:
        if isinstance(event, Delta):
            session.stop()
    cut = session.messages()[-1]
    assert cut.finish_reason == "interrupted" and len(cut.content) < len(expected.text)
    assert expected.text.startswith(cut.content.rstrip("\ufffd"))
    rest = done(session.go_on(max_new_tokens=120 - cut.content_span[1] + cut.content_span[0]))
    assert rest.text == expected.text


def test_the_window_is_not_said_to_be_full_where_the_conversation_goes_on(opener: Open) -> None:
    session = opener(window=400, generate__max_new_tokens=4).open("trip")
    events = list(session.send("x" * 330))
    assert session._conversation.engine.anatomy.turns
    assert not any(isinstance(event, Notice) and "nearly full" in event.text for event in events)


def test_a_full_window_lets_no_answer_go_on(opener: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Anatomy, "turns", False)
    session = opener(window=400, generate__max_new_tokens=400).open("trip")
    assert session.ask("x" * 300).finish_reason == "context"
    before = session.messages()
    with pytest.raises(CapacityError, match="window is full"):
        done(session.go_on())
    assert session.messages() == before


def test_a_question_brings_back_the_same_when_its_answer_goes_on(opener: Open) -> None:
    how = {"recall__by": "text", "compress__recent_tokens": 60, "compress__keep_ratio": 0.2, "recall__turns": 1}
    answers = []
    for store, lengths in (("whole.db", (16,)), ("s.db", (6, 10))):
        session = opener(store, compress__segment_min=1, **how).open("trip")
        for word in ("apples", "bridges", "candles", "dolphins"):
            session.ask(f"Tell me something about {word}, please.")
        reply = session.ask("What about apples?", max_new_tokens=lengths[0])
        assert reply.usage.recalled
        for more in lengths[1:]:
            reply = done(session.go_on(max_new_tokens=more))
        answers.append((reply.text, reply.usage.recalled))
    assert answers[0] == answers[1]


# -- answers that a crash cut off ----------------------------------------------------------------------------------


def test_an_answer_in_the_making_is_kept_twice_a_second(tmp_path: Path) -> None:
    store = Store(tmp_path / "s.db")
    info = store.create_session("trip", "tiny", {})
    now = 0.0
    kept = Unfinished(store, info.id, lambda: now)
    store.add_messages(info.id, [Message.new(None, "user", "Hi", [1], (0, 1))], None)
    parent = store.session("trip").tip
    assert parent is not None
    kept.begin()
    kept.grow(parent, [7], [8])
    assert store.unfinished(info.id) is None
    now += AFTER_S
    kept.grow(parent, [7], [8, 9])
    kept.grow(parent, [7], [8, 9, 10])
    assert store.unfinished(info.id) == (parent, [7, 8, 9])
    assert AFTER_S < 0.5
    kept.forget()
    assert store.unfinished(info.id) is None
    now += AFTER_S
    kept.grow("b2:unknown", [], [1])  # costs nothing but that it is not kept
    assert store.unfinished(info.id) is None
    store.close()


def test_an_answer_in_the_making_waits_for_no_other_process(tmp_path: Path) -> None:
    with closing(Store(tmp_path / "s.db")) as store, closing(Store(tmp_path / "s.db")) as other:
        info, message = store.create_session("trip", "tiny", {}), Message.new(None, "user", "Hi", [1], (0, 1))
        store.add_messages(info.id, [message], None)
        said, times = list[str](), count()
        kept = Unfinished(store, info.id, lambda: float(next(times)))
        store._db.conn.set_trace_callback(said.append)
        with other._write():
            kept.grow(message.id, [], [7])
        assert said[0] == "PRAGMA busy_timeout = 50" and said[-1] == "PRAGMA busy_timeout = 10000"
        assert store.unfinished(info.id) is None
        kept.grow(message.id, [], [7, 8])
        assert store.unfinished(info.id) == (message.id, [7, 8])


def cut_off(worker: Worker, session: Session, parent: str, ids: list[int]) -> None:
    conversation = session._conversation
    worker.jobs.call(lambda: conversation.store.set_unfinished(conversation.info.id, parent, ids))


def test_a_crash_leaves_an_answer_that_was_stopped(opener: Open) -> None:
    worker = opener()
    session = worker.open("trip")
    session.ask(QUESTIONS[0])
    whole = session.ask(QUESTIONS[1]).text
    answer = session.messages()[-1]
    session.rewind()
    session._worker.jobs.call(lambda: session._conversation.take([{"role": "user", "content": QUESTIONS[1]}]))
    low, _ = answer.content_span
    cut_off(worker, session, str(answer.parent), list(answer.token_ids[low : low + 5]))
    worker.close()
    again = opener().open("trip")
    last = again.messages()[-1]
    closing = again._conversation.engine.model.template.assistant_close
    assert last.finish_reason == "interrupted"
    assert last.token_ids == (*answer.token_ids[: low + 5], *closing)
    assert unfinished(again) is None
    assert again.stats()["turns"][-1]["tokens"] > 0
    assert done(again.go_on(max_new_tokens=7)).text == whole
    assert again.regenerate().text == whole


@pytest.mark.parametrize("there", [True, False])
def test_what_was_cut_off_elsewhere_is_a_branch_unless_it_is_said(opener: Open, there: bool) -> None:
    worker = opener()
    session = worker.open("trip")
    session.ask(QUESTIONS[0])
    answer = session.messages()[-1]
    low, high = answer.content_span
    ids = list(answer.token_ids[low:high])
    session.ask(QUESTIONS[1])
    before = said(session)
    cut_off(worker, session, str(answer.parent), ids[:5] if there else [*ids, 66])
    worker.close()
    again = opener().open("trip")
    assert said(again) == before
    assert len(again.tree()) == (4 if there else 5)
    again._worker.close()
    assert len(opener().open("trip").tree()) == (4 if there else 5)


# -- while a turn is running ---------------------------------------------------------------------------------------


def test_drafts_and_counts_do_not_wait_for_the_answer(opener: Open) -> None:
    session = opener(generate__max_new_tokens=3000).open("trip")
    events = session.send(QUESTIONS[0])
    next(event for event in events if isinstance(event, Delta))
    session.set_draft("And then [bold]?")
    assert session.draft == "And then [bold]?"
    assert session.count("abc") == 3
    assert [info.name for info in session._worker.sessions()] == ["trip"] and session._worker.search("Rome")
    assert session.tree()[-1].role == "user"  # the answer is not there yet
    session.stop()
    assert done(events).finish_reason == "interrupted"
    with pytest.raises(InputError):
        session.count("\ud800")


def test_the_asynchronous_handle_has_them_too(opener: Open) -> None:
    async def play() -> None:
        session = AsyncSession(opener().open("trip"))
        await session.ask(QUESTIONS[0], max_new_tokens=4)
        assert done(iter([event async for event in session.go_on(max_new_tokens=4)])).finish_reason == "length"
        end = (await session.messages())[-1].id
        assert done(iter([event async for event in session.edit(1, "Who?")])).text
        nodes = await session.tree()
        assert len(nodes) == 5
        await session.switch(end)
        assert (await session.messages())[-1].id == end
        await session.set_draft("a draft")
        assert await session.draft == "a draft" and await session.count("ab") == 2
        assert (await session.inspect(1)).turn == 1
        await session.close()

    asyncio.run(play())
