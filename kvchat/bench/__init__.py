"""`kvchat bench`: speed and size as ratios, each figure with its baseline from the same run.

    resume   first token of a saved session in a new process, against prefilling its history with plain transformers
    decode   time a token behind a long history, against transformers' greedy `generate` with a DynamicCache
    prefill  tokens a second while reading, against transformers' forward passes over the same chunks
    store    bits an element and speed of every codec, bytes a token on disk, the store against a plain file
    memory   bytes of KV held against all of it, and what a process grows by when it resumes
    recall   bringing back turns of 8 segments before a question, against reading the question
    seal     sealing a turn, against prefilling it
    gpu      one GPU with a model of Llama-3.1-8B's shape: see `bench.gpu`; not a part of `all`
    tui      the screen while the engine works: lag, keys, first paint; see `bench.tui`; not a part of `all`
    tiers    many sessions under one cap on all KV, by three policies: see `bench.tiers`; not a part of `all`

The result is one JSON object. All benchmarks of a run share one model and one history, kvchat and its baselines take
turns in the same loop, and a figure is the median of its rounds with the least and the greatest. llama.cpp stands
beside transformers in `resume` and `decode` where the package xllamacpp is installed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from kvchat.bench.decode import decode
from kvchat.bench.gpu import TOKENS, gpu
from kvchat.bench.history import Subject, measured, prepared, ranked
from kvchat.bench.llama_cpp import no_server, serving
from kvchat.bench.machine import machine
from kvchat.bench.memory import memory
from kvchat.bench.prefill import prefill
from kvchat.bench.recall import recall
from kvchat.bench.resume import resume
from kvchat.bench.seal import seal
from kvchat.bench.store import store
from kvchat.bench.tiers import tiers
from kvchat.config import Config
from kvchat.engine import Engine
from kvchat.errors import InputError
from kvchat.events import Listener
from kvchat.model import load

# In this order: `seal`, the last, adds to the history.
KINDS: dict[str, Callable[[Subject], dict[str, Any]]] = {
    "resume": resume,
    "decode": decode,
    "prefill": prefill,
    "store": store,
    "memory": memory,
    "recall": recall,
    "seal": seal,
}


def run(
    kind: str,
    config: Config,
    listener: Listener | None = None,
    tokens: int | None = None,
    rounds: int = 5,
    messages: Sequence[Mapping[str, str]] | None = None,
    histories: Sequence[Sequence[Mapping[str, str]]] = (),
) -> dict[str, Any]:
    """Run one benchmark, or all of them one after the other.

    Args:
        kind: one of KINDS, "gpu", "tiers", "tui", or "all", which leaves these three out.
        config: the model and all settings; the store is a temporary one.
        listener: told of progress.
        tokens: about so long a history is made up; 6000, for "gpu" 65536, "tui" 2000, and each of "tiers" 2000.
        rounds: runs that medians are taken of.
        messages: a conversation to use as the history instead.
        histories: the same for "tiers", which has many.

    Returns:
        The figures of that benchmark, or of each under its name, and the machine.

    Raises:
        InputError: there is no such benchmark, or the measuring process fails.
        CapacityError: the window has no room for the history, or for a turn behind it.
    """
    if kind not in (*KINDS, "gpu", "tiers", "tui", "all"):
        raise InputError(f"there is no benchmark {kind!r}; known: all, {', '.join(KINDS)}, gpu, tiers, tui")
    if kind == "gpu":
        return {"bench": kind, **gpu(config, listener, tokens or TOKENS, rounds)}
    if kind == "tui":
        from kvchat.bench.tui import tui  # the others need no screen

        return {"bench": kind, **tui(config, listener, tokens or 2000, rounds)}
    engine = Engine(load(config.model, listener), config.model.prefill_chunk_size, config.model.residence)
    if kind == "tiers":
        figures = tiers(config, engine, listener, tokens or 2000, histories)
        return {"bench": kind, **figures, "machine": machine(engine.model, config.model.attention)}
    with tempfile.TemporaryDirectory(prefix="kvchat-bench-") as folder:
        config = ranked(config, Path(folder) / "bench.db")
        with prepared(config, engine, listener, tokens or 6000, messages) as (conversation, pool):
            room = conversation.num_tokens + 512
            wanted = kind in ("resume", "decode", "all")
            with serving(config.model.name, engine.model.device, room, listener) if wanted else no_server() as llama:
                subject = Subject(config, conversation, pool, rounds, llama)
                works = {name: partial(bench, subject) for name, bench in KINDS.items()}
                figures = measured(works, listener) if kind == "all" else works[kind]()
    return {"bench": kind, **figures, "machine": machine(engine.model, config.model.attention)}


def rows(figures: Mapping[str, Any], above: str = "") -> Iterator[dict[str, str]]:
    """The figures as lines of a table: a name and a value, medians with the least and the greatest of their runs."""
    for key, value in figures.items():
        if isinstance(value, dict) and value.keys() != {"median", "min", "max"}:
            yield from rows(value, f"{above}{key}.")
            continue
        if isinstance(value, dict):
            value = "{median:.4g} ({min:.4g} to {max:.4g})".format(**value)
        yield {"figure": above + key, "value": "" if value is None else str(value)}
