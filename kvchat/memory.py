"""What "out of memory" is, on every device, and trying once more when it happens.

Work is tried in an `Attempt`, which ends it quietly where memory runs out. What the work held is let go before anything
else is done: a traceback keeps the variables of every frame that it passed through, tensors too.
"""

from __future__ import annotations

import ctypes
import gc
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

import torch

from kvchat.errors import OutOfMemory

Result = TypeVar("Result")

SAID = ("out of memory", "can't allocate memory", "not enough memory", "STATUS_ALLOC_FAILED")
"""How a RuntimeError says so: CUDA's runtime and MPS, torch's CPU allocator (two systems), the libraries of CUDA."""

MEMINFO = Path("/proc/meminfo")

CURE = (
    "lower compress.keep_ratio, choose a codec.name with fewer bits or a smaller model.prefill_chunk_size, "
    "or close other sessions and programs"
)


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether `error` says that memory ran out, or is what torch raises on the way back from that."""
    while isinstance(error, RuntimeError | MemoryError | OutOfMemory):
        if not isinstance(error, RuntimeError) or isinstance(error, torch.OutOfMemoryError):
            return True
        if any(words in str(error) for words in SAID):
            return True
        error = error.__cause__ or error.__context__  # of a capture, only that it is no longer valid
    return False


class Attempt:
    """A block that may run out of memory: it ends there, `failed` is set, and what was computed in it is let go."""

    def __init__(self, again: bool = False) -> None:
        self.again = again
        """Whether this is not the first."""
        self.failed: BaseException | None = None
        """What said that memory ran out."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if not is_out_of_memory(error):
            return False
        _let_go(error)
        self.failed = error
        return True


def twice(free: Callable[[], bool | None], doing: str, device: torch.device) -> Iterator[Attempt]:
    """Attempts at one piece of work, whose body begins with `with attempt:`; a second one only if the first fails.

    Args:
        free: called after each that failed, with nothing of it held any more. It lets go what can be made again, and
            gives False if the work cannot be tried again.
        doing: what the work is, for the message.
        device: whose memory it needs.

    Raises:
        OutOfMemory: both failed; what the last said, if that was such an error.
    """
    for again in (False, True):
        attempt = Attempt(again)
        yield attempt
        if attempt.failed is None:
            return
        if free() is False:
            break
    if isinstance(attempt.failed, OutOfMemory):
        raise OutOfMemory(str(attempt.failed))
    found = re.search(r"(?:tried to|unable to) allocate ([\d.]+ \w+)", str(attempt.failed), re.IGNORECASE)
    wanted = f", which needs {found[1]} more" if found else ""
    tried = ", after freeing what could be freed and trying once more"
    raise OutOfMemory(f"out of memory while {doing}{wanted}: {room(_where(attempt.failed, device))}{tried}; {CURE}")


def again(work: Callable[[], Result], free: Callable[[], bool | None], doing: str, device: torch.device) -> Result:
    """What `work` gives, tried as by `twice`."""
    for attempt in twice(free, doing, device):
        with attempt:
            return work()
    raise AssertionError("the last attempt raises")


def named(error: BaseException) -> BaseException:
    """An error as a caller gets it: if memory ran out where nothing handles that, one line says so."""
    if isinstance(error, OutOfMemory) or not is_out_of_memory(error):
        return error
    _let_go(error)
    device = torch.device("cuda" if torch.cuda.is_initialized() else "cpu")  # type: ignore[no-untyped-call]
    return OutOfMemory(f"out of memory: {room(_where(error, device))}; {CURE}")


def _where(error: BaseException | None, device: torch.device) -> torch.device:
    """Whose memory ran out: work on a device needs that of the CPU, too."""
    on_cpu = isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error)
    return torch.device("cpu") if on_cpu else device


def _let_go(error: BaseException | None) -> None:
    """Let go the frames that an error, and those before it, came through."""
    while error is not None:
        error = error.with_traceback(None).__context__


def release(device: torch.device) -> None:
    """Give back what nobody can reach, and what torch keeps at hand."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()


def trim(device: torch.device) -> None:
    """Give the system back what was freed: threads that pack frames leave gaps, which glibc else keeps."""
    if device.type == "cpu" and sys.platform == "linux":
        with suppress(AttributeError):  # another C library
            ctypes.CDLL(None).malloc_trim(0)


def room(device: torch.device) -> str:
    """How much memory is free on a device, for a message."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
    elif device.type == "cpu" and MEMINFO.exists():
        sizes = dict(re.findall(r"^(\w+): +(\d+) kB", MEMINFO.read_text("ascii"), re.MULTILINE))
        free, total = (int(sizes[name]) * 1024 for name in ("MemAvailable", "MemTotal"))
    else:
        return f"too little is free on {device}"
    return f"{free / 1e9:.2f} of {total / 1e9:.1f} GB are free on {device}"
