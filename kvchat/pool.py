"""Threads that decode and pack frames, mostly in functions that leave the interpreter to others."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import TypeVar

Result = TypeVar("Result")


def num_cores() -> int | None:
    """Cores that this process may use; None where the system does not tell."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def new_pool() -> ThreadPoolExecutor:
    """As many threads as there are cores, from two to eight."""
    return ThreadPoolExecutor(max(2, min(8, num_cores() or 2)), thread_name_prefix="kvchat-frames")


def submit(pool: Executor, work: Callable[[], Result]) -> Future[Result]:
    """Have work done by the pool; here and now when the interpreter is ending, and its pools with it."""
    try:
        return pool.submit(work)
    except RuntimeError:
        done: Future[Result] = Future()
        done.set_result(work())
        return done
