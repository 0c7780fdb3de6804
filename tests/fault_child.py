"""The program that `tests/test_faults.py` disturbs. For each line of stdin, a JSON list of orders, it forks one child
an order; together they live through `LIFE`, or a part of it, each on the store that it is given.

A child says what happens on stdout, its number first: `done STEP` when a step has returned, `answer TIP TEXT` for an
answer that it got, `error TYPE TEXT` for a mistake that kvchat explains, `broken ...` for any other, `now` when the
moment of its fault has come, `notice TEXT`. With the order `record` also `state JSON`: what is committed, whenever a
transaction begins.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sqlite3
import sys
import traceback
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from kvchat.codecs.header import ARCHIVE
from kvchat.config import Config
from kvchat.errors import KVChatError
from kvchat.events import Listener, Notice
from kvchat.fingerprint import fingerprint_id
from kvchat.handle import Session
from kvchat.model import Model
from kvchat.portable import write
from kvchat.recode import recode
from kvchat.store.shed import Allowance
from kvchat.worker import Worker
from tests.tiny import make_model

# Exact KV, all of it held: an answer is then the same however often the KV was computed again on the way.
SETTINGS = {
    "generate.temperature": 0,
    "generate.max_new_tokens": 8,
    "compress.segment_min": 100,
    "compress.keep_ratio": 1,
    "compress.score_chunk": 64,
    "codec.name": "raw",
    "store.min_free": 0,
}
FIRST, SECOND, ASIDE, OTHER, LAST = (
    "Where did we stay in Rome, and what was the name of the street?",
    "What did it cost?",
    "And where did we stay in Naples?",
    "Was it far from the river, or could we walk there after dinner?",
    "Who was with us?",
)
TAKEN = [
    {"role": "user", "content": "Is there a night train to Oslo?"},
    {"role": "assistant", "content": "There is none, but a ferry leaves at six in the evening."},
    {"role": "user", "content": "How long does it take?"},
    {"role": "assistant", "content": "Until ten in the morning."},
]
LONGEST_S = 120
NOBODY = 65534
State = dict[str, list[str | None]]


def begin(
    store: Path, model: Model, listener: Listener | None = None, settings: dict[str, Any] | None = None
) -> Worker:
    """A worker on `store`."""
    overrides = {"store.path": str(store), **SETTINGS, **(settings or {})}
    return Worker(Config.load(overrides=overrides), listener, lambda *_: model)


def committed(connection: sqlite3.Connection) -> State:
    """Each session's tip, and after it the ends of its branches. An id stands for all text and ids up to it."""
    found: State = {}
    for number, name, tip in connection.execute("SELECT id, name, tip FROM sessions ORDER BY name"):
        rows = connection.execute("SELECT tip FROM branches WHERE session_id = ? ORDER BY tip", [number])
        found[name] = [tip, *(row[0] for row in rows)]
    return found


# -- the life ----------------------------------------------------------------------------------------------------------


class Life:
    """Steps that can be taken again when they were cut off: each looks first how far it came."""

    def __init__(self, order: dict[str, Any], number: int, model: Model) -> None:
        self.order = order
        self.store = Path(order["store"])
        self.step = ""
        self._number = number
        self._model = model
        self._worker: Worker | None = None

    def say(self, *words: object) -> None:
        """One write, so that lines of several children never mix, and nothing waits in a buffer when the kill comes."""
        os.write(1, (" ".join([str(self._number), *map(str, words)]).replace("\n", "\\n") + "\n").encode())

    def say_state(self) -> None:
        with closing(sqlite3.connect(self.store)) as connection:
            self.say("state", json.dumps(committed(connection)))

    @property
    def worker(self) -> Worker:
        if self._worker is None:
            self._worker = begin(self.store, self._model, self._heard, self.order.get("settings"))
        return self._worker

    def _heard(self, event: object) -> None:
        if isinstance(event, Notice):
            self.say("notice", event.text)

    def names(self) -> set[str]:
        return {info.name for info in self.worker.sessions()}

    def answer(self, session: Session, text: str) -> None:
        """Ask, or have answered what is asked already."""
        messages = session.messages()
        if messages and (messages[-1].role, messages[-1].content) == ("user", text):
            session.regenerate()
        elif text not in [message.content for message in messages]:
            session.ask(text)
        session.settle()
        *_, reply = session.messages()
        self.say("answer", reply.id, json.dumps(reply.content))

    def ask(self, name: str, text: str) -> None:
        with self.worker.open(name) as session:
            self.answer(session, text)

    def append(self) -> None:
        with self.worker.open("taken") as session:
            if len(session.messages()) < len(TAKEN):
                session.append(TAKEN)
            session.settle()

    def archive(self) -> None:
        """Only of a session that is never asked: what is archived is no longer exact."""

        def put_away() -> None:
            store = self.worker._store
            path = [message.id for message in store.path(store.session("taken").tip)]
            recode(store, [record for record, _ in store.cover(path, fingerprint_id(self._model.fingerprint))], ARCHIVE)

        self.worker.jobs.call(put_away)

    def shed(self) -> None:
        """Give up half of all KV, as a smaller disk budget would; what is asked later is no longer exact."""

        def give_up() -> None:
            store, former = self.worker._store, self.worker._store.allowance
            room = store.room()
            store.allowance = Allowance(disk_budget=room.in_use - store.stats()["kv_bytes"] // 2)
            try:
                store.shed()
            finally:
                store.allowance = former

        self.worker.jobs.call(give_up)

    def fork(self) -> None:
        with self.worker.open("trip") as session:
            if "side" not in self.names():
                session.fork("side", 1).close()

    def rewind(self) -> None:
        with self.worker.open("trip") as session:
            if SECOND in [message.content for message in session.messages()]:
                session.rewind(1)
            self.answer(session, OTHER)

    def again(self) -> None:
        with self.worker.open("trip") as session:
            session.regenerate()
            session.settle()

    def rename(self) -> None:
        if "side" in self.names():
            self.worker.rename("side", "aside")

    def import_(self) -> None:
        file = Path(self.order["portable"])
        if not file.exists():
            with file.open("wb") as stream:
                self.worker.jobs.call(lambda: write(self.worker._store, "trip", stream))
        if "copy" not in self.names():
            self.worker.take_in(file, "copy").close()

    def delete(self) -> None:
        if "taken" in self.names():
            self.worker.delete("taken")

    def vacuum(self) -> None:
        self.worker.jobs.call(lambda: self.worker._store.vacuum())

    def close(self) -> None:
        if self._worker is not None:
            worker, self._worker = self._worker, None
            worker.close()


LIFE: dict[str, Callable[[Life], None]] = {
    "first": lambda life: life.ask("trip", FIRST),
    "second": lambda life: life.ask("trip", SECOND),
    "append": Life.append,
    "archive": Life.archive,
    "fork": Life.fork,
    "side": lambda life: life.ask("side", ASIDE),
    "rewind": Life.rewind,
    "again": Life.again,
    "rename": Life.rename,
    "import": Life.import_,
    "delete": Life.delete,
    "vacuum": Life.vacuum,
    "last": lambda life: life.ask("trip", LAST),
    "shed": Life.shed,
    "close": Life.close,
}
STEPS = list(LIFE)
TURNS = ("first", "second", "append", "side", "rewind", "again", "last")
"""Those that end with a turn settled."""


# -- faults ------------------------------------------------------------------------------------------------------------


def lower_file_size(life: Life) -> None:
    """No file may grow beyond so many bytes; what would is cut off there. Python ignores the signal."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (life.order["bytes"], resource.RLIM_INFINITY))


def raise_file_size(life: Life) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def lower_pages(life: Life) -> None:
    """The database may grow by so many pages."""

    def lower() -> None:
        store = life.worker._store
        pages = store._rows("PRAGMA page_count")[0][0] + life.order["pages"]
        store._rows(f"PRAGMA max_page_count = {pages}")

    life.worker.jobs.call(lower)


def raise_pages(life: Life) -> None:
    life.worker.jobs.call(lambda: life.worker._store._rows("PRAGMA max_page_count = 1073741823"))


def fill_disk(life: Life) -> None:
    """Leave so many bytes free on the file system, which is a small one of its own."""
    folder = os.statvfs(life.store.parent)
    with life.store.with_name("ballast").open("wb") as stream:
        stream.write(bytes(max(0, folder.f_bavail * folder.f_frsize - life.order["bytes"])))


def empty_disk(life: Life) -> None:
    life.store.with_name("ballast").unlink()


def drop_rights(life: Life) -> None:
    """Be nobody, if one is root, whom modes do not bind."""
    if os.geteuid() == 0:
        os.setgid(NOBODY)
        os.setuid(NOBODY)


FAULTS: dict[str, tuple[Callable[[Life], None], Callable[[Life], None] | None]] = {
    "size": (lower_file_size, raise_file_size),
    "pages": (lower_pages, raise_pages),
    "disk": (fill_disk, empty_disk),
    "rights": (drop_rights, None),
}


def trace(life: Life) -> None:
    """As an audit hook, count the statements of every database, so that a kill can be put at one of them."""
    count = 0

    def follow(connection: sqlite3.Connection, statement: str) -> None:
        nonlocal count
        count += 1
        if life.order.get("record"):
            if statement.startswith("BEGIN"):
                life.say_state()
            life.say("count", count)
        elif count == life.order.get("kill_at"):
            life.say("now")
        elif life.step == life.order.get("kill_in") and statement.startswith("UPDATE messages SET timings"):
            life.say("now")
            signal.pause()

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "sqlite3.connect/handle" and not opened:
            opened.append(arguments[0])

    opened: list[sqlite3.Connection] = []
    sys.addaudithook(watch)
    life.worker.jobs.call(lambda: opened[0].set_trace_callback(lambda statement: follow(opened[0], statement)))


def play(life: Life) -> None:
    """Take the steps, the fault with the one it belongs to; after an error mend it and take the step again."""
    order = life.order
    begin_fault, mend = FAULTS.get(order.get("fault", ""), (None, None))
    if order.keys() & {"record", "kill_at", "kill_in"}:
        trace(life)
    for step in order.get("steps", STEPS):
        if step == order.get("at"):
            life.say("now")
            assert begin_fault
            begin_fault(life)
        life.step = step
        for _ in range(4):
            try:
                LIFE[step](life)
                break
            except KVChatError as error:
                life.say("error", type(error).__name__, error)
                if mend is None:
                    return
                mend(life)
                begin_fault, mend = None, Life.names
        else:
            life.say("broken", f"{step} fails again and again")
            return
        if order.get("record"):
            life.say_state()
        life.say("done", step)
    life.say("played")
    if order.get("stay"):
        signal.pause()


def main() -> None:
    # A fork costs milliseconds, an interpreter with torch seconds.
    torch.set_num_threads(1)
    model = make_model()
    for line in sys.stdin:
        pids = []
        for number, order in enumerate(json.loads(line)):
            pids.append(os.fork())
            if pids[-1] == 0:
                live(Life(order, number, model))
                os._exit(0)
        for number, pid in enumerate(pids):
            _, status = os.waitpid(pid, 0)
            os.write(1, f"{number} end {os.waitstatus_to_exitcode(status)}\n".encode())
        os.write(1, b"- over\n")


def live(life: Life) -> None:
    """Play, and say what goes wrong that should not."""
    signal.alarm(LONGEST_S)
    life.say("pid", os.getpid())
    try:
        play(life)
    except BaseException:  # a test: whatever comes out is what it wants to know
        life.say("broken", traceback.format_exc())


if __name__ == "__main__":
    main()
