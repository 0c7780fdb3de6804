"""What the device can do at most, measured beside the figures; and how to time what runs on it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor

_READ_BYTES = 4 << 30
_COPIED_BYTES = 256 << 20


def ceilings(device: torch.device) -> dict[str, Any]:
    """Bytes a second of reading device memory, and of copying from pinned host memory to the device."""
    free, _ = torch.cuda.mem_get_info(device)
    large = torch.ones(min(_READ_BYTES, free // 2) // 4, dtype=torch.float32, device=device)
    read_s = seconds([large.sum], graph=False)
    pinned = torch.ones(_COPIED_BYTES, dtype=torch.uint8, pin_memory=True)
    there = torch.empty_like(pinned, device=device)
    copy_s = seconds([lambda: there.copy_(pinned, non_blocking=True)], graph=False)
    return {"read_bytes_per_s": large.nbytes / read_s, "host_to_device_bytes_per_s": pinned.nbytes / copy_s}


def seconds(calls: Sequence[Callable[[], Tensor | None]], graph: bool = True, rounds: int = 20) -> float:
    """Seconds that the device takes for one of the calls, which are made in turn: the median of `rounds`.

    In a CUDA graph, so that what launching costs does not count; the calls must be fit for one then.
    """
    repeats = max(1, 24 // len(calls))
    run = _captured(calls, repeats) if graph else lambda: _in_turn(calls, repeats)
    run()
    times = []
    for _ in range(rounds):
        begin, end = torch.Event("cuda", enable_timing=True), torch.Event("cuda", enable_timing=True)
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return float(median(times)) / (repeats * len(calls))


def _in_turn(calls: Sequence[Callable[[], Tensor | None]], repeats: int) -> None:
    for _ in range(repeats):
        for call in calls:
            call()


def _captured(calls: Sequence[Callable[[], Tensor | None]], repeats: int) -> Callable[[], None]:
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # kernels are compiled
        _in_turn(calls, 1)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        _in_turn(calls, repeats)
    return graph.replay
