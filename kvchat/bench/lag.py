"""How long a program's window is held up: the lag of its event loop, and the delay of a key, by what goes on."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from time import perf_counter
from typing import Any, ClassVar

from textual import events
from textual.app import App
from textual.message import Message
from textual.widgets import TextArea

Figures = dict[str, Any]


class Meter:
    """Measures while `measuring`. `phase` names what goes on; any thread may set it."""

    EVERY_S: ClassVar[float] = 0.005
    """Between two looks at the loop."""
    KEY_EVERY_S: ClassVar[float] = 0.04
    """Between a key that was shown and the next."""
    LONGEST_S: ClassVar[float] = 10.0
    """That a key is waited for; then it counts as that long."""

    def __init__(self) -> None:
        self.phase = "start"
        self.types = True
        """Keys are pressed."""
        self._lags: defaultdict[str, list[float]] = defaultdict(list)
        self._keys: defaultdict[str, list[float]] = defaultdict(list)
        self._shown = asyncio.Event()

    def hook(self, message: Message) -> None:
        """To be given to `App.run_test`: it learns from it that the input changed."""
        if isinstance(message, TextArea.Changed):
            message.text_area.call_after_refresh(self._shown.set)

    @asynccontextmanager
    async def measuring(self, app: App[Any], prompt: TextArea) -> AsyncIterator[None]:
        """Measure `app`, whose `prompt` has the focus; two keys come in turn, so that it stays as it was."""
        tasks = [asyncio.create_task(self._look()), asyncio.create_task(self._type(app, prompt))]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def figures(self, phase: str) -> Figures:
        """What was measured in a phase, in milliseconds."""
        return {"lag_ms": percentiles(self._lags[phase]), "key_ms": percentiles(self._keys[phase])}

    async def _look(self) -> None:
        while True:
            begun, phase = perf_counter(), self.phase
            await asyncio.sleep(self.EVERY_S)
            self._lags[phase].append(max(0.0, perf_counter() - begun - self.EVERY_S))

    async def _type(self, app: App[Any], prompt: TextArea) -> None:
        while True:
            await asyncio.sleep(self.KEY_EVERY_S)
            if not self.types or not prompt.has_focus:
                continue
            begun, phase = perf_counter(), self.phase
            self._shown.clear()
            app.post_message(events.Key("backspace", None) if prompt.text else events.Key("x", "x"))
            with suppress(TimeoutError):
                await asyncio.wait_for(self._shown.wait(), self.LONGEST_S)
            self._keys[phase].append(perf_counter() - begun)


def percentiles(seconds: Sequence[float]) -> Figures | None:
    """In milliseconds; None if nothing was measured."""
    if not seconds:
        return None
    ordered = sorted(seconds)

    def at(part: float) -> float:
        return round(1000 * ordered[min(len(ordered) - 1, int(part * len(ordered)))], 2)

    return {"p50": at(0.5), "p99": at(0.99), "max": at(1.0), "number": len(ordered)}
