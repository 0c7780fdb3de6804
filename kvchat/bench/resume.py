"""Time to the first token of a question after a saved history, in a new process whose model is loaded."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from statistics import median
from typing import Any

import torch
from transformers import DynamicCache

from kvchat.bench.history import plain_attention, prepared
from kvchat.config import Config, GenerateConfig
from kvchat.engine import Engine
from kvchat.errors import InputError
from kvchat.events import Listener, TurnDone
from kvchat.model import load
from kvchat.residence import Residence
from kvchat.session import Conversation
from kvchat.store import Store

QUESTION = "What was the first thing that I told you?"


def resume(
    config: Config,
    listener: Listener | None = None,
    tokens: int = 6000,
    rounds: int = 3,
    messages: Sequence[Mapping[str, str]] | None = None,
) -> dict[str, Any]:
    """Time to the first token of a question after a saved history, the model already loaded, in a new process."""
    with prepared(config, listener, tokens, messages) as conversation:
        saved = conversation.stats()
    request = {"config": config.model_dump(mode="json"), "rounds": rounds}
    child = subprocess.run(
        [sys.executable, "-m", "kvchat.bench.resume"],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        check=False,
    )
    if child.returncode:
        raise InputError(f"the measuring process failed: {child.stderr.strip().splitlines()[-1]}")
    measured = json.loads(child.stdout.splitlines()[-1])
    return {
        "history_tokens": saved["num_tokens"],
        "bytes_on_disk": saved["bytes_on_disk"],
        "keep_ratio": config.compress.keep_ratio,
        "codec": config.codec.name,
        **measured,
        "speedup": round(measured["transformers_ttft_s"] / measured["ttft_s"], 2),
    }


def measure_resume(config: Config, rounds: int) -> dict[str, Any]:
    """In the new process: the saved session's first token, then transformers' prefill of the same ids, alternating."""
    engine = Engine(load(config.model), config.model.prefill_chunk_size)
    greedy = GenerateConfig(temperature=0, max_new_tokens=1)
    ours, plain, turns = [], [], []
    with ThreadPoolExecutor(2) as pool:
        for _ in range(rounds):
            store = Store(config.store_path)
            residence = Residence(store, engine, config, pool)
            conversation = Conversation(store.session("bench"), store, engine, residence)
            *_, done = conversation.send(QUESTION, greedy, lambda: False, time.perf_counter())
            assert isinstance(done, TurnDone)
            turns.append(done)
            ours.append(done.timings.ttft_s)
            conversation.rewind(conversation.user_index(1))
            prompt = [*residence.ids(conversation.path), *conversation.question(QUESTION)]
            store.close()
            plain.append(transformers_ttft(engine, prompt))
    return {
        "prefilled_tokens": turns[0].usage.prefilled_tokens,
        "cached_tokens": turns[0].usage.cached_tokens,
        "ttft_s": median(ours),
        "first_ttft_s": ours[0],
        "load_s": median(turn.timings.load_s for turn in turns),
        "transformers_ttft_s": median(plain),
    }


def transformers_ttft(engine: Engine, prompt: Sequence[int]) -> float:
    """Seconds that plain transformers takes to the first token of a prompt."""
    network, inputs = engine.model.network, torch.tensor([list(prompt)], device=engine.model.device)
    with plain_attention(engine), torch.inference_mode():
        begun = time.perf_counter()
        logits = network(inputs, past_key_values=DynamicCache(config=network.config), logits_to_keep=1).logits
        logits[0, -1].argmax().item()
        return time.perf_counter() - begun


if __name__ == "__main__":
    asked = json.load(sys.stdin)
    print(json.dumps(measure_resume(Config(**asked["config"]), asked["rounds"])))
