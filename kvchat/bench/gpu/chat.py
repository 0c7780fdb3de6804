"""A long conversation with a large model's shape on one GPU: memory, sealing, resuming, decoding."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from typing import Any

import torch

from kvchat.bench.decode import NEW_TOKENS, generate_s, token_s
from kvchat.bench.gpu.shape import read_bytes
from kvchat.bench.history import (
    RATIOS,
    WORDS,
    Subject,
    cut_back,
    drain,
    in_new_process,
    ratio,
    spread,
    timed,
)
from kvchat.bench.prefill import prefill_s
from kvchat.engine import Engine
from kvchat.session import Conversation

TURN_TOKENS = 300
SEALED_TOKENS = 2000
KEEP = 0.3


def words(source: random.Random, tokens: int) -> str:
    """About so many tokens."""
    return " ".join(source.choices(WORDS, k=max(1, tokens)))


def build(conversation: Conversation, tokens: int) -> dict[str, Any]:
    """Take in turns of about 300 tokens one by one, each settled; how memory went meanwhile."""
    source, rest, begun, turns = random.Random(0), [], time.perf_counter(), 0
    weights = allocated(conversation.engine)
    while conversation.num_tokens < tokens:
        pair = [{"role": role, "content": words(source, TURN_TOKENS // 2)} for role in ("user", "assistant")]
        drain(conversation.append(pair, lambda: False))
        drain(conversation.finish())
        turns += 1
        rest.append(allocated(conversation.engine) - weights - kept_bytes(conversation))
    conversation.save()  # a process of its own will read it
    return {
        "turns": turns,
        "tokens": conversation.num_tokens,
        "seconds": time.perf_counter() - begun,
        "beyond_kept_bytes": {f"turn_{at}": rest[at - 1] for at in sorted({1, len(rest) // 4 or 1, len(rest)})},
        "reserved_bytes": reserved(conversation.engine) - weights,
    }


def kept_bytes(conversation: Conversation) -> int:
    """Bytes of sealed rows, with their scales, and of the open tail."""
    cache = conversation.residence.cache
    tail = cache.tail_length * conversation.engine.model.pairs_per_token * conversation.engine.model.bytes_per_pair
    return int(cache.sealed_bytes + tail)


def memory(subject: Subject, weights: int) -> dict[str, Any]:
    """Bytes allocated beyond the weights, at rest and at the peak of coming there, by keep ratio."""
    engine, conversation, figures = subject.engine, subject.conversation, {}
    for keep_ratio in RATIOS:
        forget_peak(engine)
        with subject.keeping(keep_ratio):
            kept, now, peak = kept_bytes(conversation), allocated(engine) - weights, peak_allocated(engine) - weights
            figures[str(keep_ratio)] = {
                "kept_bytes": kept,
                "allocated_bytes": now,
                "peak_bytes": peak,
                "peak_over_kept": round(peak / kept, 3),
            }
    dense = conversation.num_tokens * engine.model.pairs_per_token * engine.model.bytes_per_pair
    return {"dense_bytes": dense, **figures}


def seal(subject: Subject, weights: int) -> dict[str, Any]:
    """Seconds to prefill a turn of 2000 tokens, to seal it and to write it, and the memory that sealing takes.

    A token is timed while the segment waits to be written and is packed in the background, and afterwards.
    """
    conversation, source = subject.conversation, random.Random(9)
    engine, residence = conversation.engine, conversation.residence
    times: dict[str, list[float]] = {
        name: [] for name in ("prefill_s", "seal_s", "packing_token_s", "save_s", "token_s")
    }
    for number in range(subject.rounds + 1):
        conversation.take([{"role": "user", "content": words(source, SEALED_TOKENS)}])
        prefilled = prefill_s(residence, residence.ids(conversation.path))
        forget_peak(engine)
        sealed = timed(lambda: drain(conversation.finish()), engine.model.device)
        peak = peak_allocated(engine) - weights - kept_bytes(conversation)
        meanwhile = token_s(conversation, 5, NEW_TOKENS)
        saved, alone = timed(conversation.save), token_s(conversation, 5, NEW_TOKENS)
        segment = conversation.stats()["segments"][-1]
        conversation.rewind(len(conversation.path) - 1)
        if number:
            for name, one in zip(times, (prefilled, sealed, meanwhile, saved, alone), strict=True):
                times[name].append(one)
    spreads = {name: spread(values) for name, values in times.items()}
    return {
        "segment_tokens": segment["end"] - segment["start"],
        **spreads,
        "seal_over_prefill": ratio(spreads["seal_s"], spreads["prefill_s"]),
        "packing_token_over_token": ratio(spreads["packing_token_s"], spreads["token_s"]),
        "peak_beyond_kept_bytes": peak,
    }


def resume(subject: Subject, shape: dict[str, Any]) -> dict[str, Any]:
    """Seconds to the first token behind the saved session in a new process whose weights are there already."""
    config = subject.config.model_dump(mode="json")
    request = {"kind": "resume", "config": config, "rounds": subject.rounds, "shape": shape}
    found = in_new_process({**request, "llama": None, "llama_problem": None})
    ttft, plain = spread(found["ttft_s"]), spread(found["transformers_ttft_s"])
    return {
        "cached_tokens": found["cached_tokens"],
        "prefilled_tokens": found["prefilled_tokens"],
        "first_ttft_s": found["first_ttft_s"],
        "ttft_s": ttft,
        "restore_s": spread(found["load_s"]),
        "transformers_prefill_s": plain,
        "ttft_over_transformers": ratio(ttft, plain),
    }


def decode(subject: Subject, lengths: Sequence[int], read_bytes_per_s: float) -> dict[str, Any]:
    """Seconds a token with 0.3 of the pairs kept, over the floor that reading weights and KV sets, and transformers'.

    The conversation is rewound from one length to the next.
    """
    conversation, engine, figures = subject.conversation, subject.engine, {}
    weights = read_bytes(engine.model.network)
    for length in sorted(lengths, reverse=True):
        rewind_to(conversation, length)
        cut_back(subject.plain, conversation.num_tokens)
        ours, plain, ids = [], [], subject.ids
        with subject.keeping(KEEP):
            kept = kept_bytes(conversation)
            for number in range(subject.rounds + 1):
                ours.append(token_s(conversation, ids[-1], 2 * NEW_TOKENS))
                plain.append(generate_s(engine, subject.plain, [*ids, ids[-1]], NEW_TOKENS))
                ours, plain = (ours, plain) if number else ([], [])
        floor = (weights + kept) / read_bytes_per_s
        mine, other = spread(ours), spread(plain)
        figures[str(len(ids))] = {
            "token_s": mine,
            "floor_s": floor,
            "over_floor": mine["median"] / floor if mine else None,
            "transformers_token_s": other,
            "speedup_over_transformers": ratio(other, mine),
            "kept_bytes": kept,
            "problem": engine.problem or None,
        }
    return {"weight_bytes": weights, **figures}


def rewind_to(conversation: Conversation, tokens: int) -> None:
    """Take back what lies beyond the first so many tokens, whole messages, settled."""
    bounds = conversation.residence.bounds(conversation.path)
    index = max(i for i, bound in enumerate(bounds) if bound <= max(tokens, bounds[2]))
    if index < len(conversation.path):
        conversation.rewind(index - (conversation.path[index - 1].role == "user"))
        drain(conversation.finish())


def allocated(engine: Engine) -> int:
    """Bytes that tensors hold on the device; 0 on a CPU."""
    return torch.cuda.memory_allocated(engine.model.device) if engine.model.device.type == "cuda" else 0


def peak_allocated(engine: Engine) -> int:
    """The most that `allocated` has been since `forget_peak`."""
    return torch.cuda.max_memory_allocated(engine.model.device) if engine.model.device.type == "cuda" else 0


def reserved(engine: Engine) -> int:
    """Bytes that the allocator has taken from the device."""
    return torch.cuda.memory_reserved(engine.model.device) if engine.model.device.type == "cuda" else 0


def forget_peak(engine: Engine) -> None:
    """Begin to count the peak anew."""
    if engine.model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(engine.model.device)
