"""`kvchat bench gpu`: one GPU, a model of Llama-3.1-8B's shape with random weights, a conversation of 65536 tokens.

Attention alone is measured over random rows; the rest through the path that a chat takes. Ceilings and baselines are
those of the same run.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from kvchat.bench.gpu import attention, ceilings, chat
from kvchat.bench.gpu.shape import LLAMA_8B, shaped
from kvchat.bench.history import Subject, measured, opened, ranked
from kvchat.bench.llama_cpp import no_server
from kvchat.bench.machine import machine
from kvchat.bench.recall import recall
from kvchat.config import Config
from kvchat.engine import Engine
from kvchat.errors import InputError
from kvchat.events import Listener
from kvchat.model import choose_device

TOKENS = 65536


def gpu(config: Config, listener: Listener | None, tokens: int, rounds: int) -> dict[str, Any]:
    """All figures.

    Raises:
        InputError: there is no CUDA device.
    """
    device = choose_device(config.model.device)
    if device.type != "cuda":
        raise InputError(f"this benchmark needs a CUDA device, and the model runs on {device}")
    limits = ceilings.ceilings(device)
    read = limits["read_bytes_per_s"]
    works: dict[str, Callable[[], dict[str, Any]]] = {
        "decode_attention": lambda: attention.decode_attention(read, attention.MEANS, device),
        "prefill_attention": lambda: attention.prefill_attention(device),
    }
    alone = measured(works, listener)
    return {"ceilings": limits, **alone, **conversation(config, LLAMA_8B, listener, tokens, rounds, read)}


def conversation(
    config: Config, shape: dict[str, Any], listener: Listener | None, tokens: int, rounds: int, read: float
) -> dict[str, Any]:
    """Figures of a conversation of so many tokens with a network of that shape."""
    engine = Engine(shaped(config.model, shape, listener), config.model.prefill_chunk_size, config.model.residence)
    weights = chat.allocated(engine)
    with TemporaryDirectory(prefix="kvchat-bench-") as folder, no_server() as llama:
        config = ranked(config.replaced({"compress.keep_ratio": chat.KEEP}), Path(folder) / "bench.db")
        with opened(config, engine) as (session, pool):
            subject = Subject(config, session, pool, rounds, llama)
            works: dict[str, Callable[[], dict[str, Any]]] = {
                "build": lambda: chat.build(session, tokens),
                "memory": lambda: chat.memory(subject, weights),
                "resume": lambda: chat.resume(subject, shape),
                "recall": lambda: recall(subject),
                "seal": lambda: chat.seal(subject, weights),
                "decode": lambda: chat.decode(subject, [session.num_tokens, tokens // 2, tokens // 8], read),
            }
            figures = measured(works, listener)
    return {**figures, "machine": machine(engine.model, config.model.attention)}
