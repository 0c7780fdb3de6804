"""What is told of the tokens of a turn, wherever they lie."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvchat.cache.segment import Ranking
from kvchat.config import Config
from kvchat.errors import InputError
from kvchat.handle import Session
from kvchat.inspecting import Inspection, _edges
from kvchat.residence.sealing import protected_tokens
from kvchat.worker import Worker
from tests.tiny import make_model

SETTINGS = {
    "generate.temperature": 0,
    "generate.max_new_tokens": 12,
    "compress.segment_min": 100,
    "compress.recent_tokens": 0,
    "compress.keep_ratio": 0.3,
    "model.prefill_chunk_size": 32,
}
QUESTIONS = ["Where did we stay in Rome?", "What did it cost in all?", "Was it far from the river?", "Who was it?"]
LAYERS, HEADS = 3, 2

Open = Callable[..., Worker]


@pytest.fixture
def opener(tmp_path: Path) -> Iterator[Open]:
    workers: list[Worker] = []

    def start(**settings: Any) -> Worker:
        given = {"store.path": str(tmp_path / "s.db"), **SETTINGS}
        given |= {key.replace("__", "."): value for key, value in settings.items()}
        workers.append(Worker(Config.load(overrides=given), None, lambda *_: make_model()))
        return workers[-1]

    yield start
    for worker in workers:
        worker.close()


def play(session: Session, questions: list[str] = QUESTIONS) -> Session:
    for question in questions:
        session.ask(question)
    session.settle()
    return session


def check(session: Session, turn: int) -> Inspection:
    """What holds wherever a turn lies."""
    found = session.inspect(turn)
    starts = [index for index, message in enumerate(session.messages()) if message.role == "user"]
    first = 0 if turn == 1 else starts[turn - 1]
    messages = session.messages()[first : starts[turn] if turn < len(starts) else None]
    assert len(found.tokens) == sum(len(message.token_ids) for message in messages)
    assert found.pairs == len(found.tokens) * LAYERS * HEADS
    assert sum(token.kept for token in found.tokens) * LAYERS * HEADS == pytest.approx(found.kept)
    assert np.shape(found.heat) == (LAYERS, HEADS)
    assert np.mean(found.heat) * found.pairs == pytest.approx(found.kept)
    place = 0
    for message in messages:
        low, high = message.content_span
        tokens = found.tokens[place : place + len(message.token_ids)]
        assert {token.role for token in tokens} == {message.role}
        assert "".join(token.text for token in tokens[low:high]) == message.content
        place += len(message.token_ids)
    assert found.tokens[place - 2].text == "<|im_end|>"
    return found


def test_turns_in_one_sealed_segment_have_each_their_own_tokens(opener: Open) -> None:
    session = play(opener().open("trip"))
    segment = session.stats()["segments"][0]
    assert segment["turns"] == [1, 2]
    both = [check(session, turn) for turn in (1, 2)]
    assert sum(one.pairs for one in both) == segment["rows_total"]
    assert sum(one.kept for one in both) == segment["rows"]
    assert sum(one.bytes_on_disk for one in both) == pytest.approx(segment["bytes_on_disk"], abs=2)
    assert sum(one.bytes_in_memory for one in both) == pytest.approx(segment["bytes_in_memory"], abs=2)
    assert {one.tier for one in both} == {"part"}
    assert {one.codec for one in both} == {segment["codec"]}
    assert both[0].scorer and both[0].scorer == both[1].scorer


def test_what_is_kept_ranks_higher_than_what_is_not(opener: Open) -> None:
    found = check(play(opener().open("trip")), 2)
    scores = [token.score for token in found.tokens]
    assert all(score is not None and 0 <= score <= 1 for score in scores) and len(set(scores)) > 3
    by_kept = sorted(found.tokens, key=lambda token: token.kept)
    least, most = by_kept[:8], by_kept[-8:]
    assert sum(token.score or 0 for token in least) < sum(token.score or 0 for token in most)
    assert sum(one.pairs for one in found.histogram) == found.pairs
    assert sum(one.pairs for one in found.histogram if one.kept) == found.kept
    assert min(one.low for one in found.histogram if one.kept) >= max(
        one.high for one in found.histogram if not one.kept
    )
    assert all(one.low <= one.high for one in found.histogram)


def test_the_tail_is_exact_and_waits_on_disk(opener: Open) -> None:
    session = play(opener().open("trip"), QUESTIONS[:1])
    found = check(session, 1)
    assert (found.tier, found.kept, found.histogram) == ("tail", found.pairs, ())
    assert found.bytes_on_disk == session.stats()["bytes_on_disk"] > 0
    assert found.bytes_in_memory == session.stats()["bytes_in_memory"]
    assert {token.score for token in found.tokens} == {None}


def test_protected_tokens_are_kept_whole(opener: Open) -> None:
    session = opener().open("trip", system="Be brief, and kind to everybody.")
    play(session)
    found = check(session, 1)
    flags = protected_tokens(session.messages(), session._conversation.residence.config.compress)
    assert [token.protected for token in found.tokens] == flags[: len(found.tokens)]
    assert found.protected == sum(flags) > 20
    assert all(token.kept == 1 for token in found.tokens if token.protected)
    assert found.tokens[0].role == "system" and check(session, 2).protected == 0


@pytest.mark.parametrize("damaged", [False, True])
def test_what_is_on_disk_alone_or_lost_is_told_so(opener: Open, damaged: bool) -> None:
    session = play(opener().open("trip"))
    conversation = session._conversation
    residence = conversation.residence

    def let_go() -> None:
        first = residence.tiers.residents[0]
        residence.tiers.forget(first.start)
        residence.store.segment(first.id)
        if damaged:
            residence.known = [replace(residence.known[0], lost=True), *residence.known[1:]]

    session._worker.jobs.call(let_go)
    found = check(session, 1)
    assert (found.kept, found.bytes_in_memory) == (0, 0)
    assert found.tier == ("text" if damaged else "disk")
    assert (found.bytes_on_disk == 0) == damaged
    assert (found.codec == "") == damaged
    assert all((token.score is None) == damaged for token in found.tokens)
    assert found.heat == ((0.0,) * HEADS,) * LAYERS


def test_a_turn_in_a_segment_and_the_tail_is_both(opener: Open) -> None:
    worker = opener()
    session = play(worker.open("trip"))
    session.rewind()  # into a segment
    assert check(session, 3).tier in ("part", "tail", "memory")
    conversation = session._conversation
    worker.jobs.call(lambda: conversation.take([{"role": "user", "content": "Not answered"}]))
    unread = check(session, 4)
    assert (unread.tier, unread.kept, unread.codec) == ("text", 0, "")


def test_there_is_nothing_to_tell_of_a_turn_that_is_not_there(opener: Open) -> None:
    session = opener().open("trip")
    for turn in (0, 1):
        with pytest.raises(InputError, match="no turn"):
            session.inspect(turn)


def test_a_resumed_session_tells_the_same(opener: Open) -> None:
    worker = opener()
    session = play(worker.open("trip"))
    live = [session.inspect(turn) for turn in range(1, 5)]
    worker.close()
    again = opener().open("trip")
    assert [again.inspect(turn) for turn in range(1, 5)] == live


def test_bounds_lie_between_the_middles_of_chunks() -> None:
    chunk_of = np.array([[[0, 0, 1, 2]]], np.uint8)
    edges = _edges(Ranking(0, chunk_of, (0.8, 0.4, 0.1)))
    assert edges == pytest.approx([1.0, 0.6, 0.25, 0.0])
    assert _edges(Ranking(0, chunk_of)) == pytest.approx([1.0, 0.5, 0.25, 0.0])
    assert _edges(Ranking(0, chunk_of[:, :, :2], (0.5,))) == [0.5, 0.5]
