"""EpiCache (arXiv 2509.17396): a static cache for each topic, all of the same history; the nearest answers a question.

The history is cut into windows of a few messages, which k-means joins into topics by their embeddings. For every topic
the whole history is prefilled anew, block by block, with eviction after each block: what is kept of every layer, its
heads competing, are the pairs to which a patched prompt attends most, an instruction with the topic's most typical
windows. Positions stay, nothing is protected, and nothing is kept of what could be added to: with the next turn all of
it begins anew. As released, but for scores in float32 and the chat template around the instruction.

Letters: L layers, H KV heads, G query heads per KV head, q tokens of the patched prompt, T tail tokens, N rows, D
head_dim.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvchat.cache.layer import Piece, RaggedLayer
from kvchat.cache.ragged import SegmentedCache, Tap
from kvchat.cache.segment import LayerKV
from kvchat.config import Config
from kvchat.engine import Engine, Stop
from kvchat.episodes.embedder import find_embedder
from kvchat.errors import InputError
from kvchat.evals.baselines import Unsaved, rows_a_head
from kvchat.events import Phase
from kvchat.residence.residence import Steps
from kvchat.store.store import Message, Store
from kvchat.template import ChatTemplate

Vectors = npt.NDArray[np.float32]
Embed = Callable[[Sequence[str]], Vectors]
"""Texts to unit vectors (texts, n)."""

INSTRUCTION = (
    "Extract the essential information of this conversation: who speaks and what they are like, events with their "
    "dates, personal details, commitments, opinions, relationships, emotions, and experiences that are unique."
)


@dataclass(frozen=True, slots=True)
class Scheme:
    """The published defaults."""

    clusters: int = 4
    window: int = 4
    """Messages of a window."""
    medoids: int = 4
    """Windows of a patched prompt."""
    block: int = 2048
    """Tokens that are computed between two evictions."""
    seed: int = 42


@dataclass(frozen=True, slots=True, eq=False)
class Topic:
    """A cluster of windows: its mean (n,), which is no unit vector, and the windows nearest to it in their order."""

    centroid: Vectors
    windows: tuple[str, ...]


class EpiCache(Unsaved):
    """Nothing between questions; when some come, a cache of `rows_a_head` rows for each topic.

    Args:
        embed: texts to unit vectors; None: as the settings say.
    """

    def __init__(
        self,
        store: Store,
        engine: Engine,
        config: Config,
        pool: Executor,
        embed: Embed | None = None,
        scheme: Scheme | None = None,
    ) -> None:
        super().__init__(store, engine, config, pool)
        self.embed, self.scheme = embed or find_embedder(config.episodes, engine).embed, scheme or Scheme()
        self.topics: list[Topic] = []
        self.caches: list[SegmentedCache] = []

    @property
    def sealed_bytes(self) -> int:
        """Bytes of the rows that answer; those of the other topics lie elsewhere."""
        return self.cache.num_sealed_rows * self.engine.model.bf16_bytes_per_token // self.engine.model.pairs_per_token

    def restore(self, path: Sequence[Message]) -> Steps:
        """Nothing is there before a question."""
        yield from ()

    def catch_up(self, path: Sequence[Message], last: int, phase: Phase, stop: Stop) -> Steps:
        """Nothing can be added."""
        yield from ()

    def settle(self, path: Sequence[Message]) -> Steps:
        """Nothing is sealed."""
        yield from ()

    def hold(self, path: Sequence[Message]) -> None:
        """Caches are made at their size."""

    @contextmanager
    def asked(self, path: Sequence[Message]) -> Iterator[None]:
        """Inside, `choose` for a question gives the cache that answers it."""
        empty, rows, ids = self.cache, rows_a_head(self, path), self.ids(path)
        self.topics = topics_of(windows(path, self.scheme.window), self.embed, self.scheme)
        prompts = [patched(self.engine.model.template, topic) for topic in self.topics]
        self.caches = [build(self.engine, ids, prompt, rows, self.scheme.block) for prompt in prompts]
        yield
        self.cache, self.topics, self.caches = empty, [], []

    def choose(self, text: str) -> int:
        """Answer this question from the nearest topic's cache; which that is."""
        [vector] = self.embed([text])
        nearest = int(np.argmax([topic.centroid @ vector for topic in self.topics]))
        self.cache = self.caches[nearest]
        return nearest


# -- topics ----------------------------------------------------------------------------------------------------------


def windows(path: Sequence[Message], size: int) -> list[str]:
    """So many messages at a time, a line each, with the name of who speaks; the last may be fewer."""
    said = [f'{message.role.capitalize()}: "{message.content}"' for message in path if message.role != "system"]
    return ["\n".join(said[start : start + size]) for start in range(0, len(said), size)]


def topics_of(texts: Sequence[str], embed: Embed, scheme: Scheme) -> list[Topic]:
    """Clusters of windows, fewer than the scheme's if there are no more windows.

    Raises:
        InputError: scikit-learn is not installed.
    """
    try:
        from sklearn.cluster import KMeans
    except ImportError:
        raise InputError("topics are found with scikit-learn; pip install scikit-learn") from None
    vectors = embed(texts)
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-3)
    distinct = len(np.unique(vectors, axis=0))
    found = KMeans(min(scheme.clusters, distinct), n_init=10, random_state=scheme.seed).fit(vectors)
    topics = []
    for label, centroid in enumerate(found.cluster_centers_.astype(np.float32)):
        members = np.flatnonzero(found.labels_ == label)
        nearness = vectors[members] @ centroid  # as cosines order them: the windows' vectors are of length one
        nearest = sorted(members[np.argsort(-nearness, kind="stable")[: scheme.medoids]].tolist())
        topics.append(Topic(centroid, tuple(texts[index] for index in nearest)))
    return topics


def patched(template: ChatTemplate, topic: Topic) -> tuple[int, ...]:
    """Ids that stand behind every block: a user's message with the instruction, and, as reply, the topic's windows."""
    request = template.user("\n\n" + INSTRUCTION, first=False)
    text = template.user("\n".join(topic.windows), first=False)
    return request.ids + template.generation_prompt + text.ids[slice(*text.content_span)]


# -- caches ----------------------------------------------------------------------------------------------------------


def build(engine: Engine, ids: Sequence[int], prompt: Sequence[int], rows: int, block: int) -> SegmentedCache:
    """A cache of the history `ids` with `rows` rows a head on average; at most that, a block and the prompt on the way.

    Args:
        prompt: what scores.
    """
    cache = engine.new_cache()
    for start in range(0, len(ids), block):
        deque(engine.prefill(cache, ids[start : start + block], lambda: False), maxlen=0)
        tap = Received(cache)
        observe(engine, cache, prompt, tap)
        evict(cache, tap.scores, rows)
    return cache


@torch.inference_mode()
def observe(engine: Engine, cache: SegmentedCache, ids: Sequence[int], tap: Tap) -> None:
    """Run `ids` on a scratch tail, the first at the position of the cache's last token, as released."""
    positions = torch.arange(cache.num_seen - 1, cache.num_seen - 1 + len(ids), device=engine.model.device)
    with cache.scratch(tap):
        engine.model.network.base_model(**{**engine._inputs(cache, ids), "position_ids": positions[None]})


class Received:
    """A tap: the largest probability that each row of a cache receives from a pass, whose own keys do not count."""

    def __init__(self, cache: SegmentedCache) -> None:
        self._cache = cache
        self.scores: list[list[Tensor]] = []
        """Of each layer and head, in the order of `rows_of`."""

    def observe(self, layer: int, query: Tensor, keys: Tensor, values: Tensor, scale: float) -> None:
        """Head by head, for each has its own rows."""
        heads = rows_of(self._cache.layers[layer], keys.shape[1] - query.shape[1])
        logits = (
            group.flatten(0, 1).float() @ past.float().T * scale
            for group, (past, _, _) in zip(query.chunk(len(keys)), heads, strict=True)
        )
        self.scores.append([one.softmax(-1).amax(0) for one in logits])


def rows_of(layer: RaggedLayer, tail: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Keys, values and positions of each head's sealed rows and of the first `tail` tokens of the tail."""
    sealed, (keys, values) = layer.sealed, layer.tail()
    new = torch.arange(layer.tail_start, layer.tail_start + tail, dtype=torch.int32, device=layer.device)
    heads = []
    for head, (low, high) in enumerate(zip(sealed.bounds, sealed.bounds[1:], strict=False)):
        both = [
            torch.cat([old[low:high], more[head, :tail]])
            for old, more in ((sealed.keys, keys), (sealed.values, values))
        ]
        heads.append((both[0], both[1], torch.cat([sealed.positions[low:high], new])))
    return heads


@torch.inference_mode()
def evict(cache: SegmentedCache, scores: Sequence[Sequence[Tensor]], rows: int) -> None:
    """Seal everything, and keep of every layer the `rows` times H best, over all its heads."""
    tail, end = cache.tail_length, cache.num_seen
    layers = [best(rows_of(layer, tail), found, rows) for layer, found in zip(cache.layers, scores, strict=True)]
    cache.keep([])
    cache.attach({Piece(0, 0): layers}, end, tail)


def best(heads: Sequence[tuple[Tensor, Tensor, Tensor]], scores: Sequence[Tensor], rows: int) -> LayerKV:
    """The `rows` times H best rows of a layer, of equal ones the earlier; each head's in their order."""
    joined = torch.cat([*scores])
    chosen = torch.zeros(len(joined), dtype=torch.bool, device=joined.device)
    chosen[joined.argsort(descending=True, stable=True)[: rows * len(heads)]] = True
    counts = [int(part.sum()) for part in chosen.split_with_sizes([len(one) for one in scores])]
    cu_seqlens = torch.tensor([0, *counts]).cumsum(0).int()
    keys, values, positions = (torch.cat(part)[chosen] for part in zip(*heads, strict=True))
    return LayerKV(keys, values, positions, cu_seqlens)
