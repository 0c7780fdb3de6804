"""How quickly saved KV comes back on this machine, learnt from what happens anyway: nothing is run to find out.

disk     bytes a second of reading frames, by one thread, from the file or the system's cache of it
decode   bytes of frames a second that become rows: all threads together and, on a GPU, the copy to it, which overlaps
prefill  tokens a second of computing KV again

Each is a moving average, of which what happened first counts as a short while at a common machine's speed.
"""

from __future__ import annotations

from collections.abc import Mapping
from threading import Lock

from kvchat.utility import Costs

START = {"disk": 1e9, "decode": 2e8, "prefill": 500.0}
"""A second, until more is known."""
FIXED_S = 0.0005
"""Of every load, whatever its size: asking the store, and handing work to a thread."""
WEIGHT_S = 0.05
"""Seconds that the first figures count for."""
FADE = 0.95
"""What is left of what is known with every new figure."""
LEAST = 0.25
"""The part of a load's time that is decoding, at least, whatever its reads took: these overlap with it."""


class Bandwidths:
    """Safe from any thread."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._known = {name: (rate * WEIGHT_S, WEIGHT_S) for name, rate in START.items()}
        self._read_s = 0.0

    @property
    def read_s(self) -> float:
        """Seconds of all reads so far, of all threads."""
        return self._read_s

    def add_read(self, nbytes: int, seconds: float) -> None:
        """A frame was read from the store."""
        self._add("disk", nbytes, seconds)
        with self._lock:
            self._read_s += seconds

    def add_load(self, nbytes: int, seconds: float, read_s: float = 0.0) -> None:
        """Frames became rows in so many seconds, in `read_s` of which they were read."""
        self._add("decode", nbytes, max(seconds - read_s, LEAST * seconds))

    def add_prefill(self, tokens: int, seconds: float) -> None:
        """KV of tokens was computed."""
        self._add("prefill", tokens, seconds)

    def _add(self, name: str, amount: float, seconds: float) -> None:
        if amount <= 0 or seconds <= 0:
            return
        with self._lock:
            done, took = self._known[name]
            self._known[name] = (done * FADE + amount, took * FADE + seconds)

    def figures(self) -> dict[str, float]:
        """Each rate, a second."""
        with self._lock:
            return {name: done / took for name, (done, took) in self._known.items()}

    def costs(self) -> Costs:
        """As `utility` takes them."""
        return Costs(fixed_s=FIXED_S, **self.figures())


def told(figures: Mapping[str, float]) -> str:
    """As a line."""
    disk, decode = (figures[name] / 1e6 for name in ("disk", "decode"))
    return f"back from disk: {disk:.0f} MB/s and {decode:.0f} MB/s decoded, {figures['prefill']:.0f} tokens/s computed"
