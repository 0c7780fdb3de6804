"""Owns the model and the store, in one thread, and opens sessions.

After a turn's last visible token its caller goes on, and the thread seals; what was sealed is written when it idles.
Sessions that are open but not in use give way to the one that is (`balance.py`).
"""

from __future__ import annotations

import atexit
from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext, suppress
from datetime import datetime
from functools import partial
from pathlib import Path

from kvchat import probe
from kvchat.balance import Balance
from kvchat.cipher import Key
from kvchat.config import Config
from kvchat.engine import Engine, Stop
from kvchat.engines import Engines, Loader
from kvchat.errors import ConfigError, FingerprintMismatch, InputError, SessionExists, SessionNotFound
from kvchat.events import Listener, Notice
from kvchat.fingerprint import TEXT_FIELDS, fingerprint_difference
from kvchat.foreseeing import foresee
from kvchat.handle import Session
from kvchat.jobs import MEND_AFTER_S, SAVE_AFTER_S, Chore, Jobs, Owner, failure_notice
from kvchat.locks import SessionLock, held_elsewhere, kept_closed
from kvchat.model import load
from kvchat.pool import new_pool
from kvchat.portable import read_manifest, take_in
from kvchat.recode import recode
from kvchat.residence.host import HostedStore
from kvchat.residence.residence import Residence
from kvchat.residence.sealing import Ranker
from kvchat.residence.tiers import would_hold
from kvchat.session import Conversation
from kvchat.shelf import Shelf
from kvchat.store.shed import Allowance
from kvchat.store.store import SessionInfo
from kvchat.titling import Titler
from kvchat.unfinished import recover

EMBED_AFTER_S = 0.5
"""Further seconds after which vectors are made that the next question would wait for."""
PROBE_AFTER_S = 10.0
"""Further seconds after which the probe's answer is recorded: a chat that goes on pays nothing."""
TITLE_AFTER_S = 1.0
"""Further seconds after which sessions get titles."""


class Worker(Shelf):
    """Opens sessions and runs, in order, what their handles ask for.

    Args:
        config: all settings.
        listener: called in the worker's thread with the progress of work that belongs to no turn.
        loader, key: what loads a model, and what the store is encrypted with.

    Raises:
        StoreError: the database cannot be used.
    """

    def __init__(
        self, config: Config, listener: Listener | None = None, loader: Loader = load, *, key: Key | None = None
    ) -> None:
        self.config = config
        self.failure: Exception | None = None  # what went wrong in the background, for no session in particular
        self._open: dict[int, tuple[Conversation, int]] = {}
        chores: list[tuple[float, Chore]] = [(SAVE_AFTER_S, self._save), (0.0, self._foresee)]
        chores += [(MEND_AFTER_S, self._mend), (EMBED_AFTER_S, self._embed)]
        chores += [(PROBE_AFTER_S, self._probe), (TITLE_AFTER_S, self._title)]
        self.jobs = Jobs(listener, chores)
        self._locks: dict[int, SessionLock] = {}
        self._titler = Titler()
        self._engines = Engines(config.model, loader, self.jobs.tell)
        self._pool = new_pool()
        # The thread ends with the process: whatever is still to be saved must be saved before.
        atexit.register(self.close)
        try:
            self._store = self.jobs.call(lambda: self._open_store(key))
        except BaseException:
            self.close()
            raise
        self.jobs.put(lambda: self.jobs.in_background(self._make_room, self))

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
            SessionBusy: another process, or another worker, has it open.
        """
        conversation = self.jobs.call(lambda: self._open_conversation(name, model, system, rebuild, create))
        # Restoring overlaps with the user's typing; a turn sent before it is done waits for it.
        self.jobs.put(lambda: self.jobs.in_background(partial(self.balance.ready, conversation), conversation))
        return Session(self, conversation)

    def take_in(self, file: Path, name: str | None = None, model: str | None = None, rebuild: bool = False) -> Session:
        """Take a portable file into a new session; its KV too, if it is that of the model which is loaded.

        That is `model`, or the one that made the file if it is on this machine, or the configured one.

        Raises:
            InputError: the file is damaged. SessionExists: the name is taken.
            ModelError: no model can be loaded. CapacityError: its window is too small.
        """
        return Session(self, self.jobs.call(lambda: self._take_in(file, name, model, rebuild)))

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
        else:
            self.jobs.in_background(conversation.residence.save, conversation)
            self.balance.forget(conversation)
            self._locks.pop(conversation.info.id).release()

    # -- in the thread -----------------------------------------------------------------------------------------------

    def _open_store(self, key: Key | None) -> HostedStore:
        limits, path, held = self.config.store, self.config.store_path, partial(would_hold, self.config.compress)
        again, closed = lambda *what: recode(self._store, *what), partial(kept_closed, path)
        allowance = Allowance(limits.disk_budget, limits.min_free, held, again, self._opened, closed)
        store = HostedStore(path, allowance=allowance, key=key)
        self.balance = Balance(store, self.config, self._pool, self.jobs, self._conversations)
        return store

    def _opened(self, sessions: Collection[int]) -> set[int]:
        """The sessions that are open here, and those of the given ones that are elsewhere."""
        mine = self._locks.keys()
        return mine | held_elsewhere(self._store.file, set(sessions) - mine)

    def _make_room(self) -> Iterator[Notice]:
        """Bring the store within its limits: they may be lower now, and the disk fuller."""
        if freed := self._store.shed():
            yield Notice(
                f"{freed / 1e6:.1f} MB of saved KV were given up to keep to {self._store.room().limit}, those of the "
                "sessions not used for longest; text is kept, and KV computed again when it is needed"
            )

    def _close_store(self) -> None:
        self._save()
        for lock in self._locks.values():
            lock.release()
        owners: list[Owner] = [self, *self._conversations()]
        if hasattr(self, "_store"):
            self._store.close()
        for owner in owners:
            if notice := failure_notice(owner):
                self.jobs.tell(notice)

    def _save(self, stop: Stop | None = None) -> None:
        for one in self._conversations():
            self.jobs.in_background(partial(one.residence.save, stop), one)

    def _conversations(self) -> list[Conversation]:
        return [one for one, _ in self._open.values()]

    def _mend(self, stop: Stop) -> None:
        for one in filter(self.balance.is_whole, self._conversations()):
            one.engine.prepare(one.residence.cache)
            mend = partial(one.residence.mend, one.path, stop)
            self.jobs.in_spare_time(lambda: self.balance.held(one, mend()), f"{one.info.name}: computing lost KV")  # noqa: B023
        self._save(stop)

    def _probe(self, stop: Stop) -> None:
        for one in filter(self.balance.is_whole, self._conversations()):
            self.jobs.in_spare_time(partial(probe.record, one, stop), f"{one.info.name}: recording an answer")

    def _title(self, stop: Stop) -> None:
        for one in filter(self.balance.is_whole, self._conversations()) if self.config.tui.titles else ():
            self.jobs.in_spare_time(partial(self._titler.title, one, stop), f"{one.info.name}: giving it a title")

    def _foresee(self, _: Stop) -> None:
        foresee(self._store, self._conversations())

    def _embed(self, stop: Stop) -> None:
        for one in self._conversations():
            self.jobs.in_spare_time(partial(one.residence.embed_turns, one.path, stop), f"{one.info.name}: vectors")

    def _open_conversation(
        self, name: str | None, model: str | None, system: str | None, rebuild: bool, create: bool
    ) -> Conversation:
        info = self._find(name, create)
        if info and info.id in self._open:
            conversation, users = self._open[info.id]
            if rebuild or system is not None or model not in (None, conversation.engine.model.name):
                raise InputError(f"session {info.name!r} is open; close it before opening it in another way")
            self._open[info.id] = (conversation, users + 1)
            return conversation
        self._save()  # it may share messages with one that is open
        if info is None:
            engine = self._engines.get(model)
            engine.model.template.system(system)  # raises before anything is stored
            Ranker(engine.model, self.config.compress)
            name = f"{datetime.now():%Y-%m-%d-%H%M%S}" if name is None else name
            try:
                info = self._store.create_session(name, engine.model.name, engine.model.fingerprint)
            except SessionExists:  # begun by another process meanwhile
                info = self._store.session(name)
        with self._locked(info) as info:
            if system is not None and info.tip is not None:
                raise InputError(f"session {info.name!r} has its system prompt already; begin a new one for another")
            conversation = self._resume(info, self._engines.get(model or info.model), rebuild)
            if info.tip is None:
                conversation.begin(system)
        self._open[info.id] = (conversation, 1)
        return conversation

    @contextmanager
    def _locked(self, info: SessionInfo) -> Iterator[SessionInfo]:
        """Lock a session and give it as it is then; if what is done inside fails, let go again."""
        lock = SessionLock(self._store.file, info.id, info.name)
        try:
            yield self._store.session(info.name, info.id)
        except BaseException:
            lock.release()
            raise
        self._locks[info.id] = lock

    def _take_in(self, file: Path, name: str | None, model: str | None, rebuild: bool) -> Conversation:
        manifest = read_manifest(file)
        loaded = self._engines.for_file(manifest.model, model).model
        differing = fingerprint_difference(manifest.fingerprint, loaded.fingerprint)
        if differing:
            made = f"{file} was made with {manifest.model}; {loaded.name} as it is loaded now differs in "
            self.jobs.tell(Notice(f"{made}{', '.join(differing)}: only the text is taken over, and read again"))
        rebuild = rebuild or bool(differing)
        vocabulary = 1 << 32 if set(differing) & set(TEXT_FIELDS) else int(loaded.config.vocab_size)
        name = name or manifest.name
        info = take_in(self._store, file, manifest, name, loaded.name, kv=not rebuild, vocabulary=vocabulary)
        try:
            return self._open_conversation(name, loaded.name, None, rebuild, create=False)
        except BaseException:
            self._store.delete(name, info.id)
            raise

    def _find(self, name: str | None, create: bool) -> SessionInfo | None:
        if name is None:
            return self._store.last_session()
        with suppress(SessionNotFound) if create else nullcontext():
            return self._store.session(name)
        return None

    def _resume(self, info: SessionInfo, engine: Engine, rebuild: bool) -> Conversation:
        differing = fingerprint_difference(info.fingerprint, engine.model.fingerprint)
        if differing and not rebuild:
            raise FingerprintMismatch(
                f"session {info.name!r} was made with {info.model}; {engine.model.name} as it is loaded now differs in "
                f"{', '.join(differing)}: open it with that model and settings, or compute its KV again with --rebuild"
            )
        conversation = self._make(info, engine)
        retokenise = any(field in TEXT_FIELDS for field in differing)
        if not retokenise:
            recover(conversation)
        elif self._store.unfinished(info.id):  # its tokens say something else to this model
            self._store.clear_unfinished(info.id)
            self.jobs.tell(Notice(f"an unfinished answer of {info.name!r} cannot be read with another tokenizer"))
        if rebuild:
            conversation.rebuild(retokenise)
            # Last: until then the old fingerprint asks for the same again.
            self._store.set_model(info.name, engine.model.name, engine.model.fingerprint)
        return conversation

    def _make(self, info: SessionInfo, engine: Engine) -> Conversation:
        self._store.require_sound(info.name, info.tip)
        try:
            config = self.config.for_session(info.settings)
            residence = Residence(self._store, engine, config, self._pool, info.id)
        except (ConfigError, InputError) as error:
            if not info.settings:
                raise
            own = " ".join(f"{key}=" for key in info.settings)
            away = f"session {info.name!r} has settings of its own, which `kvchat set {info.name} {own}` takes away"
            raise ConfigError(f"{error} ({away})") from None
        return Conversation(info, self._store, engine, residence)
