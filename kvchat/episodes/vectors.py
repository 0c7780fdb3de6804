"""Vectors of messages: made once, kept in the store beside the text, compared by their angle.

Letters: n pieces, d numbers of a vector.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from kvchat.episodes.embedder import Embedder
from kvchat.store import Message, Store

Array = npt.NDArray[np.float32]

PIECE = 1000
"""Characters of a text that have one vector; a longer text is cut, at spaces where there are some, into several."""
BATCH = 64
"""Messages that are embedded and written at once; a stop is heard in between."""


class Vectors:
    """The vectors of one embedder, from the store as far as they are there.

    The store keeps them as float16. What is new is rounded too before it is used: so it makes no difference which it is.
    """

    def __init__(self, store: Store, embedder: Embedder) -> None:
        self._store = store
        self._embedder = embedder
        self._known: dict[str, Array] = {}

    def of(self, messages: Sequence[Message]) -> list[Array]:
        """(n, d) for each message, n = 0 where it has no text; what is missing is made and written."""
        for _ in self.fill(messages):
            pass
        return [self._known[message.id] for message in messages]

    def fill(self, messages: Sequence[Message], stop: Callable[[], bool] = lambda: False) -> Iterator[int]:
        """Make what is missing, yielding after each batch how many messages are still to do."""
        missing = self._missing(messages)
        while missing and not stop():
            batch, missing = missing[:BATCH], missing[BATCH:]
            made = self._made(batch)
            self._store.put_vectors(self._embedder.name, {key: rows.tobytes() for key, rows in made.items()})
            self._known |= {key: rows.astype(np.float32) for key, rows in made.items()}
            yield len(missing)

    def missing(self, messages: Sequence[Message]) -> int:
        """How many of the messages have no vectors yet."""
        return len(self._missing(messages))

    def question(self, message: Message) -> Array:
        """(n, d) of a message that need not be in the store; nothing is written."""
        return self._embedder.embed(pieces(message.content))

    def _missing(self, messages: Sequence[Message]) -> list[Message]:
        """Those without, each once; what the store has is read on the way."""
        unread = {message.id: message for message in messages if message.id not in self._known}
        for key, body in self._store.vectors(self._embedder.name, list(unread)).items():
            rows = np.frombuffer(body, np.float16).astype(np.float32)
            self._known[key] = rows.reshape(len(pieces(unread[key].content)), -1)
        for key, message in unread.items():
            if not pieces(message.content):
                self._known[key] = np.zeros((0, 1), np.float32)
        return [message for key, message in unread.items() if key not in self._known]

    def _made(self, messages: Sequence[Message]) -> dict[str, npt.NDArray[np.float16]]:
        texts = [pieces(message.content) for message in messages]
        rows = iter(self._embedder.embed([piece for part in texts for piece in part]).astype(np.float16))
        return {message.id: np.stack([next(rows) for _ in part]) for message, part in zip(messages, texts, strict=True)}


def pieces(text: str) -> list[str]:
    """A text cut into pieces of at most PIECE characters, without spaces around them; none of an empty text."""
    found, rest = [], text.strip()
    while len(rest) > PIECE:
        cut = max(rest.rfind(space, PIECE // 2, PIECE) for space in " \n")
        head, rest = (rest[:cut], rest[cut:].lstrip()) if cut > 0 else (rest[:PIECE], rest[PIECE:])
        found.append(head.rstrip())
    return [*found, rest] if rest else found


def similar(question: Array, groups: Sequence[Sequence[Array]]) -> list[float]:
    """For each group of vectors the largest cosine with any of `question` (n, d); -1 for an empty group.

    The mean of all vectors in the groups is taken off first, from the question too: what states of a language model
    have in common would else outweigh by far what tells them apart.
    """
    rows = [row for group in groups for row in group]
    if not rows or not len(question):
        return [-1.0] * len(groups)
    matrix = np.stack(rows)
    mean = matrix.mean(0)
    cosines = (unit(matrix - mean) @ unit(question - mean).T).max(1)
    ends = np.cumsum([len(group) for group in groups])
    return [
        float(cosines[end - len(group) : end].max()) if group else -1.0 for group, end in zip(groups, ends, strict=True)
    ]


def unit(rows: Array) -> Array:
    """Rows (n, d) at length 1; those without a direction stay 0."""
    lengths = np.linalg.norm(rows, axis=-1, keepdims=True)
    return np.divide(rows, lengths, out=np.zeros_like(rows), where=lengths > 1e-6)
