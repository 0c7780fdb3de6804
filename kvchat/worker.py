"""One thread owns the model and the store; callers hand it work through a queue.

After a turn's last visible token its caller goes on, and the thread seals and saves. A turn sent meanwhile waits for
that. A failure in the background is raised by the next call, or told to the listener if there is none; it is never lost, and
the thread lives on.
"""

from __future__ import annotations

import asyncio
import atexit
import queue
import threading
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from kvchat.config import Config, ModelConfig
from kvchat.engine import Engine
from kvchat.errors import FingerprintMismatch, InputError, SessionNotFound
from kvchat.events import Event, Listener, Notice
from kvchat.handle import AsyncSession, Session
from kvchat.model import TEXT_FIELDS, Model, fingerprint_difference, load
from kvchat.residence import Residence
from kvchat.session import Conversation
from kvchat.store import SearchHit, SessionInfo, Store

Result = TypeVar("Result")
Job = Callable[[], None]
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
        self._load = loader
        self._listen: Listener = listener or (lambda event: None)
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._open: dict[int, tuple[Conversation, int]] = {}
        self._engines: dict[str, Engine] = {}
        self._failure: Exception | None = None
        self._pool = ThreadPoolExecutor(2, thread_name_prefix="kvchat-decode")
        self._thread = threading.Thread(target=self._run, name="kvchat", daemon=True)
        self._thread.start()
        # A daemon thread ends with the process: whatever is still to be saved must be saved before.
        atexit.register(self.close)
        try:
            self._store = self.call(lambda: Store(config.store_path))
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
        conversation = self.call(lambda: self._open_conversation(name, model, system, rebuild, create))
        # Restoring overlaps with the user's typing; a turn sent before it is done waits for it.
        self._jobs.put(lambda: self._in_background(conversation.residence.restore(conversation.path)))
        return Session(self, conversation)

    def sessions(self) -> list[SessionInfo]:
        """All sessions, the last used first."""
        return self.call(lambda: self._store.sessions())

    def search(self, text: str) -> list[SearchHit]:
        """Messages with all the words."""
        return self.call(lambda: self._store.search(text))

    def rename(self, name: str, new: str) -> None:
        """Give a session another name."""
        self.call(lambda: self._rename(name, new))

    def delete(self, name: str) -> None:
        """Delete a session for good; InputError while it is open."""
        self.call(lambda: self._delete(name))

    def close(self) -> None:
        """Finish what is under way, save, and end the thread."""
        atexit.unregister(self.close)
        if self._thread.is_alive():
            self._jobs.put(None)
            self._thread.join()
        self._pool.shutdown()

    # -- for handles -------------------------------------------------------------------------------------------------

    def call(self, work: Callable[[], Result]) -> Result:
        """Run `work` in the thread, after all that was asked before, and wait for its result."""
        future: Future[Result] = Future()

        def job() -> None:
            try:
                self._raise_failure()
                future.set_result(work())
            except Exception as error:  # a process edge: the caller gets it
                future.set_exception(error)

        self._submit(job)
        return future.result()

    def stream(
        self, work: Callable[[], Iterator[Event]], after: Callable[[], Generator[Event, None, None]]
    ) -> Iterator[Event]:
        """Run a turn in the thread; its events are given out as they come. `after` runs when the last was taken."""
        events: queue.SimpleQueue[Event | Exception | None] = queue.SimpleQueue()

        def job() -> None:
            try:
                self._raise_failure()
                for event in work():
                    events.put(event)
                events.put(None)
            except Exception as error:  # a process edge: the caller gets it
                events.put(error)
            self._in_background(after())

        self._submit(job)
        return _drain(events)

    def release(self, conversation: Conversation) -> None:
        """A handle was closed; the last one lets the conversation's memory go."""
        _, users = self._open.pop(conversation.info.id)
        if users > 1:
            self._open[conversation.info.id] = (conversation, users - 1)

    def report(self, event: Event) -> None:
        """Tell the listener."""
        self._listen(event)  # type: ignore[arg-type]

    def background(self, work: Callable[[], Generator[Event, None, None]]) -> None:
        """Run `work` in the thread without waiting for it."""
        self._submit(lambda: self._in_background(work()))

    # -- in the thread -----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while job := self._jobs.get():
            job()
        if self._failure is not None:  # nobody has asked for anything since
            self._listen(Notice(f"saving failed: {type(self._failure).__name__}: {self._failure}"))
        if hasattr(self, "_store"):
            self._store.close()

    def _submit(self, job: Job) -> None:
        if not self._thread.is_alive():
            raise InputError("this session is closed; open it again")
        self._jobs.put(job)

    def _in_background(self, steps: Iterator[Event]) -> None:
        try:
            for event in steps:
                self.report(event)
        except Exception as error:  # a process edge: raised by the next call
            if self._failure is not None:
                self._listen(Notice(f"saving failed: {type(error).__name__}: {error}"))
            self._failure = self._failure or error

    def _raise_failure(self) -> None:
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def _open_conversation(
        self, name: str | None, model: str | None, system: str | None, rebuild: bool, create: bool
    ) -> Conversation:
        info = self._find(name, create)
        if info is not None and info.id in self._open:
            conversation, users = self._open[info.id]
            self._open[info.id] = (conversation, users + 1)
            return conversation
        engine = self._engine(model or (info.model if info else self.config.model.name))
        if info is None:
            name = f"{datetime.now():%Y-%m-%d-%H%M%S}" if name is None else name
            conversation = self._make(
                self._store.create_session(name, engine.model.name, engine.model.fingerprint), engine
            )
            conversation.begin(system)
        else:
            if system is not None and info.tip is not None:
                raise InputError(f"session {info.name!r} has its system prompt already; begin a new one for another")
            conversation = self._resume(info, engine, rebuild)
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
                f"{', '.join(differing)}: open it with that model and settings, or give --rebuild to compute its KV again"
            )
        conversation = self._make(info, engine)
        if rebuild:
            self._store.set_model(info.name, engine.model.name, engine.model.fingerprint)
            conversation.rebuild(retokenise=any(field in TEXT_FIELDS for field in differing))
        return conversation

    def _make(self, info: SessionInfo, engine: Engine) -> Conversation:
        return Conversation(info, self._store, engine, Residence(self._store, engine, self.config, self._pool))

    def _engine(self, name: str) -> Engine:
        if name not in self._engines:
            settings = self.config.model.model_copy(update={"name": name})
            self._engines[name] = Engine(self._load(settings, self._listen), settings.prefill_chunk_size)
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


def _drain(events: queue.SimpleQueue[Event | Exception | None]) -> Iterator[Event]:
    while (event := events.get()) is not None:
        if isinstance(event, Exception):
            raise event
        yield event


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
