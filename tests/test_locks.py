"""One store, several processes: two sessions at once, one session only once, and locks that die with their process."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from kvchat.cli.app import main
from kvchat.config import Config
from kvchat.errors import SessionBusy, SessionChanged, StoreError
from kvchat.locks import SessionLock, held_elsewhere
from kvchat.store.store import Store
from kvchat.worker import Worker
from tests.crash_child import start
from tests.store_parts import converse, talk

ROOT = Path(__file__).resolve().parent.parent


class Other:
    """Another process, with a worker on the same store, to open one session."""

    def __init__(self, server: subprocess.Popen[str], folder: Path, store: Path, name: str) -> None:
        requests, answers = folder / "requests", folder / "answers"
        for pipe in (requests, answers):
            os.mkfifo(pipe)
        assert server.stdin
        server.stdin.write(f"{requests} {answers} {store} {name}\n")
        server.stdin.flush()
        self._answers = answers.open()
        self._requests = requests.open("w", buffering=1)
        self.pid = int(self.read())

    def tell(self, line: str) -> str:
        """Have it do something; what it says then."""
        self.begin(line)
        return self.read()

    def begin(self, line: str) -> None:
        """Have it do something."""
        self._requests.write(f"{line}\n")

    def read(self) -> str:
        """What it says next; nothing once it is dead."""
        return self._answers.readline().strip()

    def kill(self) -> None:
        """Kill it, and wait until it is gone."""
        os.kill(self.pid, signal.SIGKILL)
        assert self.read() == ""
        self._answers.close()
        self._requests.close()


@pytest.fixture(scope="module")
def server() -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "tests.lock_child"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, cwd=ROOT, env=env, text=True, stdin=-1) as process:
        yield process


Begin = Callable[[str], Other]


@pytest.fixture
def begin(server: subprocess.Popen[str], store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Begin]:
    """Starts processes that are to open the session of that name."""
    others: list[Other] = []

    def start_one(name: str) -> Other:
        others.append(Other(server, tmp_path_factory.mktemp("pipes"), store, name))
        return others[-1]

    yield start_one
    for other in others:
        with suppress(ProcessLookupError):
            os.kill(other.pid, signal.SIGKILL)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "s.db"


@pytest.fixture
def other(begin: Begin) -> Other:
    """A process that has the session "trip" open, in which one turn was said."""
    process = begin("trip")
    assert process.tell("open") == "opened"
    assert process.tell("Where did we stay in Rome?").startswith("answered")
    return process


def session_id(store: Path, name: str) -> int:
    opened = Store(store)
    found = opened.session(name).id
    opened.close()
    return found


def test_a_session_is_open_in_one_process_only_until_that_is_killed(
    store: Path, other: Other, capsys: pytest.CaptureFixture[str]
) -> None:
    worker = start(store)
    with pytest.raises(SessionBusy) as caught:
        worker.open("trip")
    line = str(caught.value)
    assert f"process {other.pid}, since" in line and "'trip'" in line
    assert "`kvchat show trip`" in line and "`kvchat fork trip NEW`" in line and "\n" not in line
    assert held_elsewhere(store, [session_id(store, "trip"), 99]) == {session_id(store, "trip")}
    with pytest.raises(SessionBusy):
        worker.delete("trip")

    # What only reads, and what makes or names a session, works meanwhile.
    flags = ["--store", str(store)]
    for command in (
        ["show", "trip"],
        ["export", "trip"],
        ["verify"],
        ["fork", "trip", "copy"],
        ["rename", "trip", "rome"],
    ):
        assert main([*command, *flags]) == 0, capsys.readouterr().err
    capsys.readouterr()
    assert main(["rm", "rome", "--yes", *flags]) == 1
    assert capsys.readouterr().err.startswith("kvchat: session 'rome' is open in another kvchat")
    with worker.open("copy") as copy:
        assert len([message for message in copy.messages() if message.role == "user"]) == 1
    assert other.tell("And then?").startswith("answered")

    other.kill()
    assert list(store.with_name("s.db-locks").iterdir())  # left over, and locks nothing
    assert held_elsewhere(store, [session_id(store, "rome")]) == set()
    with worker.open("rome") as session:
        assert len([message for message in session.messages() if message.role == "user"]) == 2
    worker.close()
    assert list(store.with_name("s.db-locks").iterdir()) == []


def test_stats_of_a_session_that_is_open_elsewhere_show_what_the_store_holds(
    store: Path, other: Other, capsys: pytest.CaptureFixture[str]
) -> None:
    def worker(config: Config, listener: object, key: object) -> Worker:
        return start(config.store_path)

    flags = ["--store", str(store)]
    assert main(["stats", "trip", "--json", *flags], worker) == 0
    out, err = capsys.readouterr()
    shown = json.loads(out)
    assert shown["num_turns"] == 1 and shown["segments"] and shown["bytes_on_disk"] > 0
    assert f"process {other.pid}" in err
    assert main(["stats", "trip", *flags], worker) == 0
    assert "1 turns" in capsys.readouterr().out
    assert main(["ask", "trip", "Hello?", *flags], worker) == 1
    assert capsys.readouterr().err.startswith("kvchat: session 'trip' is open in another kvchat")


def test_two_sessions_of_one_store_are_answered_at_once(store: Path, begin: Begin, other: Other) -> None:
    second = begin("other")
    assert second.tell("open") == "opened"
    questions = [f"Question {number}?" for number in range(6)]
    for question in questions:
        for process in (other, second):
            process.begin(question)
        assert all(process.read().startswith("answered") for process in (other, second))
    assert second.tell("close") == "closed"
    opened = Store(store)
    assert opened.verify() == []
    said = [message.content for message in opened.path(opened.session("trip").tip) if message.role == "user"]
    assert said[1:] == questions == [m.content for m in opened.path(opened.session("other").tip) if m.role == "user"]
    opened.close()


def test_another_session_that_got_the_name_meanwhile_is_neither_opened_nor_deleted(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = Store(store)
    converse(opened, "trip", "one", "two")
    taken = list[str]()

    class Late(SessionLock):
        def __init__(self, file: Path, session_id: int, name: str) -> None:
            super().__init__(file, session_id, name)
            taken.append(f"kept {len(taken)}")
            other = Store(file)
            other.rename("trip", taken[-1])
            converse(other, "trip", "another", "session")
            other.close()

    for part in ("worker", "shelf"):
        monkeypatch.setattr(f"kvchat.{part}.SessionLock", Late)
    worker = start(store)
    for harm in (lambda: worker.open("trip"), lambda: worker.delete("trip")):
        with pytest.raises(StoreError, match="another session was named 'trip' meanwhile"):
            harm()
    worker.close()
    assert {info.name for info in opened.sessions()} == {"trip", *taken} and len(taken) == 2
    assert held_elsewhere(store, [info.id for info in opened.sessions()]) == set()
    opened.close()


def test_of_many_processes_that_want_one_session_one_gets_it(begin: Begin) -> None:
    others = [begin("trip") for _ in range(4)]
    for process in others:
        process.begin("open")
    said = sorted(process.read().split()[0] for process in others)
    assert said == ["SessionBusy", "SessionBusy", "SessionBusy", "opened"]


def test_a_worker_excludes_another_of_its_process_and_closing_lets_go(store: Path) -> None:
    first, second = start(store), start(store)
    session, again = first.open("trip"), first.open("trip")
    with pytest.raises(SessionBusy, match=f"open in this process .process {os.getpid()},"):
        second.open("trip")
    session.close()
    with pytest.raises(SessionBusy):
        second.open("trip")
    again.close()
    second.open("trip")
    second.close()
    first.open("trip")
    first.close()


def test_an_opening_that_fails_lets_go(store: Path) -> None:
    worker = start(store)
    worker.open("trip", system="Be brief.").close()
    with pytest.raises(Exception, match="system prompt already"):
        worker.open("trip", system="Be long.")
    other = start(store)
    other.open("trip")
    worker.close()
    other.close()


def test_a_lock_file_is_private_and_goes_with_the_lock(tmp_path: Path) -> None:
    store = tmp_path / "s.db"
    with SessionLock(store, 7, "trip"):
        [file] = store.with_name("s.db-locks").iterdir()
        assert file.stat().st_mode & 0o777 == 0o600 and file.parent.stat().st_mode & 0o777 == 0o700
        assert held_elsewhere(store, [7, 8]) == {7}
    assert not file.exists() and held_elsewhere(store, [7]) == set()


def test_locks_that_are_taken_and_left_by_many_threads_never_overlap(tmp_path: Path) -> None:
    inside, most, lock = [0], [0], threading.Lock()

    def work() -> None:
        for _ in range(20):
            try:
                held = SessionLock(tmp_path / "s.db", 1, "trip")
            except SessionBusy:
                continue
            with lock:
                inside[0] += 1
                most[0] = max(most[0], inside[0])
            held_elsewhere(tmp_path / "s.db", [1])
            with lock:
                inside[0] -= 1
            held.release()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1]


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "s.db-locks").write_text("a file in place of the folder")
    with pytest.raises(StoreError, match="'trip' cannot be locked"):
        SessionLock(tmp_path / "s.db", 1, "trip")


def test_an_answer_that_came_too_late_is_kept_as_a_branch(store: Path) -> None:
    """As when the lock was lost, because somebody removed its file."""
    worker = start(store)
    session = worker.open("trip")
    session.ask("Where did we stay in Rome?")
    events = session.send("What did it cost?")
    next(events)
    with sqlite3.connect(store, timeout=10) as database:
        database.execute("UPDATE sessions SET tip = (SELECT id FROM messages WHERE depth = 1)")
    database.close()
    text = ""
    with pytest.raises(SessionChanged, match="kept beside it"):
        for event in events:
            text += getattr(event, "text", "")
    worker.close()
    opened = Store(store)
    info = opened.session("trip")
    [branch] = opened.branches(info.id)
    assert [message.content for message in opened.path(branch)][-2:] == ["What did it cost?", text]
    assert opened.verify() == []
    opened.close()


def test_a_branch_can_be_added_beside_a_path_that_went_on(store: Path) -> None:
    opened = Store(store)
    info, chain = converse(opened, "trip", "one", "two")
    late = talk(chain[0], "late")
    opened.add_messages(info.id, talk(chain[-1], "three"), chain[-1].id)
    with pytest.raises(SessionChanged):
        opened.add_messages(info.id, talk(chain[-1], "four"), chain[-1].id)
    opened.add_branch(info.id, late)
    assert opened.branches(info.id) == [late[-1].id]
    assert [message.content for message in opened.path(opened.session("trip").tip)] == ["one", "two", "three"]
    assert opened.search("late") and opened.verify() == []
    opened.close()


def test_a_session_that_is_renamed_elsewhere_goes_on_and_can_be_forked(store: Path) -> None:
    worker = start(store)
    session = worker.open("trip")
    assert main(["rename", "trip", "rome", "--store", str(store)]) == 0
    assert session.ask("And then?").text
    assert len(session.fork("copy").messages()) == 2
    worker.close()
