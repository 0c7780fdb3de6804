"""Time a token behind a long history. Decoding computes one token a step, and is what a reader waits for."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import closing
from itertools import pairwise
from statistics import median
from typing import Any

import torch
from transformers import DynamicCache
from transformers.generation.streamers import BaseStreamer

from kvchat.bench.history import Subject, cut_back, plain_attention, ratio, spread
from kvchat.engine import Engine, likeliest
from kvchat.session import Conversation

NEW_TOKENS = 32


def decode(subject: Subject) -> dict[str, Any]:
    """Seconds a token, greedy, behind the history: everything kept, 0.3 kept, transformers and llama.cpp."""
    conversation, ids, full = subject.conversation, subject.ids, subject.plain
    times: dict[str, list[float | None]] = {"keep_1.0": [], "keep_0.3": [], "transformers": [], "llama.cpp": []}
    for number in range(subject.rounds + 1):
        for name, keep_ratio in (("keep_1.0", 1.0), ("keep_0.3", 0.3)):
            with subject.keeping(keep_ratio):
                times[name].append(token_s(conversation, ids[-1], NEW_TOKENS))
                kept = conversation.stats()["num_kept"]
        times["transformers"].append(generate_s(conversation.engine, full, [*ids, ids[-1]], NEW_TOKENS))
        times["llama.cpp"].append(subject.llama.token_s([*ids, ids[-1]], NEW_TOKENS))
        if not number:  # a warm-up, in which llama.cpp reads the history
            times = {name: [] for name in times}
    spreads = {name: spread(values) for name, values in times.items()}
    return {
        "history_tokens": len(ids),
        "pairs": conversation.stats()["num_pairs"],
        "kept_pairs_at_0.3": kept,
        **{f"{name}_token_s": values for name, values in spreads.items()},
        **{
            f"speedup_at_{keep_ratio}_over_{name}": ratio(spreads[name], spreads[f"keep_{keep_ratio}"])
            for name in ("transformers", "llama.cpp")
            for keep_ratio in ("1.0", "0.3")
        },
        "llama.cpp_problem": subject.llama.problem,
    }


def token_s(conversation: Conversation, first: int, count: int) -> float:
    """Median gap between tokens of a greedy answer on a scratch tail; end-of-turn tokens do not end it."""
    cache, engine = conversation.residence.cache, conversation.engine
    with cache.scratch():
        logits = engine.forward(cache, [first])[-1]
        gaps: list[float] = []
        last = time.perf_counter()
        with closing(engine.decode(cache, logits, likeliest, (), lambda: len(gaps) >= count)) as tokens:
            for _ in tokens:
                now = time.perf_counter()
                gaps.append(now - last)
                last = now
    return median(gaps[1:])


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
            streamer=Clock(),
            do_sample=False,
            min_new_tokens=count,
            max_new_tokens=count,
            **{engine.model.cache_keyword: cache},
        )
    cut_back(cache, length)
    # The first two are the prompt and the token of the pass that took it in.
    return median(later - earlier for earlier, later in pairwise(times[2:]))
