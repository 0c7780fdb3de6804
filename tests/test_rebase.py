"""Conversations without end: re-based positions, a limit of memory, and what is lost long ago."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, DynamicCache

from kvchat.cache.segment import LayerKV
from kvchat.config import Config
from kvchat.engine import Engine
from kvchat.events import Notice
from kvchat.residence import Residence
from kvchat.session import Conversation
from kvchat.store import Store
from tests.tiny import make_model

WINDOW = 512


def settings(**more: Any) -> Config:
    plain = {"compress.segment_min": 40, "compress.recent_tokens": 60, "compress.scorer": "random"}
    return Config().replaced({**plain, "generate.max_new_tokens": 8, **more})


@contextmanager
def conversation(store: Store, engine: Engine, config: Config, name: str = "far") -> Iterator[Conversation]:
    names = {info.name for info in store.sessions()}
    if name not in names:
        store.create_session(name, engine.model.name, engine.model.fingerprint)
    info = store.session(name)
    with ThreadPoolExecutor(1) as pool:
        yield Conversation(info, store, engine, Residence(store, engine, config, pool, info.id))


def say(one: Conversation, number: int) -> list[Any]:
    """A turn of some 50 tokens."""
    messages = [
        {"role": "user", "content": f"{number}: what is it?"},
        {"role": "assistant", "content": f"It is {number * 37 % 101}."},
    ]
    events = [*one.append(messages, lambda: False), *one.finish()]
    one.save()
    return events


@pytest.fixture(params=["llama", "qwen3", "phi3"])
def engine(request: pytest.FixtureRequest) -> Engine:
    return Engine(replace(make_model(request.param), context_window=WINDOW), 64)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with closing(Store(tmp_path / "far.db")) as store:
        yield store


def logits(one: Conversation) -> Tensor:
    cache, ids = one.residence.cache, [5, 80, 33, 200]
    with cache.scratch():
        return one.engine.forward(cache, ids, logits=len(ids))


def test_a_conversation_goes_on_beyond_the_window_and_is_resumed_bit_for_bit(engine: Engine, store: Store) -> None:
    with conversation(store, engine, settings()) as live:
        live.begin("Be brief.")
        events = [event for number in range(60) for event in say(live, number)]
        cache = live.residence.cache
        assert cache.num_seen > 4 * WINDOW and cache.position < WINDOW and cache.offset
        assert any(isinstance(event, Notice) and "goes on at position" in event.text for event in events)
        with conversation(store, engine, settings()) as again:
            for _ in again.restore():
                pass
            assert again.residence.cache.num_seen == cache.num_seen and again.residence.cache.offset == cache.offset
            assert not again.residence.num_computed
            assert torch.equal(logits(again), logits(live))
