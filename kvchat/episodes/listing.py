"""The episodes of a stored conversation: which turns belong together, and by what words they are told apart."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from kvchat.episodes.clusters import Clusters, names
from kvchat.episodes.embedder import unit
from kvchat.episodes.vectors import Array, Vectors
from kvchat.store.store import Message


@dataclass(frozen=True, slots=True)
class Episode:
    """Turns about one matter, numbered from 1; `since` and `until` are when the first and the last was begun."""

    name: str
    turns: tuple[int, ...]
    tokens: int
    since: str
    until: str


def episodes(vectors: Vectors, path: Sequence[Message], wanted: int = 0) -> list[Episode]:
    """The episodes of a path, by where they begin; turns without any text belong to none.

    Raises:
        InputError: scikit-learn is not installed.
    """
    turns = list(turns_of(path))
    rows = turn_vectors(vectors, turns)
    spoken = [index for index, row in enumerate(rows) if row.any()]
    if not spoken:
        return []
    members = Clusters(rows[spoken], wanted).members.tolist()
    texts = [" ".join(message.content for message in turns[index]) for index in spoken]
    found = []
    for label, name in enumerate(names(texts, members)):
        own = [index for index, member in zip(spoken, members, strict=True) if member == label]
        tokens = sum(len(message.token_ids) for index in own for message in turns[index])
        since, until = (turns[index][0].created for index in (own[0], own[-1]))
        found.append(Episode(name, tuple(index + 1 for index in own), tokens, since, until))
    return found


def turns_of(path: Sequence[Message]) -> Iterator[Sequence[Message]]:
    """The messages of each turn; a system prompt belongs to none, and a greeting before the first user to turn 1."""
    spoken = [message for message in path if message.role != "system"]
    starts = [index for index, message in enumerate(spoken) if message.role == "user"]
    bounds = [0, *starts[1:], len(spoken)] if starts else [0, len(spoken)]
    yield from (spoken[first:last] for first, last in pairwise(bounds) if first < last)


def turn_vectors(vectors: Vectors, turns: Sequence[Sequence[Message]]) -> Array:
    """(n, d): the mean of each turn's vectors, at length 1; 0 for a turn without text."""
    found = iter(vectors.of([message for turn in turns for message in turn]))
    rows = [[row for _ in turn for row in next(found)] for turn in turns]
    width = max((len(row) for part in rows for row in part), default=1)
    return unit(np.stack([np.mean(part, 0) if part else np.zeros(width, np.float32) for part in rows or [[]]]))


def ranges(numbers: Sequence[int]) -> str:
    """Rising numbers as in "3-9, 14"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    return ", ".join("-".join(map(str, run)) for run in runs)
