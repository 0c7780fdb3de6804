"""What benchmarks share: a saved session of a given length, and the network as transformers runs it."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from kvchat.config import Config
from kvchat.engine import Engine
from kvchat.events import Listener
from kvchat.model import load
from kvchat.residence import Residence
from kvchat.session import Conversation
from kvchat.store import Store

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


@contextmanager
def prepared(
    config: Config, listener: Listener | None, tokens: int, messages: Sequence[Mapping[str, str]] | None
) -> Iterator[Conversation]:
    """A saved and settled session "bench" of about so many tokens, still in memory."""
    engine = Engine(load(config.model, listener), config.model.prefill_chunk_size)
    store = Store(config.store_path)
    with ThreadPoolExecutor(2) as pool:
        info = store.create_session("bench", engine.model.name, engine.model.fingerprint)
        conversation = Conversation(info, store, engine, Residence(store, engine, config, pool))
        conversation.begin(None)
        for steps in (conversation.append(messages or made_up(tokens), lambda: False), conversation.finish()):
            for event in steps:
                if listener:
                    listener(event)
        yield conversation
    store.close()


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
