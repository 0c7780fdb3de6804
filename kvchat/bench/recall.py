"""Time that it takes to bring back what a question concerns, against reading the question."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from kvchat.bench.history import WORDS, Subject, drain, ratio, spread, timed
from kvchat.episodes.selectors import Candidate
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
    """Seconds until turns of 8 segments, held to 0.3, are back from the store, and to the question's first token.

    The store's pages are in the system's cache. The first token is that behind what came and without it; when turns
    leave again, which is after the answer, is told too.
    """
    conversation, engine = subject.conversation, subject.engine
    residence, device = conversation.residence, engine.model.device
    text = " ".join(random.Random(0).choices(WORDS, k=QUESTION_WORDS))
    piece = engine.model.template.user(text, first=False)
    path = [*conversation.path, Message.new(conversation.path[-1].id, "user", text, piece.ids, piece.content_span)]
    times: dict[str, list[float | None]] = {"alone": [], "recall": [], "behind": [], "leave": []}
    prompt, before = conversation.question(text), residence.selector
    with subject.keeping(KEEP):
        residence.config = residence.config.replaced({"recall.turns": SEGMENTS})
        # Never all: where nothing tells one from another nothing comes.
        residence.selector = FirstTurns([entry.start for entry in residence.known[:-1][:SEGMENTS]])
        for number in range(subject.rounds + 1):
            times["alone"].append(timed(lambda: engine.greedy(residence.cache, prompt, 1), device))
            times["recall"].append(timed(lambda: drain(residence.recall(path)), device))
            came = [one.length for one in residence.recalled.values()]
            times["behind"].append(timed(lambda: engine.greedy(residence.cache, prompt, 1), device))
            residence.recalled, residence.expected = {}, 0
            times["leave"].append(timed(lambda: residence.hold(conversation.path), device))
            times = times if number else {name: [] for name in times}  # a warm-up
        residence.selector = before
    spreads = {name: spread(values) for name, values in times.items()}
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
    }
