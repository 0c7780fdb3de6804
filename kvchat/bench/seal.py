"""Time to seal a turn, from scoring to the commit, against prefilling it."""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from kvchat.bench.history import WORDS, prepared
from kvchat.config import Config
from kvchat.events import Listener


def seal(
    config: Config,
    listener: Listener | None = None,
    tokens: int = 3000,
    rounds: int = 5,
    messages: Sequence[Mapping[str, str]] | None = None,
) -> dict[str, Any]:
    """Seconds to seal a turn behind a history, from scoring to the commit, and to prefill the same turn."""
    prefills: list[float] = []
    seals: list[float] = []
    with prepared(config, listener, tokens, messages) as conversation:
        residence, count = conversation.residence, config.compress.segment_min
        for number in range(rounds + 1):
            text = " ".join(random.Random(100 + number).choices(WORDS, k=count))
            conversation.take([{"role": "user", "content": text}])
            ids, begun = residence.ids(conversation.path), time.perf_counter()
            for _ in residence.prefill(ids, len(ids), "prefill", lambda: False):
                pass
            prefills.append(time.perf_counter() - begun)
            begun = time.perf_counter()
            for _ in conversation.finish():
                pass
            seals.append(time.perf_counter() - begun)
        sizes = [segment["end"] - segment["start"] for segment in conversation.stats()["segments"][-rounds:]]
    # The first round also seals what waited from the history.
    ratios = [one / other for one, other in zip(seals[1:], prefills[1:], strict=True)]
    return {
        "history_tokens": tokens,
        "segment_tokens": median(sizes),
        "prefill_s": median(prefills[1:]),
        "seal_s": median(seals[1:]),
        "seal_over_prefill": round(median(ratios), 3),
    }
