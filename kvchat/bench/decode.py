"""Time a token behind a long history. Decoding computes one token a step, and is what a reader waits for."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from statistics import median
from typing import Any

import torch
from transformers import DynamicCache
from transformers.generation.streamers import BaseStreamer

from kvchat.bench.history import plain_attention, prepared
from kvchat.config import Config
from kvchat.engine import Engine
from kvchat.events import Listener
from kvchat.session import Conversation


def decode(
    config: Config,
    listener: Listener | None = None,
    tokens: int = 4000,
    rounds: int = 9,
    messages: Sequence[Mapping[str, str]] | None = None,
    new_tokens: int = 32,
) -> dict[str, Any]:
    """Seconds a token, greedy, behind a history: everything kept, 0.3 kept, and transformers."""
    # No turn is recent: every segment is held to exactly the ratio that is named.
    whole = config.compress.model_copy(update={"keep_ratio": 1.0, "recent_turns": 0})
    small = whole.model_copy(update={"keep_ratio": 0.3})
    times: dict[str, list[float]] = {"keep_1.0": [], "keep_0.3": [], "transformers": []}
    # Sealed under the smaller ratio, so that it is one of the ranking's cuts.
    with prepared(config.model_copy(update={"compress": small}), listener, tokens, messages) as conversation:
        ids = conversation.residence.ids(conversation.path)
        full = transformers_cache(conversation.engine, ids[:-1])
        for number in range(rounds + 1):
            for name, compress in (("keep_1.0", whole), ("keep_0.3", small)):
                conversation.residence.config = config.model_copy(update={"compress": compress})
                conversation.residence.hold(conversation.path)
                times[name].append(token_s(conversation, ids[-1], new_tokens))
            times["transformers"].append(generate_s(conversation.engine, full, ids, new_tokens))
            if not number:  # a warm-up
                times = {name: [] for name in times}
        rows = conversation.stats()
    medians = {name: median(values) for name, values in times.items()}
    return {
        "history_tokens": len(ids),
        "kept_pairs_at_0.3": rows["num_kept"],
        "pairs": rows["num_pairs"],
        **{f"{name}_token_s": value for name, value in medians.items()},
        "speedup_at_1.0": round(medians["transformers"] / medians["keep_1.0"], 3),
        "speedup_at_0.3": round(medians["transformers"] / medians["keep_0.3"], 3),
    }


def token_s(conversation: Conversation, first: int, count: int) -> float:
    """Median gap between tokens of a greedy answer on a scratch tail; end-of-turn tokens do not end it."""
    cache, engine = conversation.residence.cache, conversation.engine
    with cache.scratch():
        logits = engine.forward(cache, [first])[-1]
        gaps: list[float] = []
        last = time.perf_counter()
        for _ in engine.decode(cache, logits, lambda row: int(row.argmax()), (), lambda: len(gaps) >= count):
            now = time.perf_counter()
            gaps.append(now - last)
            last = now
    return median(gaps[1:])


def transformers_cache(engine: Engine, ids: Sequence[int]) -> DynamicCache:
    """A DynamicCache that holds `ids`."""
    network, cache = engine.model.network, DynamicCache(config=engine.model.network.config)
    with plain_attention(engine), torch.inference_mode():
        network(torch.tensor([list(ids)], device=engine.model.device), past_key_values=cache, logits_to_keep=1)
    return cache


def generate_s(engine: Engine, cache: DynamicCache, ids: Sequence[int], count: int) -> float:
    """Median gap between tokens of transformers' greedy `generate` behind a filled cache, which is left as it was."""
    network, length, times = engine.model.network, cache.get_seq_length(), []

    class Clock(BaseStreamer):  # type: ignore[misc]
        def put(self, value: object) -> None:
            times.append(time.perf_counter())

        def end(self) -> None:
            pass

    inputs = torch.tensor([list(ids)], device=engine.model.device)
    with plain_attention(engine), torch.inference_mode():
        network.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            past_key_values=cache,
            streamer=Clock(),
            do_sample=False,
            min_new_tokens=count,
            max_new_tokens=count,
        )
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys[:, :, :length], layer.values[:, :, :length]
    # The first two are the prompt and the token of the pass that took it in.
    return median(later - earlier for earlier, later in pairwise(times[2:]))
