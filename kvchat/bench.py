"""`kvchat bench`: speed as ratios, each figure with its baseline from the same run, medians of several rounds.

    resume   first token of a saved session in a new process, against prefilling its history with plain transformers
    decode   time a token behind a long history, against transformers' greedy `generate` with a DynamicCache
    seal     sealing a segment, against prefilling it

Prefill is how most tokens enter the cache, many at once; decode computes one token a step, and is what a reader waits for.
The result is one JSON object.
"""

from __future__ import annotations

import json
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from transformers import DynamicCache

from kvchat.config import Config, GenerateConfig
from kvchat.engine import Engine
from kvchat.errors import InputError
from kvchat.events import Listener, TurnDone
from kvchat.model import load
from kvchat.residence import Residence
from kvchat.sealing import rank_turns
from kvchat.session import Conversation
from kvchat.store import Store

QUESTION = "What was the first thing that I told you?"
WORDS = (
    "I we they you she river market engine window garden teacher morning winter number letter music travel paint build "
    "remember forget carry open close answer question small large quiet bright early late always never perhaps because "
    "while before after under over with without to from and or but the a this that every"
).split()


def run(kind: str, config: Config, listener: Listener | None = None, **options: Any) -> dict[str, Any]:
    """Run one benchmark: "resume", "decode" or "seal".

    Args:
        config: the model and all settings; the store is a temporary one.
        listener: told of progress.
        options: `tokens` of history, `rounds` to take medians of, `messages` to use instead of made-up ones.
    """
    benches: dict[str, Callable[..., dict[str, Any]]] = {"resume": resume, "decode": decode, "seal": seal}
    if kind not in benches:
        raise InputError(f"there is no benchmark {kind!r}; known: {', '.join(benches)}")
    with tempfile.TemporaryDirectory(prefix="kvchat-bench-") as folder:
        store = config.store.model_copy(update={"path": str(Path(folder) / "bench.db")})
        figures = benches[kind](config.model_copy(update={"store": store}), listener, **options)
    return {"bench": kind, **figures, "machine": machine()}


def machine() -> dict[str, Any]:
    """What the figures were taken on."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "cpu": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


# -- resume ------------------------------------------------------------------------------------------------------------


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
        [sys.executable, "-m", "kvchat.bench"], input=json.dumps(request), capture_output=True, text=True, check=False
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


# -- decode ------------------------------------------------------------------------------------------------------------


def decode(
    config: Config,
    listener: Listener | None = None,
    tokens: int = 4000,
    rounds: int = 5,
    messages: Sequence[Mapping[str, str]] | None = None,
    new_tokens: int = 48,
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
        for _ in range(rounds):
            for name, compress in (("keep_1.0", whole), ("keep_0.3", small)):
                conversation.residence.config = config.model_copy(update={"compress": compress})
                conversation.residence.hold(conversation.path)
                times[name].append(token_s(conversation, ids[-1], new_tokens))
            times["transformers"].append(generate_s(conversation.engine, full, ids, new_tokens))
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
        gaps, last = [], time.perf_counter()
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

    class Clock(transformers.generation.streamers.BaseStreamer):  # type: ignore[misc]
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
    return median(later - earlier for earlier, later in zip(times[2:], times[3:], strict=False))


# -- seal --------------------------------------------------------------------------------------------------------------


def seal(
    config: Config,
    listener: Listener | None = None,
    tokens: int = 3000,
    rounds: int = 5,
    messages: Sequence[Mapping[str, str]] | None = None,
) -> dict[str, Any]:
    """Seconds to seal one segment behind a history, score to rows in place, and to prefill the same tokens."""
    prefills, seals, scores = [], [], []
    with prepared(config, listener, tokens, messages) as conversation:
        residence, path = conversation.residence, conversation.path
        count = config.compress.segment_min
        for number in range(rounds):
            text = " ".join(message["content"] for message in made_up(count, seed=100 + number))
            begun = time.perf_counter()
            conversation.take([{"role": "user", "content": text}])
            ids = residence.ids(conversation.path)
            for _ in residence.prefill(ids, len(ids), "prefill", lambda: False):
                pass
            prefills.append(time.perf_counter() - begun)
            begun = time.perf_counter()
            first = residence.bounds(path).index(residence.cache.tail_start)
            for _ in rank_turns(
                conversation.engine, residence.cache, conversation.path, first, len(conversation.path), config.compress
            ):
                pass
            scores.append(time.perf_counter() - begun)
            begun = time.perf_counter()
            for _ in residence.settle(conversation.path):
                pass
            seals.append(time.perf_counter() - begun)
            path = conversation.path
    ratios = [seal / prefill for seal, prefill in zip(seals, prefills, strict=True)]
    return {
        "history_tokens": tokens,
        "prefill_s": median(prefills),
        "score_s": median(scores),
        "seal_s": median(seals),
        "seal_over_prefill": round(median(ratios), 3),
    }


# -- what they share ---------------------------------------------------------------------------------------------------


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


if __name__ == "__main__":
    asked = json.load(sys.stdin)
    print(json.dumps(measure_resume(Config(**asked["config"]), asked["rounds"])))
