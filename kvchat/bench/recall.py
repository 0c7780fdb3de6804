"""Time that it takes to bring back what a question concerns, against reading the question."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from kvchat.bench.history import WORDS, Spread, Subject, drain, ratio, spread, timed
from kvchat.episodes.selectors import Candidate
from kvchat.residence.host import HostedStore
from kvchat.residence.residence import Residence
from kvchat.store.store import Message

SEGMENTS = 8
QUESTION_WORDS = 24
KEEP = 0.3


class FirstTurns:
    """A selector that finds the first turn of each of the oldest segments."""

    def __init__(self, segments: Sequence[int]) -> None:
        self._starts = {*segments}

    def scores(self, question: Message, path: Sequence[Message], candidates: Sequence[Candidate]) -> list[float]:
        """1 for these, and 0 for all others."""
        return [float(one.start in self._starts) for one in candidates]


def recall(subject: Subject) -> dict[str, Any]:
    """Seconds until turns of 8 segments, held to 0.3, are back, and to the question's first token.

    They come from host memory, where a program that has read them before keeps their frames, and from the store, whose
    pages are in the system's cache. The first token is that behind what came and without it; when turns leave again,
    which is after the answer, is told too.
    """
    conversation, store = subject.conversation, subject.conversation.store
    assert isinstance(store, HostedStore)
    text = " ".join(random.Random(0).choices(WORDS, k=QUESTION_WORDS))
    piece = subject.engine.model.template.user(text, first=False)
    path = [*conversation.path, Message.new(conversation.path[-1].id, "user", text, piece.ids, piece.content_span)]
    cap, prompt = subject.config.store.host_cache, conversation.question(text)
    with subject.keeping(KEEP), _finding_first_turns(conversation.residence):
        from_store, came = _rounds(subject, path, prompt)
        store.serve_from(subject.pool, cap, lambda *_: 1.0)
        spreads, _ = _rounds(subject, path, prompt)
        store.serve_from(subject.pool, 0, lambda *_: 1.0)
    return {
        "history_tokens": conversation.num_tokens,
        "segments": len(came),
        "tokens_back": sum(came),
        "question_tokens": len(prompt),
        "question_s": spreads["alone"],
        "recall_s": spreads["recall"],
        "question_behind_s": spreads["behind"],
        "leave_s": spreads["leave"],
        "recall_over_question": ratio(spreads["recall"], spreads["alone"]),
        "recall_from_store_s": from_store["recall"],
        "recall_from_store_over_question": ratio(from_store["recall"], from_store["alone"]),
    }


@contextmanager
def _finding_first_turns(residence: Residence) -> Iterator[None]:
    """Inside, every question concerns the first turns of the oldest segments."""
    selector, residence.config = residence.selector, residence.config.replaced({"recall.turns": SEGMENTS})
    # Never all segments: where nothing tells one from another nothing comes.
    residence.selector = FirstTurns([entry.start for entry in residence.known[:-1][:SEGMENTS]])
    try:
        yield
    finally:
        residence.selector = selector


def _rounds(
    subject: Subject, path: Sequence[Message], prompt: Sequence[int]
) -> tuple[dict[str, Spread | None], list[int]]:
    """Times, after a warm-up, and the tokens that came of each segment."""
    residence, engine = subject.conversation.residence, subject.engine
    times: dict[str, list[float | None]] = {"alone": [], "recall": [], "behind": [], "leave": []}
    for number in range(subject.rounds + 1):
        times["alone"].append(timed(lambda: engine.greedy(residence.cache, prompt, 1), engine.model.device))
        times["recall"].append(timed(lambda: drain(residence.recall(path)), engine.model.device))
        came = [one.length for one in residence.recalled.values()]
        times["behind"].append(timed(lambda: engine.greedy(residence.cache, prompt, 1), engine.model.device))
        residence.recalled, residence.expected = {}, 0
        times["leave"].append(timed(lambda: residence.hold(subject.conversation.path), engine.model.device))
        times = times if number else {name: [] for name in times}
    return {name: spread(values) for name, values in times.items()}, came
