"""Which part of a turn that is too long to come back as a whole has to do with a question."""

from __future__ import annotations

import math
from collections.abc import Sequence

from kvchat.store.vectors import COMMON, FEW, words


def told_apart(question: str, texts: Sequence[str]) -> list[float]:
    """How well each of several texts matches a question: by its words that few of them have, the rarest most.

    Words weigh as messages' do (`VectorStore.matches`).
    """
    asked, found = set(words(question)), [set(words(text)) for text in texts]
    hits = {word: sum(word in one for one in found) for word in asked}
    telling = {word: count for word, count in hits.items() if 0 < count <= max(FEW, COMMON * len(texts))}
    worth = {word: math.log(1 + (len(texts) + 0.5) / (count + 0.5)) ** 2 for word, count in telling.items()}
    return [sum(worth[word] for word in sorted(worth.keys() & one)) for one in found]


def passages(low: int, high: int, length: int) -> list[tuple[int, int]]:
    """Stretches of so many places that each go over half of the one before, which cover [low, high) together."""
    step = max(1, length // 2)
    return [(at, min(at + length, high)) for at in range(low, max(low + 1, high - step), step)]
