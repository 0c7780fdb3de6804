"""Questions asked as a turn would ask them: what they concern comes back first, and leaves again."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from kvchat.evals.cases import Question
from kvchat.evals.measures import ANSWER_TOKENS, MEASURES, Figures
from kvchat.residence.residence import Residence
from kvchat.session import Conversation
from kvchat.store.store import Message


@dataclass(frozen=True, slots=True)
class Brought:
    """What came back for a question.

    Attributes:
        starts: places where the segments begin of which more is in memory than before.
        held: of every segment in memory, by its start, the fraction of its pairs.
        seconds: until it was there.
    """

    starts: tuple[int, ...]
    held: dict[int, float]
    seconds: float

    def share(self, start: int) -> float:
        """The fraction in memory of the segment that begins there; 0 if nothing of it is."""
        return self.held.get(start, 0.0)


@dataclass(frozen=True, slots=True)
class Answer:
    """The likeliest answer to a question, what recall's measure says of it, and what was brought back for it."""

    ids: tuple[int, ...]
    figures: Figures
    brought: Brought
    first_s: float
    """Seconds to read the question and to compute the first token, without those of recall."""


def answer_with_recall(conversation: Conversation, question: Question) -> Answer:
    """Ask behind what recall brings; afterwards the conversation is as it was."""
    engine, cache, prompt = conversation.engine, conversation.residence.cache, conversation.question(question.text)
    with recalled(conversation, question.text) as brought:
        begun = time.perf_counter()
        engine.greedy(cache, prompt, 1)
        first_s = time.perf_counter() - begun
        figures = MEASURES["recall"](conversation, question, None)
        ids = engine.greedy(cache, prompt, ANSWER_TOKENS)
    return Answer(tuple(ids), figures, brought, first_s)


@contextmanager
def recalled(conversation: Conversation, text: str) -> Iterator[Brought]:
    """Inside, memory holds what a turn that asks this would hold."""
    residence, before = conversation.residence, chunks(conversation.residence)
    if type(residence) is not Residence:  # a baseline
        yield Brought((), held(residence), 0.0)
        return
    begun = time.perf_counter()
    for _ in residence.recall(asking(conversation, text)):
        pass
    seconds, after = time.perf_counter() - begun, chunks(residence)
    try:
        yield Brought(tuple(start for start in after if after[start] > before.get(start, 0)), held(residence), seconds)
    finally:
        residence.recalled, residence.expected = {}, 0
        residence.hold(conversation.path)


def asking(conversation: Conversation, text: str) -> list[Message]:
    """The path as it would be with this question."""
    path, template = conversation.path, conversation.engine.model.template
    piece = template.user(text, first=not any(message.role == "user" for message in path))
    return [*path, Message.new(path[-1].id if path else None, "user", text, piece.ids, piece.content_span)]


def chunks(residence: Residence) -> dict[int, int]:
    """Chunks in memory of every sealed segment, by its start."""
    return {one.start: one.chunks for one in residence.tiers.residents}


def held(residence: Residence) -> dict[int, float]:
    """Of every segment in memory the fraction of its pairs; the tail holds all of its own."""
    found = {}
    for one in residence.tiers.residents:
        sizes = one.header.ranking.sizes
        found[one.start] = float(sizes[: one.chunks].sum() / sizes.sum())
    return found | {residence.cache.tail_start: 1.0}


def start_of(residence: Residence, place: int) -> int:
    """Where the segment begins, or the tail, in which a token lies."""
    starts = [0, *(entry.start for entry in residence.known), residence.cache.tail_start]
    return max(start for start in starts if start <= place)
