"""Vectors of messages: made once, kept in the store beside the text, compared by their angle.

Letters: n pieces, d numbers of a vector.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvchat.episodes.embedder import Embedder, unit
from kvchat.store.store import Message, Store

Array = npt.NDArray[np.float32]

PIECE = 1000
"""Most characters of a piece; a longer sentence is cut, at spaces where there are some."""
SHORTEST = 20
"""Characters below which a sentence has no vector of its own: it goes with the next."""
ENDS = re.compile(r"(?<=[.!?…])\s+|(?<=[。！？])\s*|\s*\n\s*")
"""Where sentences end."""
BATCH = 40
"""Pieces that are embedded at once; a stop is heard in between, some tenths of a second."""
FLOOR = 0.1
"""Part of the mean variance that every direction is taken to have, so that none which is hardly used counts most."""


class Vectors:
    """The vectors of one embedder, from the store as far as they are there.

    The store keeps them as float16, and what is new is rounded so before it is used: it makes no difference which is.
    """

    def __init__(self, store: Store, embedder: Embedder) -> None:
        self._store = store
        self._embedder = embedder

    def of(self, messages: Sequence[Message]) -> list[Array]:
        """(n, d) for each message, n = 0 where it has no text; what is missing is made and written."""
        for _ in self.fill(messages):
            pass
        found = self._found(messages)
        return [found.get(message.id, np.zeros((0, 1), np.float32)) for message in messages]

    def fill(self, messages: Sequence[Message], stop: Callable[[], bool] = lambda: False) -> Iterator[int]:
        """Make what is missing, yielding after each batch how many messages are still to do.

        Of a message that is stopped half-way nothing is kept.
        """
        left = deque((message.id, pieces(message.content)) for message in self.missing(messages))
        while left and not stop():
            batch, size = [left.popleft()], 0
            while left and (size := size + len(batch[-1][1])) + len(left[0][1]) <= BATCH:
                batch.append(left.popleft())
            made = self._made(batch, stop)
            if not made:
                return
            self._store.put_vectors(self._embedder.name, made)
            yield len(left)

    def missing(self, messages: Sequence[Message]) -> list[Message]:
        """Those that have text and no vectors yet, each once."""
        texts = {message.id: message for message in messages if message.content.strip()}
        there = self._store.embedded(self._embedder.name, list(texts))
        return [message for key, message in texts.items() if key not in there]

    def question(self, message: Message) -> Array:
        """(n, d) of a message that need not be in the store; nothing is written."""
        return self._embedder.embed(pieces(message.content))

    def _found(self, messages: Sequence[Message]) -> dict[str, Array]:
        texts = {message.id: message.content for message in messages}
        bodies = self._store.vectors(self._embedder.name, list(texts))
        return {
            key: np.frombuffer(body, np.float16).astype(np.float32).reshape(len(pieces(texts[key])), -1)
            for key, body in bodies.items()
        }

    def _made(self, texts: Sequence[tuple[str, list[str]]], stop: Callable[[], bool]) -> dict[str, bytes]:
        """What is to be written, by message; nothing if it was stopped."""
        flat, rows = [piece for _, part in texts for piece in part], list[npt.NDArray[np.float16]]()
        for first in range(0, len(flat), BATCH):
            if first and stop():
                return {}
            rows.extend(self._embedder.embed(flat[first : first + BATCH]).astype(np.float16))
        left = iter(rows)
        return {key: np.stack([next(left) for _ in part]).tobytes() for key, part in texts}


def pieces(text: str) -> list[str]:
    """The sentences of a text, each of which has a vector: what is asked for is often said by the way."""
    found = [""]
    for sentence in filter(None, ENDS.split(text.strip())):
        if found[-1] and len(found[-1]) < SHORTEST:
            found[-1] += f" {sentence}"
        else:
            found.append(sentence)
    return [piece for sentence in found for piece in _cut(sentence)]


def _cut(text: str) -> list[str]:
    """A text in pieces of at most PIECE characters, without spaces around them; none of an empty text."""
    found, rest = [], text.strip()
    while len(rest) > PIECE:
        cut = max(rest.rfind(space, PIECE // 2, PIECE) for space in " \n")
        head, rest = (rest[:cut], rest[cut:].lstrip()) if cut > 0 else (rest[:PIECE], rest[PIECE:].lstrip())
        found.append(head.rstrip())
    return [*found, rest] if rest else found


@dataclass(frozen=True)
class Spread:
    """How the vectors of a conversation lie: their mean (d,), and what makes them vary alike in all directions (d, d).

    What all turns have in common, and what many have, tells none from another: a language model's states differ in a
    few directions above all, whatever the text is about. So cosines are taken after the mean is off and every
    direction is divided by how much it varies.
    """

    mean: Array
    turn: Array

    @classmethod
    def over(cls, rows: Array, floor: float = FLOOR) -> Spread:
        """That of (n, d) rows, at least one."""
        mean = rows.mean(0, dtype=np.float64)
        apart = rows - mean
        covariance = apart.T @ apart / len(rows)
        least = floor * max(float(np.trace(covariance)) / len(covariance), 1e-12)
        # Cosines do not depend on which root of the inverse this is.
        root: npt.NDArray[np.float64] = np.linalg.inv(np.linalg.cholesky(covariance + least * np.eye(len(covariance))))
        return cls(mean.astype(np.float32), root.T.astype(np.float32))

    @classmethod
    def none(cls, width: int) -> Spread:
        """For vectors that are compared as they are."""
        return cls(np.zeros(width, np.float32), np.eye(width, dtype=np.float32))

    def directions(self, rows: Array) -> Array:
        """(n, d) rows of length 1, so turned that their products are the cosines."""
        return unit(np.asarray((rows - self.mean) @ self.turn, np.float32))


def steps(count: int, first: int = 64) -> int:
    """`count` rounded down to a number of a series that grows by quarters; as it is below the first of them.

    What is made anew only when there is a quarter more is so the same in every process, whenever it was begun.
    """
    size = first
    while size + size // 4 <= count:
        size += size // 4
    return size if size <= count else count
