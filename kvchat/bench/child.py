"""The measuring process of `resume` and `memory`: a request as JSON on stdin, the answer as the last line on stdout."""

from __future__ import annotations

import gc
import json
import sys
import time
from collections.abc import Sequence
from concurrent.futures import Executor
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

from kvchat.bench.gpu.shape import shaped
from kvchat.bench.history import drain, plain_attention, timed
from kvchat.bench.llama_cpp import LlamaCpp
from kvchat.config import Config
from kvchat.engine import Engine
from kvchat.events import TurnDone
from kvchat.model import load
from kvchat.pool import new_pool
from kvchat.residence.residence import Residence
from kvchat.sections import GenerateConfig
from kvchat.session import Conversation
from kvchat.store.store import Store

QUESTION = "What was the first thing that I told you?"


def main() -> None:
    """Answer one request."""
    request = json.load(sys.stdin)
    config = Config(**request["config"])
    shape = request.get("shape")
    model = shaped(config.model, shape) if shape else load(config.model)
    engine = Engine(model, config.model.prefill_chunk_size, config.model.residence)
    with new_pool() as pool:
        if request["kind"] == "memory":
            answer = measure_memory(config, engine, pool)
        else:
            llama = LlamaCpp(request["llama"], request["llama_problem"])
            answer = measure_resume(config, engine, pool, request["rounds"], llama)
    print(json.dumps(answer))


def opened(config: Config, engine: Engine, pool: Executor) -> Conversation:
    """The saved session, nothing of it in memory yet."""
    store = Store(config.store_path)
    return Conversation(store.session("bench"), store, engine, Residence(store, engine, config, pool))


def measure_resume(config: Config, engine: Engine, pool: Executor, rounds: int, llama: LlamaCpp) -> dict[str, Any]:
    """The saved session's first token, transformers' prefill of the same ids and llama.cpp's slot, in turn."""
    greedy = GenerateConfig(temperature=0, max_new_tokens=1)
    turns, plain, slot = [], [], []
    for _ in range(rounds):
        begun = time.perf_counter()
        conversation = opened(config, engine, pool)
        *_, done = conversation.send(QUESTION, greedy, lambda: False, begun)
        assert isinstance(done, TurnDone)
        turns.append(done)
        conversation.rewind(conversation.user_index(1))
        prompt = [*Residence.ids(conversation.path), *conversation.question(QUESTION)]
        conversation.store.close()
        plain.append(transformers_ttft(engine, prompt))
        slot.append(llama.ttft_s(prompt))
    return {
        "prefilled_tokens": turns[0].usage.prefilled_tokens,
        "cached_tokens": turns[0].usage.cached_tokens,
        "first_ttft_s": turns[0].timings.ttft_s,
        "ttft_s": [turn.timings.ttft_s for turn in turns],
        "load_s": [turn.timings.load_s for turn in turns],
        "transformers_ttft_s": plain,
        "llama.cpp_ttft_s": slot,
        "llama_problem": llama.problem,
    }


def transformers_ttft(engine: Engine, prompt: Sequence[int]) -> float:
    """Seconds that plain transformers takes to the first token of a prompt."""
    network, inputs = engine.model.network, torch.tensor([list(prompt)], device=engine.model.device)

    def work() -> None:
        cache = DynamicCache(config=network.config)
        logits = network(inputs, logits_to_keep=1, **{engine.model.cache_keyword: cache}).logits
        logits[0, -1].argmax().item()

    with plain_attention(engine), torch.inference_mode():
        return timed(work, engine.model.device)


def measure_memory(config: Config, engine: Engine, pool: Executor) -> dict[str, Any]:
    """By how much the process grows while it restores: at the peak and afterwards, beside the bytes of the KV."""
    conversation = opened(config, engine, pool)
    engine.forward(engine.new_cache(), [0])  # what the first pass allocates is not the history's
    gc.collect()
    before = resident_bytes()
    forget_peak()
    drain(conversation.restore())
    after, peak = resident_bytes(), peak_bytes()
    stats = conversation.stats()
    conversation.store.close()
    return {
        "restored_bytes": stats["bytes_in_memory"],
        "dense_bytes": stats["bytes_dense"],
        "process_bytes": after,
        "growth_bytes": after - before if after is not None and before is not None else None,
        "peak_growth_bytes": peak - before if peak is not None and before is not None else None,
    }


def resident_bytes() -> int | None:
    """Bytes of the process in memory; None where the system does not tell."""
    return _status("VmRSS")


def peak_bytes() -> int | None:
    """The most that `resident_bytes` has been; None where the system does not tell.

    Not `ru_maxrss`: a process that was just started inherits that of its parent on Linux.
    """
    return _status("VmHWM")


def _status(name: str) -> int | None:
    file = Path("/proc/self/status")
    lines = file.read_text("utf-8", "replace").splitlines() if file.is_file() else []
    found = next((line.split() for line in lines if line.startswith(f"{name}:")), None)
    return int(found[1]) * 1024 if found else None


def forget_peak() -> None:
    """Begin to count the peak anew, for loading the model took more; where that is not allowed it stays too high."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", "ascii")


if __name__ == "__main__":
    main()
