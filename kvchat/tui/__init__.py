"""The full-screen chat. Textual is imported when it starts, so that other commands do not wait for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from kvchat.config import Config
from kvchat.events import Listener
from kvchat.hangup import code_of, follow, mend_terminal, unfailing_screen

if TYPE_CHECKING:
    from kvchat.tui.app import ChatApp
    from kvchat.worker import Worker


def run(
    worker: Worker | Callable[[Listener], Worker],
    config: Config,
    name: str | None = None,
    *,
    system: str | None = None,
    model: str | None = None,
    rebuild: bool = False,
) -> None:
    """Chat in session `name` (None: the last one) until the user quits.

    Give a function that makes the worker: it is called behind the open window, so that nobody waits for torch, and its
    listener shows how far the model is loaded. That worker is closed here; a ready-made one is left to its owner.
    `system`, `model` and `rebuild` are those of `Worker.open`. If SIGHUP or SIGTERM ends it all is saved as well, and
    SystemExit raised.
    """
    import asyncio

    from kvchat.tui.app import ChatApp
    from kvchat.tui.heap import calm, set_aside

    connect = worker if callable(worker) else lambda _: worker
    app = ChatApp(set_aside(connect), config, name, system=system, model=model, rebuild=rebuild)
    mend_terminal()
    with unfailing_screen(), calm():
        ended_by = asyncio.run(_shown(app))
    app.leave(close=callable(worker))
    if ended_by:
        raise SystemExit(code_of(ended_by))


async def _shown(app: ChatApp) -> int:
    """Show the window until the user quits, or until a signal ends it, whose number this is then, else 0."""
    ended_by = 0

    def leave(number: int) -> None:
        nonlocal ended_by
        ended_by = number
        app.call_later(app.action_quit)

    follow(leave)
    await app.run_async()
    return ended_by
