"""An app that shows one modal screen and keeps what it gives back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from time import monotonic
from typing import Any

from textual.app import App
from textual.pilot import Pilot
from textual.screen import ModalScreen

NARROW, WIDE = (80, 24), (120, 40)


class Host(App[None]):
    """Pushes a screen over an empty one; `results` are what it was dismissed with."""

    def __init__(self, modal: ModalScreen[Any]) -> None:
        super().__init__()
        self.modal = modal
        self.results: list[Any] = []

    def on_mount(self) -> None:
        self.push_screen(self.modal, self.results.append)

    @property
    def shown(self) -> str:
        """All that is on the screen, line by line."""
        return "\n".join("".join(part.text for part in strip) for strip in self.screen._compositor.render_strips())

    @property
    def is_back(self) -> bool:
        """Whether no screen lies over the modal one."""
        return self.screen is self.modal


@asynccontextmanager
async def hosting(modal: ModalScreen[Any], size: tuple[int, int] = NARROW) -> AsyncIterator[tuple[Host, Pilot[None]]]:
    host = Host(modal)
    async with host.run_test(size=size) as pilot:
        yield host, pilot


async def wait_until(holds: Callable[[], Any], timeout: float = 30.0) -> None:
    """Let the app run until this is true."""
    end = monotonic() + timeout
    while not holds():
        assert monotonic() < end, "this never became true"
        await asyncio.sleep(0.01)
