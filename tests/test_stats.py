"""Figures of a conversation beyond its window: all its segments, where each lies and where it stands."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvchat.episodes.vectors import Vectors
from kvchat.session import Conversation
from kvchat.stats import describe_stored, rows_held, stored_episodes
from kvchat.store.store import Store
from tests.test_rebase import WINDOW, ask, conversation, new_engine, say, settled

LIMIT = {"compress.kv_budget": "300 rows", "recall.by": "text"}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with closing(Store(tmp_path / "far.db")) as store:
        yield store


@pytest.fixture
def far(store: Store) -> Iterator[Conversation]:
    """Some four windows long, under a limit of memory."""
    with conversation(store, new_engine(), settled(**LIMIT)) as one:
        one.begin("Be brief.")
        for number in range(40):
            say(one, number)
        yield one


def tiers(stats: dict[str, Any]) -> list[str]:
    return [segment["tier"] for segment in stats["segments"]]


def test_all_segments_are_listed_with_where_they_lie_and_stand(far: Conversation) -> None:
    stats, cache = far.stats(), far.residence.cache
    assert stats["rebased"] and stats["offset"] == cache.offset > 0 and stats["kv_budget"] == "300 rows"
    assert stats["position"] == cache.position == stats["num_seen"] - stats["offset"] < WINDOW < stats["num_tokens"]
    assert stats["segments"][0]["place"] == 0
    assert all(one["end"] == other["start"] == other["place"] for one, other in pairwise(stats["segments"]))
    assert {"disk", "part"} <= set(tiers(stats)) <= {"disk", "part", "memory"}
    for segment in stats["segments"]:
        there = segment["chunks_held"] > 0
        assert there == (segment["tier"] != "disk") == (segment["position"] is not None) == (segment["rows"] > 0)
        assert segment["rows_stored"] == segment["rows_total"] > 0
    stands = [(one["position"], one["end"] - one["start"]) for one in stats["segments"] if one["position"] is not None]
    assert all(at + length <= after for (at, length), (after, _) in pairwise(stands))
    assert sum(stands[-1]) <= stats["position"]


def test_rows_counted_at_once_are_those_counted_segment_by_segment(far: Conversation) -> None:
    residence = far.residence
    plain = {one.start: residence.tiers.rows(one) for one in residence.tiers.residents}
    assert rows_held(residence.cache) == plain
    for segment in far.stats()["segments"]:
        if segment["kind"] == "sealed":
            assert segment["rows"] == plain.get(segment["start"], 0)
            assert segment["bytes_in_memory"] == residence.cache.nbytes(segment["start"])


def test_what_the_newest_answer_brought_back_is_flagged(far: Conversation) -> None:
    done = ask(far, "What of word3?")
    stats = far.stats()
    assert done.usage.recalled
    assert tuple(one["start"] for one in stats["segments"] if one["recalled"]) == tuple(sorted(done.usage.recalled))
    say(far, 50)
    assert not any(one["recalled"] for one in far.stats()["segments"])


def test_a_lost_segment_is_text_only(store: Store, far: Conversation) -> None:
    lost = far.residence.known[6]
    store.drop_segment(lost.id)
    stored = describe_stored(store, store.session("far"))
    assert [one["start"] for one in stored["segments"] if one["tier"] == "text"] == [lost.start]
    with conversation(store, far.engine, settled(**LIMIT)) as again:
        stats = again.stats()
    (gone,) = [one for one in stats["segments"] if one["tier"] == "text"]
    assert (gone["start"], gone["end"], gone["kind"], gone["rows"]) == (lost.start, lost.end, "text", 0)
    assert gone["turns"][0] > 1 and gone["position"] is None and gone["bytes_on_disk"] == 0
    assert all(one["end"] == other["start"] for one, other in pairwise(stats["segments"]))


def test_turns_share_what_their_segments_hold(far: Conversation) -> None:
    stats = far.stats()
    assert len(stats["turns"]) == stats["num_turns"] == 40
    for key in ("rows", "bytes_on_disk"):
        whole = sum(segment[key] for segment in stats["segments"])
        assert abs(sum(turn[key] for turn in stats["turns"]) - whole) <= len(stats["turns"])


def test_a_conversation_that_has_just_begun_has_figures(store: Store) -> None:
    with conversation(store, new_engine(), settled()) as one:
        stats = one.stats()
        assert stats["segments"] == [] and not stats["rebased"] and stats["position"] == 0
    assert describe_stored(store, store.session("far"))["segments"] == []


class Counting:
    """An embedder of a text's letters that counts what it is asked."""

    name = "letters"

    def __init__(self) -> None:
        self.asked = 0

    def embed(self, texts: Any) -> Any:
        self.asked += len(texts)
        return np.array([[text.count(letter) + 0.1 for letter in "abcdefxyz"] for text in texts], np.float32)


def test_episodes_are_of_turns_that_have_vectors_and_none_is_computed(store: Store, far: Conversation) -> None:
    pytest.importorskip("sklearn")
    embedder = Counting()
    assert stored_episodes(store, far.path, embedder) == []
    Vectors(store, embedder).of(far.path[:41])
    asked = embedder.asked
    found = stored_episodes(store, far.path, embedder)
    assert embedder.asked == asked
    assert sorted(turn for episode in found for turn in episode["turns"]) == list(range(1, 21))
