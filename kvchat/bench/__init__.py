"""`kvchat bench`: speed as ratios, each figure with its baseline from the same run, medians of several rounds.

    resume   first token of a saved session in a new process, against prefilling its history with plain transformers
    decode   time a token behind a long history, against transformers' greedy `generate` with a DynamicCache
    seal     sealing a turn, against prefilling it

The result is one JSON object.
"""

from __future__ import annotations

import platform
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from kvchat.bench.decode import decode
from kvchat.bench.resume import resume
from kvchat.bench.seal import seal
from kvchat.config import Config
from kvchat.errors import InputError
from kvchat.events import Listener


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
