"""Owns the model and the store, in one thread, and opens sessions.

After a turn's last visible token its caller goes on, and the thread seals and saves. A turn sent meanwhile waits for
that.
"""

from __future__ import annotations

import asyncio
import atexit
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from kvchat.config import Config, ModelConfig
from kvchat.download import BUILTIN
from kvchat.engine import Engine
from kvchat.errors import FingerprintMismatch, InputError, SessionNotFound
from kvchat.events import Listener
from kvchat.handle import AsyncSession, Session
from kvchat.jobs import Jobs, failure_notice
from kvchat.model import TEXT_FIELDS, Model, fingerprint_difference, load
from kvchat.residence import Residence
from kvchat.session import Conversation
from kvchat.store import SearchHit, SessionInfo, Store

Loader = Callable[[ModelConfig, Listener], Model]


class Worker:
    """Opens sessions and runs, in order, what their handles ask for.

    Args:
        config: all settings.
        listener: called in the worker's thread with the progress of work that belongs to no turn.
        loader: what loads a model.

    Raises:
        StoreError: the database cannot be used.
    """

    def __init__(self, config: Config, listener: Listener | None = None, loader: Loader = load) -> None:
        self.config = config
        self.jobs = Jobs(listener)
        self._load = loader
        self._open: dict[int, tuple[Conversation, int]] = {}
        self._engines: dict[str, Engine] = {}
        self._pool = ThreadPoolExecutor(2, thread_name_prefix="kvchat-decode")
        # The thread ends with the process: whatever is still to be saved must be saved before.
        atexit.register(self.close)
        try:
            self._store = self.jobs.call(lambda: Store(config.store_path))
        except BaseException:
            self.close()
            raise

    # -- for front ends ----------------------------------------------------------------------------------------------

    def open(
        self,
        name: str | None = None,
        *,
        model: str | None = None,
        system: str | None = None,
        rebuild: bool = False,
        create: bool = True,
    ) -> Session:
        """Resume a session or begin one; None = the last one used, or a new one named by the date.

        Raises:
            ModelError: the model cannot be loaded.
            FingerprintMismatch: the session was made by another model, and `rebuild` is not set.
            SessionNotFound: there is none of that name and `create` is not set.
        """
        conversation = self.jobs.call(lambda: self._open_conversation(name, model, system, rebuild, create))

        # Restoring overlaps with the user's typing; a turn sent before it is done waits for it.
        self.jobs.put(lambda: self.jobs.in_background(conversation.restore, conversation))
        return Session(self, conversation)

    def sessions(self) -> list[SessionInfo]:
        """All sessions, the last used first."""
        return self.jobs.call(lambda: self._store.sessions())

    def search(self, text: str) -> list[SearchHit]:
        """Messages with all the words."""
        return self.jobs.call(lambda: self._store.search(text))

    def rename(self, name: str, new: str) -> None:
        """Give a session another name."""
        self.jobs.call(lambda: self._rename(name, new))

    def delete(self, name: str) -> None:
        """Delete a session for good; InputError while it is open."""
        self.jobs.call(lambda: self._delete(name))

    def close(self) -> None:
        """Finish what is under way, save, and end the thread."""
        atexit.unregister(self.close)
        with suppress(InputError):  # closed already
            self.jobs.put(self._close_store)
        self.jobs.close()
        self._pool.shutdown()

    # -- for handles -------------------------------------------------------------------------------------------------

    def release(self, conversation: Conversation) -> None:
        """A handle was closed; the last one lets the conversation's memory go."""
        _, users = self._open.pop(conversation.info.id)
        if users > 1:
            self._open[conversation.info.id] = (conversation, users - 1)

    # -- in the thread -----------------------------------------------------------------------------------------------

    def _close_store(self) -> None:
        for conversation, _ in self._open.values():
            if notice := failure_notice(conversation):
                self.jobs.tell(notice)
        if hasattr(self, "_store"):
            self._store.close()

    def _open_conversation(
        self, name: str | None, model: str | None, system: str | None, rebuild: bool, create: bool
    ) -> Conversation:
        info = self._find(name, create)
        if info is not None and info.id in self._open:
            conversation, users = self._open[info.id]
            if rebuild or system is not None or model not in (None, conversation.engine.model.name):
                raise InputError(f"session {info.name!r} is open; close it before opening it in another way")
            self._open[info.id] = (conversation, users + 1)
            return conversation
        engine = self._engine(model or (info.model if info else self.config.model.name))
        if info is None:
            name = f"{datetime.now():%Y-%m-%d-%H%M%S}" if name is None else name
            engine.model.template.system(system)  # raises before anything is stored
            conversation = self._make(
                self._store.create_session(name, engine.model.name, engine.model.fingerprint), engine
            )
            conversation.begin(system)
        else:
            if system is not None and info.tip is not None:
                raise InputError(f"session {info.name!r} has its system prompt already; begin a new one for another")
            conversation = self._resume(info, engine, rebuild)
            if info.tip is None:
                conversation.begin(system)
        self._open[conversation.info.id] = (conversation, 1)
        return conversation

    def _find(self, name: str | None, create: bool) -> SessionInfo | None:
        if name is None:
            return self._store.last_session()
        try:
            return self._store.session(name)
        except SessionNotFound:
            if create:
                return None
            raise

    def _resume(self, info: SessionInfo, engine: Engine, rebuild: bool) -> Conversation:
        differing = fingerprint_difference(info.fingerprint, engine.model.fingerprint)
        if differing and not rebuild:
            raise FingerprintMismatch(
                f"session {info.name!r} was made with {info.model}; {engine.model.name} as it is loaded now differs in "
                f"{', '.join(differing)}: open it with that model and settings, or compute its KV again with --rebuild"
            )
        conversation = self._make(info, engine)
        if rebuild:
            conversation.rebuild(retokenise=any(field in TEXT_FIELDS for field in differing))
            # Last: until then the old fingerprint asks for the same again.
            self._store.set_model(info.name, engine.model.name, engine.model.fingerprint)
        return conversation

    def _make(self, info: SessionInfo, engine: Engine) -> Conversation:
        return Conversation(info, self._store, engine, Residence(self._store, engine, self.config, self._pool))

    def _engine(self, name: str) -> Engine:
        name = name or BUILTIN
        if name not in self._engines:
            settings = self.config.model.model_copy(update={"name": name})
            engine = Engine(self._load(settings, self.jobs.tell), settings.prefill_chunk_size)
            self._engines[name] = self._engines.setdefault(engine.model.name, engine)
        return self._engines[name]

    def _rename(self, name: str, new: str) -> None:
        self._store.rename(name, new)
        info = self._store.session(new)
        if info.id in self._open:
            self._open[info.id][0].info = info

    def _delete(self, name: str) -> None:
        if self._store.session(name).id in self._open:
            raise InputError(f"session {name!r} is open; close it before deleting it")
        self._store.delete(name)


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
    """
    overrides = dict(settings or {}) | ({"store.path": str(store)} if store else {})
    worker = Worker(Config.load(Path(config) if config else None, overrides), listener)
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
