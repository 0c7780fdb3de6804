"""Many sessions, long ones and forks: listing and search find what their plain definitions find, and read little.

`KVCHAT_SCALE_SESSIONS=1000` also measures `kvchat ls` and `kvchat search` on so many sessions of 100 messages each, and
the fork of 6000 tokens at the bytes that a token of the built-in model takes.
"""

from __future__ import annotations

import contextlib
import io
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvchat import cipher
from kvchat.cli import app as cli
from kvchat.codecs.frame import pack
from kvchat.store import kv as kv_store
from kvchat.store import listing, migrations, readers
from kvchat.store.queries import KV_BYTES
from kvchat.store.store import Message, SearchHit, SegmentRecord, SessionInfo, Store
from tests.crash_child import start
from tests.store_parts import FINGERPRINT, MODEL, Frames, converse, say, segment, talk

MANY = int(os.environ.get("KVCHAT_SCALE_SESSIONS", "0"))
full = pytest.mark.skipif(not MANY, reason="takes minutes; KVCHAT_SCALE_SESSIONS=1000 runs it")
WORDS = ["hotel", "river", "street", "dinner", "night", "station", "harbour", *(f"word{n}" for n in range(900))]
KV_BYTES_PER_TOKEN = 11_900 if MANY else 1_200
FORK_BYTES = 64 * 1024
TOKENS = 6000


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(tmp_path / "s.db")
    yield store
    store.close()


def fill(store: Store, draw: random.Random, num_sessions: int, num_messages: int) -> None:
    """Sessions that share a system prompt, with a segment for each twenty messages."""
    opening = say(None, "system", "You know every river.")
    for number in range(num_sessions):
        info = store.create_session(f"session {number}", MODEL, FINGERPRINT)
        chain = [opening, *talk(opening, *(" ".join(draw.choices(WORDS, k=30)) for _ in range(num_messages - 1)))]
        store.add_messages(info.id, chain, None)
        for first in range(0, num_messages, 20):
            record, frames = segment(chain, first, min(num_messages, first + 20), tag=str(number))
            store.put_segment(replace(record, basis=b"basis" * draw.randint(0, 3)), frames)


def wander(store: Store, draw: random.Random, steps: int) -> None:
    """Forks, rewinds, other answers, overlapping segments and deletions."""
    for number in range(steps):
        info = draw.choice(store.sessions())
        path = store.path(info.tip)
        match draw.choice(["say", "say", "rewind", "rewind", "fork", "seal", "open", "delete"]):
            case "say":
                words = (" ".join(draw.choices(WORDS[:20], k=5)) for _ in range(draw.randint(1, 3)))
                store.add_messages(info.id, talk(path[-1] if path else None, *words), info.tip)
            case "rewind":
                store.set_tip(info.id, draw.choice([None, *(message.id for message in path)]))
            case "fork":
                store.fork(info.name, f"fork {number}", draw.choice([None, *(message.id for message in path)]))
            case "seal" | "open" as kind if path:
                first = draw.randrange(len(path))
                last = draw.randint(first + 1, len(path))
                record, frames = segment(path, first, last, "open" if kind == "open" else "sealed", tag=str(number))
                store.put_segment(replace(record, basis=b"basis" * draw.randint(0, 3)), frames)
            case "delete" if number % 5 == 0:
                store.delete(info.name)


@pytest.mark.parametrize("seed", range(6))
def test_the_listing_is_what_each_session_says_of_itself(store: Store, seed: int) -> None:
    draw = random.Random(seed)
    fill(store, draw, 5, 5)
    store.create_session("blank", MODEL, FINGERPRINT)
    wander(store, draw, 40)
    alone = [store.session(info.name) for info in store.sessions()]
    assert store.sessions() == sorted(alone, key=lambda info: (info.updated, info.id), reverse=True)
    assert len(alone) > 4 and len({(info.title, info.nbytes, info.num_turns) for info in alone}) > 3


def test_what_segments_share_is_counted_once(store: Store) -> None:
    (_, path), parts = converse(store, "trip", *"abcd"), []
    for first, basis in ((0, b"x" * 7000), (2, b"x" * 7000), (3, b"y" * 500)):
        record, frames = segment(path, first, min(first + 2, 4))
        store.put_segment(replace(record, basis=basis), frames)
        parts.append(store.segment(record.id))
    own = sum(record.nbytes for record in parts if record)
    store.fork("trip", "early", path[1].id)
    sizes = {info.name: info.nbytes for info in store.sessions()}
    assert sizes == {"trip": own + 7500, "early": parts[0].nbytes + 7000 if parts[0] else 0}
    assert sizes == {name: store.session(name).nbytes for name in sizes}
    assert store.stats()["kv_bytes"] == own + 7500 == store._rows(KV_BYTES)[0]["nbytes"]


def test_a_title_may_come_late_or_never(store: Store) -> None:
    info = store.create_session("late", MODEL, FINGERPRINT)
    chain = [say(None, "system", "Be brief.")]
    for content in ("Welcome.", "Ask me anything."):
        chain.append(say(chain[-1], "assistant", content))
    store.add_messages(info.id, chain, None)
    assert [one.title for one in store.sessions()] == [""]
    store.add_messages(info.id, [say(chain[-1], "user", "Where is Rome?")], chain[-1].id)
    assert store.sessions() == [store.session("late")] and store.sessions()[0].title == "Where is Rome?"


def test_a_tree_that_runs_in_a_circle_is_listed_and_searched(store: Store) -> None:
    fill(store, random.Random(0), 2, 4)
    tip = store.session("session 0").tip
    store._db.execute("UPDATE messages SET parent = ? WHERE depth = 0", [tip])
    assert {info.name for info in store.sessions()} == {"session 0", "session 1"}
    assert {hit.session for hit in store.search("river")} == {"session 0", "session 1"}


def plainly(store: Store, word: str) -> list[tuple[SessionInfo, int | None, Message]]:
    """Every message with the word, in every session that holds it: on its path, else on a branch."""
    found = []
    for info in store.sessions():
        paths = [store.path(tip) for tip in (info.tip, *store.branches(info.id)) if tip]
        current = {message.id for message in store.path(info.tip)}
        for message in {message.id: message for path in paths for message in path}.values():
            if any(one.startswith(word) for one in message.content.lower().replace(".", "").split()):
                above = store.path(message.id)
                turn = sum(one.role == "user" for one in above) if message.id in current else None
                found.append((info, turn, message))
    return found


@pytest.mark.parametrize("most", [3, 5000])
@pytest.mark.parametrize("seed", range(3))
def test_search_finds_what_its_definition_says(
    store: Store, monkeypatch: pytest.MonkeyPatch, seed: int, most: int
) -> None:
    monkeypatch.setattr(listing, "MOST_STEPS", most)  # beyond it the other way is taken
    draw = random.Random(seed)
    fill(store, draw, 4, 6)
    wander(store, draw, 40)
    for word in ("hotel", "river", "word1", "word77"):
        hits = store.search(word, limit=10_000)
        expected = [(info.name, turn, message.role) for info, turn, message in plainly(store, word)]
        assert sorted(map(str, map(described, hits))) == sorted(map(str, expected))
    assert store.search("river")


def described(hit: SearchHit) -> tuple[str, int | None, str]:
    """A hit without its snippet."""
    return hit.session, hit.turn, hit.role


# -- what opening reads ----------------------------------------------------------------------------------------------


def bytes_read() -> int:
    """Bytes that this process has read from files so far."""
    return int(Path("/proc/self/io").read_text().split()[1])


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="the system does not count what a process reads")
def test_opening_a_session_reads_its_own_frames_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(migrations, "MMAP_SIZE", 0)  # what is mapped is not counted
    path, given = tmp_path / "s.db", 0
    worker = start(path)
    with worker.open("warm") as warm, worker.open("trip") as trip:
        for _ in range(3):
            trip.ask("Where did we stay in Rome, and what was the name of the street?")
            warm.ask("Where?")
        trip.settle()
    worker.close()
    store = Store(path)
    for number in range(8):
        info = store.create_session(f"other {number}", MODEL, FINGERPRINT)
        chain = talk(None, f"question {number}", "answer")
        store.add_messages(info.id, chain, None)
        store.put_segment(*weighing(segment(chain, 0, 2), 2_000_000))
    own = store.session("trip").nbytes
    store.close()

    def counted(*place: Any) -> bytes | None:
        nonlocal given
        body = read(*place)
        given += len(body or b"")
        return body

    read = cipher.read_blob
    for module in (readers, kv_store):
        monkeypatch.setattr(module, "read_blob", counted)
    worker = start(path)
    worker.open("warm").stats()
    before, given = bytes_read(), 0
    worker.open("trip").stats()  # waits until all is restored
    total = bytes_read() - before
    worker.close()
    assert 0.8 * own < given <= own
    assert given < total < own + 1_000_000


# -- forks of a long session -----------------------------------------------------------------------------------------


def weighing(parts: tuple[SegmentRecord, Frames], nbytes: int) -> tuple[SegmentRecord, Frames]:
    """The segment with frames of random numbers that take `nbytes` together."""
    record, frames = parts
    draw = np.random.default_rng(len(record.id))
    size = nbytes // len(frames)
    return record, [
        (chunk, grp, pack({"chunk": chunk}, {"rows": draw.integers(0, 256, size, np.uint8)}, {"rows": 0}))
        for chunk, grp, _ in frames
    ]


def long_session(store: Store) -> list[Message]:
    """6000 tokens in 24 messages and 12 segments."""
    info = store.create_session("trip", MODEL, FINGERPRINT)
    draw = random.Random(0)
    chain = talk(None, *("".join(draw.choices("abcdefgh ", k=TOKENS // 24 - 2)) for _ in range(24)))
    store.add_messages(info.id, chain, None)
    for first in range(0, 24, 2):
        store.put_segment(*weighing(segment(chain, first, first + 2), KV_BYTES_PER_TOKEN * TOKENS // 12))
    return chain


def held(store: Store) -> dict[str, int]:
    """What is stored, counted."""
    keys = ("sessions", "messages", "segments", "frames", "kv_bytes", "text_bytes")
    return {key: store.stats()[key] for key in keys}


def pages(store: Store) -> int:
    """Bytes of the pages in use."""
    count, free, size = (store._rows(f"PRAGMA {name}")[0][0] for name in ("page_count", "freelist_count", "page_size"))
    return int((count - free) * size)


def folded(store: Store) -> int:
    """Bytes of the file when the log, of which the pages are written over again and again, is folded in."""
    store._rows("PRAGMA wal_checkpoint(TRUNCATE)")
    return int(store.stats()["file_bytes"])


def go_own_way(store: Store, name: str, turn: str) -> None:
    """Two messages and a segment that only this session has."""
    info = store.session(name)
    path = store.path(info.tip)
    path += talk(path[-1], turn * 100, f"{turn} too")
    store.add_messages(info.id, path[-2:], info.tip)
    store.put_segment(*weighing(segment(path, len(path) - 2, len(path), tag=name), 300_000))


def test_a_fork_of_a_long_session_takes_next_to_nothing_and_gives_back_its_own(store: Store) -> None:
    chain = long_session(store)
    assert store.session("trip").num_tokens == TOKENS
    alone, before, used = held(store), folded(store), pages(store)
    store.fork("trip", "trip-2", chain[15].id)
    assert held(store) == {**alone, "sessions": 2}
    assert folded(store) - before < FORK_BYTES and pages(store) - used < FORK_BYTES
    go_own_way(store, "trip-2", "another way")
    assert held(store)["kv_bytes"] > alone["kv_bytes"] and pages(store) > used
    store.delete("trip-2")
    assert held(store) == alone
    assert pages(store) == used and folded(store) == before
    assert store.verify() == []


def test_deleting_the_origin_frees_what_only_it_used(store: Store) -> None:
    chain = long_session(store)
    store.fork("trip", "trip-2", chain[15].id)
    go_own_way(store, "trip-2", "another way")
    records = {record.id: record for record, _ in store.cover([message.id for message in chain], "f1")}
    gone = [record for record in records.values() if record.start >= 16 * TOKENS // 24]
    before, used = held(store), pages(store)
    store.delete("trip")
    freed = {key: before[key] - value for key, value in held(store).items()}
    text = sum(len(message.content.encode()) + 4 * len(message.token_ids) for message in chain[16:])
    nbytes = sum(record.nbytes for record in gone)
    assert len(gone) == 4
    assert freed == {
        "sessions": 1,
        "messages": 8,
        "segments": 4,
        "frames": 16,
        "kv_bytes": nbytes,
        "text_bytes": text,
    }
    assert abs(used - pages(store) - nbytes - text) < 16 * migrations.PAGE_SIZE
    assert store.verify() == []


# -- figures ---------------------------------------------------------------------------------------------------------


def command_s(*argv: str) -> tuple[float, float]:
    """Seconds of a command: within this process, and as a process of its own."""
    begun = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert cli.main(list(argv)) == 0
    inside = time.perf_counter() - begun
    assert printed.getvalue()
    begun = time.perf_counter()
    subprocess.run([sys.executable, "-m", "kvchat", *argv], stdout=subprocess.DEVNULL, check=True)
    return inside, time.perf_counter() - begun


@full
def test_figures_of_many_sessions(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    fill(store, random.Random(0), MANY, 100)
    empty = store.file.with_name("empty.db")
    Store(empty).close()
    lines = [f"{MANY} sessions of 100 messages, {store.stats()['file_bytes'] / 1e6:.0f} MB"]
    for argv in (["ls"], ["ls", "--json"], ["search", "hotel"], ["search", "river"], ["search", "word1"]):
        inside, whole = command_s(*argv, "--store", str(store.file))
        inside = min(inside, *(command_s(*argv, "--store", str(store.file))[0] for _ in range(2)))
        start_up = min(command_s("verify", "--store", str(empty))[1] for _ in range(3))
        lines.append(f"{' '.join(argv)}: {inside:.3f} s, as a process {whole:.3f} s of which start-up {start_up:.3f} s")
    with capsys.disabled():
        print("", *lines, sep="\n")
