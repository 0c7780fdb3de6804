"""What a turn emits. Front ends consume one stream of these values and never touch the engine.

A turn is any number of `Progress`, `Notice` and `Delta`, then one `TurnDone`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any, Literal, TypeVar

FinishReason = Literal["stop", "length", "interrupted", "context"]
"""stop: the model ended its turn; length: max_new_tokens; interrupted: the user; context: the window is full."""

Phase = Literal["download", "convert", "load", "restore", "rebuild", "prefill", "import", "seal", "evaluate", "fit"]


@dataclass(frozen=True, slots=True)
class Progress:
    """`done` of `total` units of a phase; total 0 = unknown.

    A download counts bytes, an evaluation runs, a fit steps, all else tokens.
    """

    phase: Phase
    done: int
    total: int


@dataclass(frozen=True, slots=True)
class Notice:
    """One line that the user should see: a damaged segment was rebuilt, the window is nearly full."""

    text: str


@dataclass(frozen=True, slots=True)
class Delta:
    """A piece of the answer's text."""

    text: str


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of one turn. `prompt_tokens` = `cached_tokens` + `prefilled_tokens`, as measured by the cache."""

    prompt_tokens: int
    cached_tokens: int
    prefilled_tokens: int
    completion_tokens: int
    recalled: tuple[int, ...] = ()
    """Where the segments begin, in tokens, that came back into memory because the question concerns them."""


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds. `itl_s` holds each gap between consecutive tokens.

    `seal_s` is None when the turn is handed over, for sealing runs after the last visible token: `Session.settle` waits
    for it and `Session.stats` reports it.
    """

    load_s: float
    """Restoring saved segments before the first token of this turn."""
    ttft_s: float
    """From submitting the turn to its first non-empty text, restore and prefill included."""
    itl_s: tuple[float, ...]
    seal_s: float | None = None


@dataclass(slots=True)
class Draft:
    """A reply in the making: its ids, when each came, and when the first text could be shown."""

    submitted: float
    ids: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    first_text: float | None = None

    def timings(self, load_s: float) -> Timings:
        """Of the finished reply."""
        gaps = tuple(later - earlier for earlier, later in pairwise(self.times))
        return Timings(load_s, (self.first_text or time.perf_counter()) - self.submitted, gaps)


@dataclass(frozen=True, slots=True)
class TurnDone:
    """The end of a turn: its text is in the store, its KV follows."""

    text: str
    usage: Usage
    timings: Timings
    finish_reason: FinishReason

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready form."""
        return asdict(self)


Reply = TurnDone
"""What `Session.ask` returns."""

Event = Progress | Notice | Delta | TurnDone

Listener = Callable[[Progress | Notice], None]
"""Where work outside a turn (download, load, import, seal) reports."""

Step = TypeVar("Step")
Result = TypeVar("Result")


def followed(steps: Generator[Step, None, Result], listener: Callable[[Step], object]) -> Result:
    """What steps give in the end, the listener told of each."""
    while True:
        try:
            listener(next(steps))
        except StopIteration as finished:
            result: Result = finished.value
            return result
