"""`kvchat bench gpu`: one GPU, a model of Llama-3.1-8B's shape with random weights, a conversation of 65536 tokens.

Attention alone is measured over random rows; the rest through the path that a chat takes. Ceilings and baselines are
those of the same run.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from kvchat.bench.gpu import chat
from kvchat.bench.gpu.shape import LLAMA_8B, shaped
from kvchat.bench.history import Subject, opened, ranked
from kvchat.bench.llama_cpp import no_server
from kvchat.bench.machine import machine
from kvchat.config import Config
from kvchat.engine import Engine
from kvchat.errors import InputError, KVChatError
from kvchat.events import Listener, Notice
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
    from kvchat.bench.gpu import attention, ceilings

    limits = ceilings.ceilings(device)
    read = limits["read_bytes_per_s"]
    tell(listener, "decode attention")
    figures: dict[str, Any] = {"ceilings": limits}
    figures["decode_attention"] = attention.decode_attention(read, attention.MEANS, device)
    tell(listener, "prefill attention")
    figures["prefill_attention"] = attention.prefill_attention(device)
    figures |= conversation(config, LLAMA_8B, listener, tokens, rounds, read)
    return figures


def conversation(
    config: Config, shape: dict[str, Any], listener: Listener | None, tokens: int, rounds: int, read: float
) -> dict[str, Any]:
    """Figures of a conversation of so many tokens with a network of that shape."""
    tell(listener, "making the network")
    engine = Engine(shaped(config.model, shape, listener), config.model.prefill_chunk_size, config.model.residence)
    weights, figures = chat.allocated(engine), dict[str, Any]()
    with TemporaryDirectory(prefix="kvchat-bench-") as folder, no_server() as llama:
        config = ranked(config.replaced({"compress.keep_ratio": chat.KEEP}), Path(folder) / "bench.db")
        with opened(config, engine) as (session, pool):
            subject = Subject(config, session, pool, rounds, llama)
            works: dict[str, Callable[[], dict[str, Any]]] = {
                "build": lambda: chat.build(session, tokens),
                "memory": lambda: chat.memory(subject, weights),
                "seal": lambda: chat.seal(subject, weights),
                "resume": lambda: chat.resume(subject, shape),
                "decode": lambda: chat.decode(subject, [session.num_tokens, tokens // 2, tokens // 8], read),
            }
            for name, work in works.items():
                tell(listener, name)
                try:
                    figures[name] = work()
                except KVChatError as error:
                    figures[name] = {"problem": str(error)}
    return {**figures, "machine": machine(engine.model, config.model.attention)}


def tell(listener: Listener | None, what: str) -> None:
    """Say what is measured now."""
    if listener:
        listener(Notice(f"measuring {what}"))
