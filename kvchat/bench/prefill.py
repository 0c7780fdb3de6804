"""Tokens a second while reading: from nothing, and behind the history."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

from transformers import DynamicCache

from kvchat.bench.history import WORDS, Spread, Subject, cut_back, drain, extend, plain_attention, ratio, spread, timed
from kvchat.residence.residence import Residence

FROM_NOTHING, BEHIND = 2048, 512
"""Tokens of a prefill: the beginning of the history, and a message behind it."""


def prefill(subject: Subject) -> dict[str, Any]:
    """Tokens a second of kvchat's prefill and of transformers', the same ids in the same chunks.

    Behind the history kvchat holds all of it, or the `keep_ratio` of the settings; transformers has all.
    """
    kept = subject.config.compress.keep_ratio
    beginning, message = subject.ids[:FROM_NOTHING], made_up_ids(subject)
    works: dict[str, Callable[[], float]] = {
        "from_nothing": lambda: ours_from_nothing(subject, beginning),
        "from_nothing_transformers": lambda: transformers_s(subject, beginning, behind=False),
        "behind_keep_1.0": lambda: ours_behind(subject, message, 1.0),
        f"behind_keep_{kept}": lambda: ours_behind(subject, message, kept),
        "behind_transformers": lambda: transformers_s(subject, message, behind=True),
    }
    speeds: dict[str, list[float]] = {name: [] for name in works}
    for number in range(subject.rounds + 1):
        for name, work in works.items():
            tokens = len(beginning if name.startswith("from_nothing") else message)
            speeds[name].append(tokens / work())
        if not number:  # a warm-up
            speeds = {name: [] for name in works}
    spreads = {name: spread(values) for name, values in speeds.items()}
    return {
        "history_tokens": len(subject.ids),
        "from_nothing_tokens": len(beginning),
        "behind_tokens": len(message),
        **{f"{name}_tokens_per_s": values for name, values in spreads.items()},
        **{f"{name}_over_transformers": over_transformers(name, spreads) for name in works if "transf" not in name},
    }


def over_transformers(name: str, speeds: dict[str, Spread | None]) -> float | None:
    """How many times as fast as transformers on the same ids."""
    return ratio(speeds[name], speeds[f"{name.partition('_keep')[0]}_transformers"])


def made_up_ids(subject: Subject) -> list[int]:
    """Ids of a message that would follow the history, BEHIND of them at most."""
    text = " ".join(random.Random(1).choices(WORDS, k=BEHIND))
    return list(subject.conversation.question(text)[:BEHIND])


def ours_from_nothing(subject: Subject, ids: Sequence[int]) -> float:
    """Seconds of `Residence.prefill` over an empty cache."""
    return prefill_s(Residence(subject.conversation.store, subject.engine, subject.config, subject.pool), ids)


def ours_behind(subject: Subject, ids: Sequence[int], keep_ratio: float) -> float:
    """Seconds of `Residence.prefill` behind the sealed history, of which so much is held."""
    residence = subject.conversation.residence
    with subject.keeping(keep_ratio), residence.cache.scratch():
        return prefill_s(residence, [*subject.ids, *ids])


def prefill_s(residence: Residence, ids: Sequence[int]) -> float:
    """Seconds to compute the ids that the cache does not stand for."""
    steps = residence.prefill(ids, len(ids), "prefill", lambda: False)
    return timed(lambda: drain(steps), residence.engine.model.device)


def transformers_s(subject: Subject, ids: Sequence[int], behind: bool) -> float:
    """Seconds of transformers' forward passes over the same chunks, with a DynamicCache."""
    engine = subject.engine
    cache = subject.plain if behind else DynamicCache(config=engine.model.network.config)
    length = cache.get_seq_length()
    with plain_attention(engine):
        seconds = timed(lambda: extend(engine, cache, ids), engine.model.device)
    cut_back(cache, length)
    return seconds
