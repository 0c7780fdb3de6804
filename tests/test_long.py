"""Messages that take most of the window, first or later: the conversation goes on, and parts of them come back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule

from kvchat.branching import fork
from kvchat.episodes.passages import passages, told_apart
from kvchat.events import Notice, TurnDone
from kvchat.residence.catalogue import Entry
from kvchat.residence.room import Room, fitting, without
from kvchat.session import Conversation
from kvchat.store.store import Store
from tests.test_rebase import (
    WINDOW,
    Interleaved,
    ask,
    assert_as_reference,
    concern,
    conversation,
    logits,
    new_engine,
    places,
    say,
    settled,
)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with closing(Store(tmp_path / "long.db")) as store:
        yield store


def document(length: int, word: str = "heron", at: float = 0.5) -> str:
    """A text of about so many tokens, a letter each, with a word in it."""
    before = int((length - len(word) - 2) * at)
    return f"{'a' * before} {word} {'b' * (length - before - len(word) - 2)}"


def longest(one: Conversation, answer: int = 8) -> int:
    """Letters of the longest message that may come now and leave room for an answer."""
    template = one.engine.model.template
    around = len(template.user("", first=not one.path).ids) + len(template.generation_prompt)
    return one.residence.longest(one.num_tokens, one.path) - around - 2 * len(template.assistant_close) - answer


def told(events: list[Any]) -> list[str]:
    return [event.text for event in events if isinstance(event, Notice)]


def assert_resumed_alike(store: Store, one: Conversation, name: str = "far") -> None:
    """A conversation that is resumed holds what this one holds, bit for bit, and computes nothing."""
    with conversation(store, one.engine, one.residence.config, name) as again:
        for _ in again.restore():
            pass
        assert not again.residence.num_computed and places(again) == places(one)
        held = [(each.id, each.chunks, each.part) for each in again.residence.tiers.residents]
        assert held == [(each.id, each.chunks, each.part) for each in one.residence.tiers.residents]
        assert torch.equal(logits(again), logits(one))


@pytest.mark.parametrize("share", [0.45, 0.7, 0.85, 0.93])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_conversation_that_begins_with_a_document_goes_on(store: Store, share: float, family: str) -> None:
    with conversation(store, new_engine(family), settled(**{"codec.name": "raw"})) as one:
        one.begin("Be brief.")
        ask(one, document(int(share * WINDOW) - 30))
        prompt = set(range(one.residence.bounds(one.path)[1]))
        notices = list[str]()
        for number in range(12):
            notices += told(say(one, number, 40))
            assert one.residence.cache.position <= WINDOW and prompt <= places(one)
            assert_as_reference(one)
            if number % 4 == 1:
                assert_resumed_alike(store, one)
        first = one.residence.known[0]
        assert 0 < len([place for place in places(one) if place < first.end]) < first.length
        assert [text for text in notices if "of turn 1 on, which is long, " in text and f" of {first.length} " in text]
        assert all("\n" not in text for text in notices)


@pytest.mark.parametrize("budget", ["", "400 rows"])
def test_a_message_as_long_as_may_be_finds_room_whatever_was_said(store: Store, budget: str) -> None:
    with conversation(store, new_engine(), settled(**{"compress.kv_budget": budget})) as one:
        one.begin("Be brief.")
        for number in range(4):
            done = ask(one, document(longest(one)))
            assert done.usage.completion_tokens == 8 and done.finish_reason == "length"
            assert one.residence.cache.position <= WINDOW
            assert_as_reference(one)
            assert_resumed_alike(store, one)
            for turn in range(3 * number):
                say(one, turn)
        assert budget or longest(one) > 0.8 * WINDOW


def test_turns_that_wait_are_sealed_where_they_would_take_the_room_of_a_long_message(store: Store) -> None:
    with conversation(store, new_engine(), settled(**{"compress.segment_min": 200})) as one:
        one.begin("Be brief.")
        for number in range(3):
            say(one, number, 20)
        assert one.residence.cache.tail_length > 100 and not one.residence.known
        assert ask(one, document(longest(one))).usage.completion_tokens == 8
        assert [entry.length < 200 for entry in one.residence.known] == [True, False]
        assert_as_reference(one)
        assert_resumed_alike(store, one)


def test_of_the_newest_segment_the_end_stands_where_not_all_of_it_does(store: Store) -> None:
    with conversation(store, new_engine(), settled()) as one:
        one.begin("Be brief.")
        for number in range(6):
            say(one, number)
        ask(one, document(int(0.75 * WINDOW)))
        newest = one.residence.known[-1]
        say(one, 7, 60)
        (part,) = [each.part.spans for each in one.residence.tiers.residents if each.start == newest.start]
        assert len(part) == 1 and part[0][0] > newest.start and part[0][1] == newest.end
        step = WINDOW // 16
        assert (newest.end - part[0][0]) % step == 0
        assert_as_reference(one)
        assert_resumed_alike(store, one)


@pytest.mark.parametrize("length", [0.3, 0.6, 0.9])
def test_of_a_system_prompt_that_leaves_no_room_the_beginning_stays(store: Store, length: float) -> None:
    with conversation(store, new_engine(), settled()) as one:
        one.begin("c" * int(length * WINDOW))
        for number in range(10):
            say(one, number, 40)
            assert one.residence.cache.position <= WINDOW
            assert_as_reference(one)
        there = {place for place in places(one) if place < one.residence.bounds(one.path)[1]}
        assert set(range(min(one.residence.bounds(one.path)[1], WINDOW // 2))) <= there
        assert_resumed_alike(store, one)


@pytest.mark.parametrize("first", [True, False])
def test_the_passage_of_a_document_that_a_question_concerns_comes_back_and_leaves(store: Store, first: bool) -> None:
    with conversation(store, new_engine(), settled(**{"codec.name": "raw"})) as one:
        one.begin("Be brief.")
        for number in range(0 if first else 5):
            say(one, number)
        ask(one, document(int(0.8 * WINDOW), at=0.6))
        for number in range(8):
            say(one, number + 5)
        residence, before, stood = one.residence, logits(one), places(one)
        concern(one, "What of the heron?")
        (back,) = residence.recalled.values()
        ids = residence.ids(one.path)
        (low, high), *more = back.spans
        assert not more and "heron" in one.engine.model.template.text(ids[low:high])
        assert high - low <= WINDOW // 8 and not stood & set(range(low, high))
        prompt = set(range(residence.bounds(one.path)[1]))
        assert prompt | set(range(low, high)) <= places(one) and prompt <= stood
        assert_as_reference(one)
        residence.recalled = {}
        residence.hold(one.path)
        assert torch.equal(logits(one), before) and places(one) == stood
        done = ask(one, "What of the heron?")
        assert done.usage.recalled == (back.entry.start,)
        assert_resumed_alike(store, one)
        assert any("heron" in hit.snippet for hit in store.search("heron"))


def test_what_nobody_asks_about_does_not_come_back(store: Store) -> None:
    with conversation(store, new_engine(), settled()) as one:
        one.begin("Be brief.")
        ask(one, document(int(0.8 * WINDOW)))
        say(one, 1)
        concern(one, "zzz qqq")
        assert not one.residence.recalled


def test_a_fork_and_a_rewound_conversation_hold_what_a_resumed_one_does(store: Store) -> None:
    with conversation(store, new_engine(), settled()) as one:
        one.begin("Be brief.")
        ask(one, document(int(0.8 * WINDOW)))
        for number in range(4):
            say(one, number, 30)
        ask(one, document(int(0.7 * WINDOW)))
        for number in range(3):
            say(one, number, 30)
        fork(one, "other", None)
        assert_resumed_alike(store, one, "other")
        for turns in (2, 2, 1, 2, 1):
            one.rewind(one.user_index(turns))
            for _ in one.restore():
                pass
            assert_as_reference(one)
            assert_resumed_alike(store, one)
            say(one, 9, 20)
            assert_as_reference(one)
        fork(one, "early", 1)
        with conversation(store, one.engine, one.residence.config, "early") as early:
            for _ in early.restore():
                pass
            assert_as_reference(early)
            say(early, 1)
            assert_resumed_alike(store, early, "early")


def test_all_that_was_lost_is_computed_again_message_by_message(store: Store) -> None:
    with conversation(store, new_engine(), settled()) as one:
        one.begin("Be brief.")
        for number in range(4):
            say(one, number)
            ask(one, document(longest(one) - 20))
        messages = [message.id for message in one.path]
        fingerprint = one.residence.fingerprint
    while cover := store.cover(messages, fingerprint):
        for record, _ in cover:
            store.drop_segment(record.id)
    with conversation(store, new_engine(), settled()) as again:
        assert ask(again, "And now?").usage.completion_tokens
        assert again.residence.cache.num_seen == again.num_tokens
        assert_as_reference(again)


def test_a_document_that_is_damaged_later_costs_itself_alone(store: Store) -> None:
    with conversation(store, new_engine(), settled()) as one:
        one.begin("Be brief.")
        for number in range(3):
            say(one, number)
        ask(one, document(int(0.7 * WINDOW)))
        entry = one.residence.known[-1]
        assert one.residence.tiers.residents[-1].id == entry.id
        store._db.execute("UPDATE frames SET body = zeroblob(length(body)) WHERE segment_id = ?", [entry.id])
        store._db.conn.commit()
        for number in range(4):
            say(one, number, 40)
            assert_as_reference(one)
        assert [known.start for known in one.residence.known if known.lost] == [entry.start]


def test_an_answer_is_written_once_more_behind_a_passage(store: Store) -> None:
    with conversation(store, new_engine(), settled()) as one:
        one.begin("Be brief.")
        ask(one, document(int(0.8 * WINDOW), at=0.4))
        for number in range(4):
            say(one, number)
        done = ask(one, "What of the heron?")
        one.rewind(one.user_index(1) + 1)
        events = [*one.answer(one.residence.config.generate, lambda: False, 0.0)]
        more = next(event for event in events if isinstance(event, TurnDone))
        assert more.usage.recalled == done.usage.recalled == (0,) and more.text == done.text


class Long(Interleaved):
    """The same, with messages as long as may be."""

    @rule(share=st.floats(0.2, 1), fact=st.integers(1, 5))
    def paste(self, share: float, fact: int) -> None:
        self.turns += 1
        ask(self.one, document(int(share * longest(self.one)), f"word{fact}"))

    @precondition(lambda self: self.turns)
    @rule()
    def resume(self) -> None:
        assert_resumed_alike(self.store, self.one, self.one.info.name)


Long.TestCase.settings = settings(
    max_examples=8, stateful_step_count=12, deadline=None, suppress_health_check=list(HealthCheck)
)
TestLong = Long.TestCase


def entry(start: int, end: int) -> Entry:
    return replace(Entry.missing(start, end), id=str(start), lost=False)


def test_what_stands_never_takes_more_than_its_room() -> None:
    generator = torch.Generator().manual_seed(0)

    def some(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    for _ in range(300):
        ends = torch.tensor([some(1, 200) for _ in range(some(1, 12))]).cumsum(0).tolist()
        entries = [entry(low, high) for low, high in zip([0, *ends], ends, strict=False)]
        room = Room(some(20, 400), some(1, 20), some(1, 40))
        stored = [some(0, 3) for _ in entries]
        used = {each.start: some(0, 9) for each in entries if some(0, 2)}
        found = fitting(entries, stored, room, ends[-1] - some(0, 200), used)
        taken = {at: spans or ((entries[at].start, entries[at].end),) for at, spans in found.items()}
        assert sum(high - low for spans in taken.values() for low, high in spans) <= room.span
        assert all(stored[at] for at in taken)
        assert all(entries[at].start <= low < high <= entries[at].end for at, s in taken.items() for low, high in s)
        if stored[0]:
            assert taken[0][0][0] == 0 and taken[0][0][1] >= min(room.prefix, entries[0].end)


def test_places_are_taken_out_of_spans() -> None:
    assert without([(0, 10), (20, 30)], [(5, 22), (25, 26)]) == ((0, 5), (22, 25), (26, 30))
    assert without([(0, 10)], [(0, 10)]) == () and without([(0, 10)], []) == ((0, 10),)


def test_passages_cover_all_and_rare_words_tell_them_apart() -> None:
    for low, high, length in ((0, 100, 16), (7, 9, 16), (3, 40, 16), (0, 24, 16)):
        found = passages(low, high, length)
        assert {place for a, b in found for place in range(a, b)} == set(range(low, high))
        assert all(b - a <= length for a, b in found)
    texts = ["the sea", "the heron", "the sea, the sea", "the boat", "the heron and the boat"]
    scores = told_apart("Where is the heron with the boat?", texts)
    assert scores.index(max(scores)) == 4 and scores[0] == 0 == told_apart("The?", texts)[0]
