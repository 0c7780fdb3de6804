"""The full-screen chat. Textual is imported when it starts, so that other commands do not wait for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from kvchat.config import Config
from kvchat.events import Listener

if TYPE_CHECKING:
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
    `system`, `model` and `rebuild` are those of `Worker.open`.
    """
    from kvchat.tui.app import ChatApp

    connect = worker if callable(worker) else lambda _: worker
    app = ChatApp(connect, config, name, system=system, model=model, rebuild=rebuild)
    app.run()
    app.leave(close=callable(worker))
