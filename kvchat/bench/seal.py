"""Time to seal a turn, from scoring until the next can begin, against prefilling it; it is written later."""

from __future__ import annotations

import random
from typing import Any

from kvchat.bench.history import WORDS, Subject, drain, ratio, spread, timed
from kvchat.bench.prefill import prefill_s
from kvchat.session import Conversation


def seal(subject: Subject) -> dict[str, Any]:
    """Seconds to seal a turn behind the history, until the next can begin, and to prefill the same turn."""
    conversation = subject.conversation
    prefills: list[float] = []
    seals: list[float] = []
    # The first round also seals what waited from the history; the others go back to where it ended.
    one_round(conversation, random.Random(100))
    for number in range(subject.rounds):
        prefilled, sealed = one_round(conversation, random.Random(101 + number))
        prefills.append(prefilled)
        seals.append(sealed)
        segment = conversation.stats()["segments"][-1]
        conversation.rewind(len(conversation.path) - 1)
    prefilled_s, sealed_s = spread(prefills), spread(seals)
    return {
        "history_tokens": conversation.num_tokens,
        "segment_tokens": segment["end"] - segment["start"],
        "prefill_s": prefilled_s,
        "seal_s": sealed_s,
        "seal_over_prefill": ratio(sealed_s, prefilled_s),
    }


def one_round(conversation: Conversation, source: random.Random) -> tuple[float, float]:
    """Add a turn that fills a segment; seconds to prefill and to seal it."""
    residence = conversation.residence
    text = " ".join(source.choices(WORDS, k=residence.config.compress.segment_min))
    conversation.take([{"role": "user", "content": text}])
    prefilled = prefill_s(residence, residence.ids(conversation.path))
    return prefilled, timed(lambda: drain(conversation.finish()), residence.engine.model.device)
