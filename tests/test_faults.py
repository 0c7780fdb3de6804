"""Whatever befalls a store, no message that was said to be saved is lost, no answer is wrong, each fault is one line.

Each run draws its fault from its number. The reference is the same life undisturbed: what it had committed at every
moment, and its answers, which are checked against a cache in memory that never saw a store. Its KV is exact and all of
it held, so answers are the same however often KV is computed again; for quantised KV with damaged frames the reference
is the same store with the damaged segment cleanly dropped.

`KVCHAT_FAULT_RUNS=1000` makes so many runs in all, kinds in fixed shares; without it each kind has one or a few.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from kvchat import errors
from kvchat.engine import Engine
from kvchat.errors import KVChatError, SessionBusy, StoreDamaged, StoreError
from kvchat.events import Notice, TurnDone
from kvchat.model import Model
from kvchat.store.migrations import PAGE_SIZE
from kvchat.store.store import Store
from tests.fault_child import FIRST, OTHER, SECOND, STEPS, TURNS, State, begin, committed

RUNS = int(os.environ.get("KVCHAT_FAULT_RUNS", "0"))
ROOT = Path(__file__).resolve().parent.parent
PROBE = "And what was it called?"
LOSSY = {"codec.name": "k8v8", "compress.keep_ratio": 0.4, "compress.recent_tokens": 0, "generate.max_new_tokens": 24}


def runs(share: float, short: int) -> range:
    """Numbers of the runs of a kind: its share of all, or a short version."""
    return range(round(RUNS * share) if RUNS else short)


class Program:
    """The running `tests.fault_child`."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def run(self, *orders: dict[str, Any], at_now: Callable[[int], None] = lambda _: None) -> list[list[str]]:
        """What the child of each order says; `at_now` gets the process id of a child whose moment has come."""
        process, said = self._process, [list[str]() for _ in orders]
        assert process.stdin and process.stdout
        process.stdin.write(json.dumps(orders) + "\n")
        process.stdin.flush()
        pids: dict[str, int] = {}
        while not (line := process.stdout.readline().strip()).startswith("- "):
            number, _, rest = line.partition(" ")
            said[int(number)].append(rest)
            if rest.startswith("pid"):
                pids[number] = int(rest.split()[1])
            elif rest == "now" or (rest == "played" and orders[int(number)].get("stay")):
                at_now(pids[number])
        return said


class Reference:
    """A life that nothing disturbs.

    states     all that was ever committed, in order
    after      for each number of steps, where in `states` it ends
    answers    the id of each reply to its text
    whole      a store like that at the end, of which no KV was given up
    """

    def __init__(self, program: Program, folder: Path, model: Model) -> None:
        self.program = program
        self.model = model
        self.store = folder / "s.db"
        self.portable = folder / "trip.kvchat"
        [lines] = program.run(self.order(self.store, record=True))
        assert lines[-2:] == ["played", "end 0"], lines[-3:]
        self.states, self.after, self.answers = list[State](), [0], dict[str, str]()
        for line in lines:
            word, _, rest = line.partition(" ")
            if word == "state" and json.loads(rest) not in self.states[-1:]:
                self.states.append(json.loads(rest))
            elif word == "answer":
                self.answers[rest.split()[0]] = json.loads(rest.split(maxsplit=1)[1])
            elif word == "count":
                self.count = int(rest)
            elif word == "done":
                self.after.append(len(self.states) - 1)
        store = Store(self.store)
        assert store.verify() == [] and committed(store._db.conn) == self.states[-1]
        self.paths = {
            tip: [token for message in store.path(tip) for token in message.token_ids]
            for state in self.states
            for tips in state.values()
            for tip in tips
            if tip and store.path(tip)
        }
        store.close()
        self.whole = folder / "whole.db"
        [lines] = program.run(self.order(self.whole, steps=[step for step in STEPS if step != "shed"]))
        assert lines[-2:] == ["played", "end 0"], lines

    def order(self, store: Path, **more: Any) -> dict[str, Any]:
        return {"store": str(store), "portable": str(self.portable), **more}

    def allowed(self, done: int) -> list[State]:
        """What may be committed when `done` steps were said to be done and the next was cut off."""
        return self.states[self.after[done] : self.after[min(done + 1, len(STEPS))] + 1]

    def in_memory(self, tip: str | None, question: str, most: int = 8) -> str:
        """The greedy answer after a path, computed from token ids alone."""
        template, ids = self.model.template, self.paths[tip] if tip else []
        engine = Engine(self.model, 1024)
        cache = engine.new_cache()
        for _ in engine.prefill(cache, ids, lambda: False):
            pass
        asked = template.user(question, first=not ids).ids + template.generation_prompt
        return template.text(engine.greedy(cache, asked, most))


@pytest.fixture(scope="module")
def program() -> Iterator[Program]:
    command, environment = [sys.executable, "-m", "tests.fault_child"], os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, cwd=ROOT, env=environment, text=True, stdin=-1, stdout=-1) as process:
        yield Program(process)


@pytest.fixture(scope="module")
def reference(program: Program, tmp_path_factory: pytest.TempPathFactory, tiny_model: Model) -> Reference:
    return Reference(program, tmp_path_factory.mktemp("undisturbed"), tiny_model)


def draw(kind: str, number: int) -> random.Random:
    return random.Random(f"{kind} {number}")


def state_of(path: Path) -> State:
    """What is committed in a store that must be sound."""
    store = Store(path)
    try:
        assert store.verify() == []
        return committed(store._db.conn)
    finally:
        store.close()


def steps_done(lines: Sequence[str]) -> int:
    return sum(line.startswith("done ") for line in lines)


def check_lines(reference: Reference, lines: Sequence[str]) -> list[str]:
    """The mistakes that a child was told of, each one line of a known kind; its answers are the right ones."""
    assert not [line for line in lines if line.startswith("broken")], lines
    for line in lines:
        if line.startswith("answer"):
            _, tip, text = line.split(maxsplit=2)
            assert reference.answers[tip] == json.loads(text)
    told = [line for line in lines if line.startswith("error ")]
    for line in told:
        _, kind, text = line.split(maxsplit=2)
        assert issubclass(getattr(errors, kind), KVChatError) and "\\n" not in text, line
    return told


def check_goes_on(reference: Reference, store: Path, done: int) -> None:
    """Live on after the steps that are done: all further answers are right, and in the end all is as it should be."""
    [lines] = reference.program.run(reference.order(store, steps=STEPS[done:]))
    assert check_lines(reference, lines) == [] and lines[-2:] == ["played", "end 0"], lines
    assert state_of(store) == reference.states[-1]


# -- the reference -----------------------------------------------------------------------------------------------------


def test_the_reference_answers_as_a_cache_in_memory_does(reference: Reference) -> None:
    store = Store(reference.store)
    for tip, text in reference.answers.items():
        *path, question, reply = store.path(tip)
        assert reply.content == text == reference.in_memory(path[-1].id if path else None, question.content)
    assert len(reference.answers) == 5 and len(reference.states) > 20
    store.close()


# -- kill -9 -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", runs(0.4, 3))
def test_killed_at_any_moment(reference: Reference, tmp_path: Path, number: int) -> None:
    """At a statement of any write path, or up to 20 ms behind it, which reaches into all that is computed between."""
    chance, store = draw("kill", number), tmp_path / "s.db"
    delay_s = chance.choice([0.0, 0.02 * chance.random() ** 3])

    def kill(pid: int) -> None:
        time.sleep(delay_s)
        os.kill(pid, signal.SIGKILL)

    kill_at = chance.randint(1, reference.count)
    [lines] = reference.program.run(reference.order(store, kill_at=kill_at), at_now=kill)
    done = steps_done(lines)
    assert check_lines(reference, lines) == []
    assert lines[-1] == f"end {-signal.SIGKILL}" or lines[-2:] == ["played", "end 0"]  # it was quicker than the kill
    assert state_of(store) in reference.allowed(done)
    check_goes_on(reference, store, done)


# -- no room -----------------------------------------------------------------------------------------------------------


def check_full(reference: Reference, store: Path, order: dict[str, Any], chance: random.Random) -> None:
    """Live until the room ends, then with room again in the same process; or end there, and live on in another."""
    steps = STEPS if chance.random() < 0.5 else STEPS[: STEPS.index(order["at"]) + 1]
    [lines] = reference.program.run(reference.order(store, steps=steps, **order))
    told = check_lines(reference, lines)
    assert all("StoreError" in line for line in told), told
    assert lines[-2:] == ["played", "end 0"], lines
    assert state_of(store) in reference.allowed(len(steps))
    if steps is STEPS:
        assert state_of(store) == reference.states[-1]
    else:
        check_goes_on(reference, store, len(steps))


@pytest.mark.parametrize("number", runs(0.08, 1))
def test_a_file_may_not_grow(reference: Reference, tmp_path: Path, number: int) -> None:
    """Writing to the database or its log fails part-way, at any size."""
    chance = draw("size", number)
    size = int(2 ** chance.uniform(9, 20))
    order = {"fault": "size", "at": chance.choice(STEPS), "bytes": size}
    check_full(reference, tmp_path / "s.db", order, chance)


@pytest.mark.parametrize("number", runs(0.05, 1))
def test_the_database_is_full(reference: Reference, tmp_path: Path, number: int) -> None:
    chance = draw("pages", number)
    order = {"fault": "pages", "at": chance.choice(STEPS[:-1]), "pages": chance.randint(0, 6)}
    check_full(reference, tmp_path / "s.db", order, chance)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 32 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", str(place)], capture_output=True, check=False
    )
    if not mounted or mounted.returncode:
        pytest.skip("no small file system can be mounted here: that takes root")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.parametrize("number", runs(0.05, 1))
def test_the_disk_is_full(reference: Reference, small_disk: Path, number: int) -> None:
    chance = draw("disk", number)
    order = {"fault": "disk", "at": chance.choice(STEPS), "bytes": int(2 ** chance.uniform(9, 19))}
    check_full(reference, small_disk / "s.db", order, chance)


# -- no rights ---------------------------------------------------------------------------------------------------------

MODES = [(0o555, 0o444), (0o555, 0o644), (0o755, 0o444), (0o755, 0o000), (0o000, 0o644)]
"""Of folder and file."""


@pytest.mark.parametrize("number", runs(0.01, 1))
def test_a_store_that_may_not_be_written(reference: Reference, tmp_path: Path, number: int) -> None:
    """As the owner, or, for root, as nobody: whom all but a folder of another's shuts out anyway."""
    if os.geteuid() == 0 and not all(folder.stat().st_mode & 0o001 for folder in Path(__file__).parents):
        pytest.skip("the checkout lies in a folder that only root may enter, and root may write everywhere")
    chance = draw("rights", number)
    folder_mode, file_mode = MODES[number % len(MODES)]
    folder = Path(shutil.copytree(reference.store.parent, tmp_path / "copy"))
    store = folder / "s.db"
    shut = [folder, *folder.parents[:3]] if os.geteuid() == 0 else []
    before = store.read_bytes()
    modes = {path: path.stat().st_mode for path in shut}
    for path in shut[1:]:
        path.chmod(0o755)
    store.chmod(file_mode)
    folder.chmod(folder_mode)
    step = chance.choice(["first", "append", "rename", "delete", "vacuum"])
    [lines] = reference.program.run(reference.order(store, steps=[step], fault="rights", at=step))
    folder.chmod(0o755)
    for path, mode in modes.items():
        path.chmod(mode)
    [told] = check_lines(reference, lines)
    assert "StoreError" in told and str(store) in told
    store.chmod(0o644)
    assert store.read_bytes() == before and state_of(store) == reference.states[-1]


# -- damage ------------------------------------------------------------------------------------------------------------


def check_damaged(reference: Reference, store: Path, chance: random.Random) -> str:
    """Look at a store, ask it something, repair it: all is well, or is said not to be. What was said."""
    try:
        verdict = _look(reference, store)
    except KVChatError as error:
        verdict = str(error)
    _ask(reference, Path(shutil.copy(store, store.with_name("asked.db"))), chance)
    try:
        opened = Store(store)
        try:
            opened.repair()
            assert opened.verify() == [] and committed(opened._db.conn) == reference.states[-1]
        finally:
            opened.close()
    except KVChatError as error:
        assert verdict and "\n" not in str(error)
    assert "\n" not in verdict
    return verdict


def _look(reference: Reference, path: Path) -> str:
    """The first problem that is reported; if there is none, all that was committed is there."""
    store = Store(path)
    try:
        if problems := store.verify():
            assert all("\n" not in problem for problem in problems)
            return problems[0]
        assert committed(store._db.conn) == reference.states[-1]
        return ""
    finally:
        store.close()


def _ask(reference: Reference, store: Path, chance: random.Random) -> None:
    """An answer is the right one for the path that its session once had, or there is none."""
    try:
        worker = begin(store, reference.model)
    except KVChatError as error:
        assert "\n" not in str(error)
        return
    try:
        info = chance.choice(worker.sessions())
        with worker.open(info.name, create=False) as session:
            assert session.ask(PROBE).text == reference.in_memory(info.tip, PROBE)
            assert any(state.get(info.name, [None])[0] == info.tip for state in reference.states)
    except KVChatError as error:
        assert "\n" not in str(error)
    finally:
        worker.close()


@pytest.mark.parametrize("number", runs(0.06, 1))
def test_a_truncated_database_is_refused(reference: Reference, tmp_path: Path, number: int) -> None:
    """At any length but none, which is what a file looks like that was just made to become a store.

    SQLite does not see that the last page is cut short; then what it held is reported, if it held anything.
    """
    chance, store = draw("truncated", number), tmp_path / "s.db"
    whole = reference.whole.read_bytes()
    lengths = [chance.randrange(1, len(whole)), chance.randrange(1, len(whole) // PAGE_SIZE) * PAGE_SIZE]
    store.write_bytes(whole[: lengths[number % 2]])
    before = store.read_bytes()
    if len(before) <= len(whole) - PAGE_SIZE:
        with pytest.raises(StoreError, match="is damaged") as caught:
            Store(store).sessions()
        assert "\n" not in str(caught.value) and store.read_bytes() == before
        assert check_damaged(reference, store, chance)
    else:
        check_damaged(reference, store, chance)


@pytest.mark.parametrize("number", runs(0.06, 1))
def test_pages_of_garbage(reference: Reference, tmp_path: Path, number: int) -> None:
    chance, store = draw("garbage", number), tmp_path / "s.db"
    data = bytearray(reference.whole.read_bytes())
    for _ in range(chance.choice([1, 1, 3])):
        page = chance.randrange(len(data) // PAGE_SIZE) * PAGE_SIZE
        data[page : page + PAGE_SIZE] = chance.choice([bytes(PAGE_SIZE), chance.randbytes(PAGE_SIZE)])
    store.write_bytes(data)
    check_damaged(reference, store, chance)


@pytest.mark.parametrize("number", runs(0.05, 1))
def test_flipped_bits_anywhere_in_the_file(reference: Reference, tmp_path: Path, number: int) -> None:
    chance, store = draw("bits", number), tmp_path / "s.db"
    data = bytearray(reference.whole.read_bytes())
    for _ in range(chance.choice([1, 1, 20])):
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    store.write_bytes(data)
    check_damaged(reference, store, chance)


@pytest.mark.parametrize(
    "harm",
    [
        "UPDATE messages SET content = 'We never went.' WHERE depth = 1",
        "UPDATE messages SET token_ids = x'01000000' WHERE depth = 0",
        "UPDATE messages SET parent = NULL WHERE depth = 2",
        "DELETE FROM messages WHERE depth = 0",
    ],
)
def test_a_conversation_whose_text_was_altered_does_not_go_on(reference: Reference, tmp_path: Path, harm: str) -> None:
    store = Path(shutil.copy(reference.store, tmp_path))
    with sqlite3.connect(store) as connection:
        connection.execute(harm)
    connection.close()
    worker = begin(store, reference.model)
    with pytest.raises(
        StoreDamaged, match=r"session 'trip': message b2:\w+ (was altered|is missing.*); restore a copy"
    ):
        worker.open("trip")
    worker.close()
    assert _first_problem(store)


# -- the log -----------------------------------------------------------------------------------------------------------


class LeftOver(NamedTuple):
    """A folder as a process leaves it that is killed in the middle of a turn."""

    folder: Path
    done: int
    state: State
    folded: int
    """Steps to the end of the newest turn before it: by then the log is folded into the file."""


@pytest.fixture(scope="module")
def left_over(reference: Reference, tmp_path_factory: pytest.TempPathFactory) -> list[LeftOver]:
    found = []
    for step in ("second", "side", "again", "last"):
        done, store = STEPS.index(step), tmp_path_factory.mktemp(f"killed-in-{step}") / "s.db"
        order = reference.order(store, steps=STEPS[: done + 1], kill_in=step)
        [lines] = reference.program.run(order, at_now=lambda pid: os.kill(pid, signal.SIGKILL))
        assert steps_done(lines) == done and store.with_name("s.db-wal").stat().st_size
        copy = Path(shutil.copytree(store.parent, store.parent.with_name(f"look-{step}")))
        turns = [index for index in range(done) if STEPS[index] in TURNS]
        found.append(LeftOver(store.parent, done, state_of(copy / "s.db"), turns[-1] + 1))
    return found


def drop_index(folder: Path, chance: random.Random) -> None:
    (folder / "s.db-shm").unlink()


def spoil_index(folder: Path, chance: random.Random) -> None:
    file = folder / "s.db-shm"
    file.write_bytes(chance.randbytes(file.stat().st_size))


def drop_log(folder: Path, chance: random.Random) -> None:
    (folder / "s.db-wal").unlink()


def cut_log(folder: Path, chance: random.Random) -> None:
    file = folder / "s.db-wal"
    os.truncate(file, chance.randrange(file.stat().st_size))


def flip_log(folder: Path, chance: random.Random) -> None:
    file = folder / "s.db-wal"
    file.write_bytes(flip(file.read_bytes(), chance))


def cut_file(folder: Path, chance: random.Random) -> None:
    """The log still holds what the file has lost, or not all of it."""
    file = folder / "s.db"
    os.truncate(file, chance.randrange(file.stat().st_size))


SPOILT = [drop_index, drop_log, cut_log, flip_log, cut_file, spoil_index]


@pytest.mark.parametrize("number", runs(0.06, 3))
def test_a_spoilt_log(reference: Reference, left_over: list[LeftOver], tmp_path: Path, number: int) -> None:
    """Its index is made anew; without the log, or its end, no turn is lost but the one in progress."""
    chance, spoil = draw("log", number), SPOILT[number % len(SPOILT)]
    origin = chance.choice(left_over)
    store = Path(shutil.copytree(origin.folder, tmp_path / "copy")) / "s.db"
    spoil(store.parent, chance)
    if spoil is cut_file:
        assert _first_problem(store)
        return
    state = state_of(store)
    if spoil in (drop_index, spoil_index):
        assert state == origin.state
    assert state in reference.states[reference.after[origin.folded] : reference.after[origin.done + 1] + 1]
    check_goes_on(reference, store, origin.folded)


def _first_problem(path: Path) -> str:
    try:
        store = Store(path)
        try:
            problems = store.verify()
        finally:
            store.close()
    except KVChatError as error:
        problems = [str(error)]
    assert all("\n" not in problem for problem in problems)
    return problems[0] if problems else ""


# -- frames ------------------------------------------------------------------------------------------------------------


class Quantised:
    """A store of quantised KV of which a part is held, and its next answer: whole, and less each of its segments."""

    def __init__(self, folder: Path, model: Model) -> None:
        self.store, self._model, self._folder = folder / "s.db", model, folder
        worker = begin(self.store, model, settings=LOSSY)
        with worker.open("trip") as session:
            for question in (FIRST, SECOND, OTHER, FIRST, OTHER, SECOND):
                session.ask(question)
            session.settle()
        worker.close()
        self.answers = {"": self.ask(Path(shutil.copy(self.store, folder / "whole.db")))[0]}
        store = Store(self.store)
        query = "SELECT id FROM segments WHERE kind = 'sealed' ORDER BY start_token"
        self.sealed = [row["id"] for row in store._rows(query)]
        store.close()

    def ask(self, store: Path) -> tuple[str, list[str]]:
        """The next answer, and what was said of damage meanwhile."""
        told: list[Any] = []
        worker = begin(store, self._model, told.append, LOSSY)
        with worker.open("trip") as session:
            told += session.send(PROBE)
            session.settle()
        worker.close()
        [text] = [event.text for event in told if isinstance(event, TurnDone)]
        return text, [event.text for event in told if isinstance(event, Notice)]

    def without(self, segment_id: str) -> str:
        """The next answer of a store that never had the segment."""
        if segment_id not in self.answers:
            path = Path(shutil.copy(self.store, self._folder / f"{len(self.answers)}.db"))
            store = Store(path)
            store.drop_segment(segment_id)
            store.close()
            self.answers[segment_id] = self.ask(path)[0]
        return self.answers[segment_id]


@pytest.fixture(scope="module")
def quantised(tmp_path_factory: pytest.TempPathFactory, tiny_model: Model) -> Quantised:
    return Quantised(tmp_path_factory.mktemp("quantised"), tiny_model)


def flip(blob: bytes, chance: random.Random) -> bytes:
    data = bytearray(blob)
    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    return bytes(data)


def check_flipped(quantised: Quantised, store: Path, segment_id: str, place: str) -> bool:
    """The damage is named, the answer right; whether it was met and mended."""
    opened = Store(store)
    [problem] = opened.verify()
    opened.close()
    assert segment_id[:15] in problem and place in problem and "\n" not in problem
    text, told = quantised.ask(store)
    expected = quantised.without(segment_id) if told else quantised.answers[""]
    assert text == expected and len(told) <= 1 and all("damaged" in one and "\n" not in one for one in told)
    opened = Store(store)
    assert opened.verify() == ([] if told else [problem])
    opened.close()
    return bool(told)


@pytest.mark.parametrize("number", runs(0.1, 1))
def test_flipped_bits_in_frames(quantised: Quantised, tmp_path: Path, number: int) -> None:
    """Two frames a run, one after the other."""
    for half in (0, 1):
        chance, store = draw("frame", 2 * number + half), Path(shutil.copy(quantised.store, tmp_path / f"{half}.db"))
        with sqlite3.connect(store) as connection:
            frames = connection.execute("SELECT rowid, segment_id, chunk, body FROM frames").fetchall()
            row, segment_id, chunk, body = chance.choice(frames)
            connection.execute("UPDATE frames SET body = ? WHERE rowid = ?", [flip(body, chance), row])
        connection.close()
        check_flipped(quantised, store, segment_id, f"chunk {chunk}")


@pytest.mark.parametrize("number", runs(0.03, 1))
def test_flipped_bits_in_headers(quantised: Quantised, tmp_path: Path, number: int) -> None:
    chance, store = draw("header", number), Path(shutil.copy(quantised.store, tmp_path / "s.db"))
    with sqlite3.connect(store) as connection:
        segment_id, header = chance.choice(connection.execute("SELECT id, header FROM segments").fetchall())
        connection.execute("UPDATE segments SET header = ? WHERE id = ?", [flip(header, chance), segment_id])
    connection.close()
    assert check_flipped(quantised, store, segment_id, "header")


def test_some_damage_is_met_and_some_is_not(quantised: Quantised, tmp_path: Path) -> None:
    """Of the first chunk always, of the last if the question concerns the segment, and so all of it comes back."""
    met = []
    for number, (at, chunk) in enumerate([(0, 0), (0, 99), (-1, 0), (-1, 99)]):
        store = Path(shutil.copy(quantised.store, tmp_path / f"{number}.db"))
        with sqlite3.connect(store) as connection:
            [row] = connection.execute(
                "SELECT rowid, segment_id, chunk, body FROM frames WHERE segment_id = ? AND chunk <= ?"
                " ORDER BY chunk DESC LIMIT 1",
                [quantised.sealed[at], chunk],
            )
            connection.execute("UPDATE frames SET body = ? WHERE rowid = ?", [flip(row[3], draw("met", 0)), row[0]])
        connection.close()
        met.append(check_flipped(quantised, store, row[1], f"chunk {row[2]}"))
    assert met == [True, True, True, False]


# -- two processes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", runs(0.04, 1))
def test_two_processes_on_one_session(reference: Reference, tmp_path: Path, number: int) -> None:
    """One of them may be told that the other has it open; what either got an answer to is there."""
    store = tmp_path / "s.db"
    steps = (["first", "second", "rewind", "last"], ["first", "second", "again", "last"])
    said = reference.program.run(*(reference.order(store, steps=mine) for mine in steps))
    told = [line for lines in said for line in check_racing(lines)]
    assert all(SessionBusy.__name__ in line for line in told), told
    check_all_said_is_there(store, said)
    assert any("played" in lines for lines in said)


@pytest.mark.parametrize("number", runs(0.04, 2))
def test_two_processes_on_two_sessions(reference: Reference, tmp_path: Path, number: int) -> None:
    """Neither disturbs the other, also if one is killed."""
    chance, store = draw("two", number), tmp_path / "s.db"
    one, other = reference.order(store, steps=["first", "second"]), reference.order(store, steps=["append", "close"])
    if killed := bool(number % 2):
        one["kill_at"] = chance.randint(1, 80)
    said = reference.program.run(one, other, at_now=lambda pid: os.kill(pid, signal.SIGKILL))
    assert [check_racing(lines) for lines in said] == [[], []] and "played" in said[1], said
    assert killed or "played" in said[0]
    check_all_said_is_there(store, said)
    check_goes_on(reference, store, steps_done(said[0]))


def check_racing(lines: Sequence[str]) -> list[str]:
    """What a child was told; nothing else went wrong."""
    assert not [line for line in lines if line.startswith("broken")], lines
    return [line for line in lines if line.startswith("error ")]


def check_all_said_is_there(path: Path, said: Sequence[Sequence[str]]) -> None:
    """The store is sound, and every answer that somebody got lies on a path or a branch of its session."""
    store = Store(path)
    assert store.verify() == []
    tips = [tip for tips in committed(store._db.conn).values() for tip in tips]
    held = {message.id: message.content for tip in tips for message in store.path(tip)}
    store.close()
    counts: defaultdict[bool, int] = defaultdict(int)
    for line in (line for lines in said for line in lines if line.startswith("answer")):
        _, reply, text = line.split(maxsplit=2)
        counts[held[reply] == json.loads(text)] += 1
    assert not counts[False]
