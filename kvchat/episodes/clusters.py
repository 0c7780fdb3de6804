"""Turns sorted into episodes by what they are about: k-means over their vectors (EpiCache, arXiv 2509.17396).

EpiCache sorts a history once, when all of it is there. Here a new turn joins the nearest episode at once, and all are
sorted anew when there is a quarter more. When that is follows from the number of turns alone, so the same conversation
has the same episodes in every process.

Letters: n turns, d numbers of a vector, k episodes.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from importlib.util import find_spec

import numpy as np
import numpy.typing as npt

from kvchat.episodes.embedder import unit
from kvchat.episodes.vectors import Array, Spread, steps
from kvchat.errors import InputError
from kvchat.store.vectors import words

SEED = 42
STARTS = 10
"""Times that k-means begins; the best counts."""
FEWEST, TURNS = 4, 64
"""Episodes of a short conversation, and turns for which a longer one gets one more."""
FLOOR = 1.0
"""As that of `vectors`, but higher: what tells episodes from each other are directions in which turns vary much."""
SHORTEST = 3
"""Letters of a word that may be part of a name."""


def require_clusters() -> None:
    """Raises InputError if scikit-learn is not installed."""
    if find_spec("sklearn") is None:
        raise InputError("sorting turns into episodes needs scikit-learn; pip install 'kvchat[episodes]'")


def num_clusters(turns: int, wanted: int = 0) -> int:
    """How many episodes so many turns get; `wanted` if that is not 0. Never more than there are turns."""
    return min(turns, wanted or max(FEWEST, turns // TURNS))


class Clusters:
    """The episodes of a conversation whose turns have these vectors, of which more may come.

    Args:
        vectors: (n, d), 0 for a turn without text.
        wanted: episodes; 0 = by the number of turns.
    """

    def __init__(self, vectors: Array, wanted: int = 0) -> None:
        self._wanted = wanted
        self.members: npt.NDArray[np.int64] = np.zeros(0, np.int64)
        """The episode of each turn (n,), numbered by where they begin."""
        self._vectors = vectors
        self.recluster()

    @property
    def due(self) -> bool:
        """Whether there are so many more turns that they should be sorted anew, when there is time."""
        return steps(len(self._vectors)) > self._sorted

    def add(self, vectors: Array) -> None:
        """More turns (m, d): each joins the nearest episode."""
        self._vectors = np.concatenate([self._vectors, vectors]) if len(self._vectors) else vectors
        if not len(self.centroids):
            self.recluster()
            return
        self.members = np.concatenate([self.members, self._nearest(vectors)])

    def recluster(self) -> None:
        """Sort the first turns anew, as many as `steps` gives; later ones join the nearest."""
        self._sorted = steps(len(self._vectors))
        first = self._vectors[: self._sorted]
        self.centroids: Array = np.zeros((0, 1), np.float32)
        if not len(first):
            return
        self._spread = Spread.over(first, FLOOR)
        turned = self._spread.directions(first)
        labels = _sorted_into(turned, num_clusters(len(first), self._wanted))
        self.centroids = unit(np.stack([turned[labels == label].mean(0) for label in range(labels.max() + 1)]))
        self.members = np.concatenate([labels, self._nearest(self._vectors[self._sorted :])])

    def _nearest(self, vectors: Array) -> npt.NDArray[np.int64]:
        if not len(vectors):
            return np.zeros(0, np.int64)
        cosines = self._spread.directions(vectors) @ self.centroids.T
        return np.asarray(cosines.argmax(1), np.int64)


def _sorted_into(rows: Array, count: int) -> npt.NDArray[np.int64]:
    """k-means of rows of length 1: the cluster of each, numbered by where each begins; no number is left out."""
    require_clusters()
    from sklearn.cluster import KMeans
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1):  # the order in which threads add up changes the last bits
        found = KMeans(min(count, len(np.unique(rows, axis=0))), n_init=STARTS, random_state=SEED).fit(rows).labels_
    first = list(dict.fromkeys(found.tolist()))
    return np.array([first.index(label) for label in found.tolist()], np.int64)


def names(texts: Sequence[str], members: Sequence[int], most: int = 3) -> list[str]:
    """What each episode is named by: the words that many of its turns have and few others.

    In the spirit of class-based TF-IDF (Grootendorst, arXiv 2203.05794), by turns that have a word: p log(p / q) with
    its part p of the episode's turns and q of all. So no list of stop words of any language is needed. A word must be
    in two turns of the episode; one with fewer turns has no name.
    """
    turns = [{word for word in words(text) if len(word) >= SHORTEST and word.isalpha()} for text in texts]
    total = Counter(word for turn in turns for word in turn)
    found = []
    for label in range(max(members, default=-1) + 1):
        own = [turn for turn, member in zip(turns, members, strict=True) if member == label]
        counts = Counter(word for turn in own for word in turn)
        weights = {
            word: count / len(own) * math.log(count * len(turns) / len(own) / total[word])
            for word, count in counts.items()
            if count > 1
        }
        first = sorted(weights, key=lambda word: (-weights[word], word))[:most]
        found.append(" ".join(word for word in first if weights[word] > 0 or len(own) == len(turns)))
    return found
