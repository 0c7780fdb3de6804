"""`kvchat.open` and `kvchat.open_async`: one session that owns its worker, and so its model and store."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from kvchat.asynchronous import AsyncSession
from kvchat.config import Config
from kvchat.events import Listener
from kvchat.handle import Session
from kvchat.keys import find_key
from kvchat.worker import Worker


def open_session(
    name: str | None = None,
    *,
    model: str | None = None,
    system: str | None = None,
    store: str | Path | None = None,
    config: str | Path | None = None,
    rebuild: bool = False,
    listener: Listener | None = None,
    settings: Mapping[str, Any] | None = None,
    passphrase: str | None = None,
) -> Session:
    """Resume the session `name` or begin it; it owns its model, and closing it frees both. Raises KVChatError.

    Args:
        name: the session; None = the last one used, or a new one.
        model: Hugging Face id, folder, GGUF file or built-in name; None = the session's own, or the configured one.
        system: system prompt of a new session.
        store, config: the database and the config.toml; None = the usual ones.
        rebuild: compute saved KV again, also with another model.
        listener: called, in another thread, with progress that belongs to no turn.
        settings: dotted settings on top of the file, as in {"compress.keep_ratio": 0.3}.
        passphrase: of the store, if it is encrypted, or to make a new one encrypted; None = the variable
            KVCHAT_PASSPHRASE, the keyring, or a prompt.
    """
    overrides = dict(settings or {}) | ({"store.path": str(store)} if store else {})
    loaded = Config.load(Path(config) if config else None, overrides)
    worker = Worker(loaded, listener, key=find_key(loaded.store_path, passphrase))
    try:
        session = worker.open(name, model=model, system=system, rebuild=rebuild)
    except BaseException:
        worker.close()
        raise
    session.on_close = worker.close
    return session


async def open_async(name: str | None = None, **options: Any) -> AsyncSession:
    """`open_session` for asyncio, with the same options."""
    return AsyncSession(await asyncio.to_thread(partial(open_session, name, **options)))
