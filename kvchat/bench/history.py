"""What benchmarks share: a saved conversation in memory, the network as transformers runs it, medians and ratios."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import DynamicCache

from kvchat.bench.llama_cpp import LlamaCpp
from kvchat.config import Config
from kvchat.engine import Engine
from kvchat.errors import InputError, KVChatError
from kvchat.events import Listener, Notice
from kvchat.keys import child_environment
from kvchat.pool import new_pool
from kvchat.residence.host import HostedStore
from kvchat.residence.residence import Residence
from kvchat.session import Conversation

WORDS = [
    "I",
    "we",
    "they",
    "you",
    "river",
    "market",
    "window",
    "garden",
    "morning",
    "winter",
    "number",
    "letter",
    "music",
]
WORDS += ["travel", "paint", "remember", "forget", "answer", "question", "small", "quiet", "bright", "early", "always"]
WORDS += ["never", "because", "while", "before", "after", "under", "with", "to", "from", "and", "or", "but", "the", "a"]

RATIOS = (1.0, 0.5, 0.3)
"""Keep ratios that are measured."""

Spread = dict[str, float]
"""The median, the least and the greatest of several runs."""


@dataclass(frozen=True)
class Subject:
    """What the benchmarks measure.

    config        all settings; the store is a temporary one
    conversation  saved and settled, in memory
    pool          threads that decode frames
    rounds        runs that medians are taken of
    llama         llama.cpp on the same weights, or why there is none
    """

    config: Config
    conversation: Conversation
    pool: Executor
    rounds: int
    llama: LlamaCpp

    @property
    def engine(self) -> Engine:
        """The network."""
        return self.conversation.engine

    @property
    def ids(self) -> list[int]:
        """Token ids of the history."""
        return Residence.ids(self.conversation.path)

    @cached_property
    def plain(self) -> DynamicCache:
        """The history's exact KV as transformers holds it. Who appends to it cuts it back."""
        cache = DynamicCache(config=self.engine.model.network.config)
        with plain_attention(self.engine):
            extend(self.engine, cache, self.ids)
        return cache

    @contextmanager
    def keeping(self, keep_ratio: float) -> Iterator[None]:
        """Every segment held to exactly this ratio: no token is recent."""
        compress = self.config.compress.model_copy(update={"keep_ratio": keep_ratio, "recent_tokens": 0})
        self._hold(self.config.model_copy(update={"compress": compress}))
        try:
            yield
        finally:
            self._hold(self.config)

    def _hold(self, config: Config) -> None:
        residence = self.conversation.residence
        residence.config = config
        residence.hold(self.conversation.path)


def ranked(config: Config, path: Path) -> Config:
    """The same settings with the store at `path`, whose segments can be held to every ratio that is measured."""
    cuts = tuple(sorted({*config.compress.rank_chunks, *RATIOS}))
    compress = config.compress.model_copy(update={"rank_chunks": cuts})
    store = config.store.model_copy(update={"path": str(path)})
    return config.model_copy(update={"store": store, "compress": compress})


@contextmanager
def opened(config: Config, engine: Engine) -> Iterator[tuple[Conversation, Executor]]:
    """A new session "bench", and the pool that it uses."""
    with closing(HostedStore(config.store_path)) as store, new_pool() as pool:
        info = store.create_session("bench", engine.model.name, engine.model.fingerprint)
        conversation = Conversation(info, store, engine, Residence(store, engine, config, pool))
        conversation.begin(None)
        yield conversation, pool


@contextmanager
def prepared(
    config: Config,
    engine: Engine,
    listener: Listener | None,
    tokens: int,
    messages: Sequence[Mapping[str, str]] | None,
) -> Iterator[tuple[Conversation, Executor]]:
    """A saved and settled session "bench" of about so many tokens, still in memory, and the pool that it uses."""
    with opened(config, engine) as (conversation, pool):
        for event in chain(conversation.append(messages or made_up(tokens), lambda: False), conversation.finish()):
            if listener:
                listener(event)
        conversation.save()
        yield conversation, pool


def measured(works: Mapping[str, Callable[[], dict[str, Any]]], listener: Listener | None) -> dict[str, Any]:
    """The figures of each; one that fails, as where the window has no room for another turn, costs only its own."""
    figures = {}
    for name, work in works.items():
        if listener:
            listener(Notice(f"measuring {name}"))
        try:
            figures[name] = work()
        except KVChatError as error:
            figures[name] = {"problem": str(error)}
    return figures


def made_up(tokens: int, seed: int = 0) -> list[dict[str, str]]:
    """Messages of about so many tokens in all: seeded nonsense, for speed does not depend on sense."""
    source, messages = random.Random(seed), []
    for number in range(max(2, tokens // 48 // 2 * 2)):
        text = " ".join(source.choices(WORDS, k=36)).capitalize() + "."
        messages.append({"role": "assistant" if number % 2 else "user", "content": text})
    return messages


@contextmanager
def plain_attention(engine: Engine) -> Iterator[None]:
    """The network as transformers runs it."""
    network = engine.model.network
    ours = network.config._attn_implementation
    network.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        network.set_attn_implementation(ours)


@torch.inference_mode()
def extend(engine: Engine, cache: DynamicCache, ids: Sequence[int]) -> None:
    """Prefill `ids` into a DynamicCache, in the chunks that kvchat uses; call it under `plain_attention`."""
    for start in range(0, len(ids), engine.chunk_size):
        chunk = torch.tensor([list(ids[start : start + engine.chunk_size])], device=engine.model.device)
        engine.model.network(chunk, logits_to_keep=1, **{engine.model.cache_keyword: cache})


def cut_back(cache: DynamicCache, length: int) -> None:
    """Forget what stands behind the first `length` tokens."""
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys[:, :, :length], layer.values[:, :, :length]


def drain(steps: Iterable[object]) -> None:
    """Take all steps."""
    for _ in steps:
        pass


def timed(work: Callable[[], object], device: torch.device | None = None) -> float:
    """Seconds that `work` takes, until the device is done too."""
    _wait(device)
    begun = time.perf_counter()
    work()
    _wait(device)
    return time.perf_counter() - begun


def _wait(device: torch.device | None) -> None:
    if device and device.type == "cuda":
        torch.cuda.synchronize(device)


def spread(values: Sequence[float | None]) -> Spread | None:
    """Median, least and greatest of the runs; None if one of them gave nothing."""
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return None
    return {"median": median(known), "min": min(known), "max": max(known)}


def ratio(one: Spread | None, other: Spread | None) -> float | None:
    """How many times as large the first median is as the second; None if either is missing."""
    return round(one["median"] / other["median"], 3) if one and other else None


def in_new_process(request: Mapping[str, Any]) -> dict[str, Any]:
    """What `kvchat.bench.child` answers to a request.

    Raises:
        InputError: it failed; the last line that it wrote.
    """
    child = subprocess.run(
        [sys.executable, "-m", "kvchat.bench.child"],
        input=json.dumps(request),
        env=child_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    if child.returncode:
        said = child.stderr.strip().splitlines() or [f"exit code {child.returncode}"]
        raise InputError(f"the measuring process failed: {said[-1]}")
    answer: dict[str, Any] = json.loads(child.stdout.splitlines()[-1])
    return answer
