"""The database file: deletion that leaves no bytes, damage, other processes, versions, verify and vacuum."""

from __future__ import annotations

import sqlite3
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import typer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlite_utils import Database

from kvchat.cli.app import main
from kvchat.errors import StoreDamaged, StoreError
from kvchat.locks import SessionLock
from kvchat.store import salvage
from kvchat.store.migrations import PAGE_SIZE, open_database
from kvchat.store.store import SegmentRecord, Store
from tests.store_parts import FINGERPRINT, MODEL, Frames, bytes_on_disk, converse, say, segment, talk

SECRET = "periwinkle zanzibarwhistle"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "kvchat.db"


@pytest.fixture
def store(path: Path) -> Iterator[Store]:
    store = Store(path, busy_timeout_s=0.05)
    yield store
    store.close()


def execute(path: Path, *statements: str) -> None:
    """Tamper with the file as another program might."""
    connection = sqlite3.connect(path, isolation_level=None)
    for statement in statements:
        connection.execute(statement)
    connection.close()


def test_what_was_written_is_there_after_reopening(path: Path) -> None:
    store = Store(path)
    _, chain = converse(store, "trip", "Hello", "Hi")
    record, frames = segment(chain, 0, 2)
    store.put_segment(record, frames)
    store.close()
    assert [file.name for file in path.parent.iterdir()] == ["kvchat.db"]
    store = Store(path)
    assert store.path(store.session("trip").tip) == chain
    assert list(store.frames(record.id, [0, 1])) == frames and store.verify() == []
    store.close()


def test_only_the_owner_may_read_the_file(store: Store, path: Path) -> None:
    converse(store, "trip", "Hello")
    assert {stat.S_IMODE(file.stat().st_mode) for file in path.parent.glob("kvchat.db*")} == {0o600}


def test_only_the_owner_may_enter_a_folder_that_the_store_made(tmp_path: Path) -> None:
    Store(tmp_path / "made" / "kvchat.db").close()
    assert stat.S_IMODE((tmp_path / "made").stat().st_mode) == 0o700


def test_deleted_text_is_nowhere_in_the_file_or_its_log(store: Store, path: Path) -> None:
    _, kept = converse(store, "kept", "an ordinary question", "an ordinary answer")
    info, chain = converse(store, "secret plan", SECRET, f"{SECRET} " * 3000, "more")
    store.set_tip(info.id, chain[0].id)
    store.add_messages(info.id, [say(chain[0], "assistant", f"another answer about {SECRET}")], chain[0].id)
    mark = b"kv of the secret"
    record, frames = segment(chain, 0, 3)
    store.put_segment(record, [(chunk, grp, mark * 5000 + body) for chunk, grp, body in frames])
    store.put_segment(*segment(kept, 0, 2))
    words = [
        b"periwinkle",
        b"periwinkl",
        b"zanzibarwhistl",
        b"secret plan",
        mark,
        chain[1].id.encode(),
        chain[1].id[3:].encode(),
    ]
    assert all(any(word in data for data in bytes_on_disk(path)) for word in words)
    store.delete("secret plan")
    assert not [word for word in words if any(word in data for data in bytes_on_disk(path))]
    assert store.verify() == [] and store.stats()["free_bytes"] == 0
    assert (path.stat().st_size, path.with_name("kvchat.db-wal").stat().st_size) == (store.stats()["file_bytes"], 0)
    assert store.path(store.session("kept").tip) == kept and store.search("ordinary") and not store.search("periwinkle")


def test_deleting_a_session_keeps_what_a_fork_still_needs(store: Store) -> None:
    _, chain = converse(store, "trip", "one", "two", "three", "four")
    fork = store.fork("trip", "trip-2", chain[1].id)
    shared, crossing = segment(chain, 0, 2), segment(chain, 0, 4)
    for parts in (shared, crossing, segment(chain, 2, 4)):
        store.put_segment(*parts)
    store.delete("trip")
    assert store.path(fork.tip) == chain[:2] and store.path(chain[3].id) == []
    assert [record.id for record, _ in store.cover([message.id for message in chain], "f1")] == [shared[0].id]
    assert store.segment(crossing[0].id) is None and store.stats()["segments"] == 1 and store.verify() == []
    store.delete("trip-2")
    assert {store.stats()[key] for key in ("sessions", "messages", "segments", "frames")} == {0}


def archive(store: Store, parts: tuple[SegmentRecord, Frames], basis: bytes) -> str:
    record = replace(parts[0], basis=basis)
    store.put_segment(record, parts[1])
    return record.id


@pytest.mark.parametrize("shed_before", [False, True])
def test_a_basis_that_was_fitted_to_deleted_text_goes_from_the_forks_too(store: Store, shed_before: bool) -> None:
    _, chain = converse(store, "trip", "one", "two", "three", "four")
    _, alone = converse(store, "alone", "five", "six")
    store.fork("trip", "fork", chain[1].id)
    store.fork("trip", "whole", chain[3].id)
    shared, own = (archive(store, segment(chain, *part), b"of all four") for part in ((0, 2), (2, 4)))
    other = archive(store, segment(alone, 0, 2), b"of another")
    if shed_before:
        store.drop_segment(own)
    store.delete("trip")
    assert store.segment(shared)  # no text is gone
    store.delete("whole")
    assert store.segment(shared) is None and store.segment(other) is not None
    assert [bytes(row["body"]) for row in store._rows("SELECT body FROM bases")] == [b"of another"]
    assert store.path(store.session("fork").tip) == chain[:2] and store.verify() == []


def test_another_session_that_got_the_name_while_the_user_was_asked_is_not_deleted(
    path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(path)
    converse(store, "trip", "old")

    def confirm(*_: object, **__: object) -> bool:
        store.rename("trip", "kept")
        locks.append(SessionLock(path, converse(store, "trip", "new")[0].id, "trip"))
        return True

    locks: list[SessionLock] = []
    monkeypatch.setattr(typer, "confirm", confirm)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    assert main(["rm", "trip", "--store", str(path)]) == 1
    assert "another session was named 'trip' meanwhile" in capsys.readouterr().err
    assert {info.name: info.title for info in store.sessions()} == {"kept": "old", "trip": "new"}
    locks[0].release()
    store.close()


def test_a_reader_that_keeps_the_bytes_alive_is_reported(store: Store, path: Path) -> None:
    converse(store, "secret plan", SECRET)
    reader = sqlite3.connect(path)
    rows = reader.execute("SELECT content FROM messages UNION ALL SELECT name FROM sessions")
    rows.fetchone()
    with pytest.raises(StoreError, match=r"'secret plan' is deleted, but another kvchat kept .* `kvchat vacuum`"):
        store.delete("secret plan")
    assert store.sessions() == []
    rows.close()
    reader.close()
    store.vacuum()
    assert not any(b"periwinkle" in data for data in bytes_on_disk(path))


actions = st.lists(
    st.tuples(st.sampled_from(["say", "rewind", "fork", "delete", "seal"]), st.integers(0, 7)), max_size=25
)


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(actions)
def test_exactly_what_some_session_reaches_stays(store: Store, steps: list[tuple[str, int]]) -> None:
    for info in store.sessions():
        store.delete(info.name)
    store.create_session("s", MODEL, FINGERPRINT)
    reached: dict[str, set[str]] = {"s": set()}
    for number, (action, choice) in enumerate(steps):
        name = sorted(reached)[choice % len(reached)]
        info = store.session(name)
        chain = store.path(info.tip)
        if action == "say":
            new = talk(chain[-1] if chain else None, f"{choice % 3}", "yes")
            store.add_messages(info.id, new, info.tip)
            reached[name] |= {message.id for message in new}
        elif action == "rewind":
            store.set_tip(info.id, chain[choice % len(chain)].id if chain and choice else None)
        elif action == "fork":
            cut = choice % (len(chain) + 1)
            store.fork(name, f"f{number}", chain[cut - 1].id if cut else None)
            reached[f"f{number}"] = {message.id for message in chain[:cut]}
        elif action == "seal" and chain:
            first = choice % len(chain)
            store.put_segment(*segment(chain, first, len(chain), num_chunks=1, num_groups=1))
        elif action == "delete" and len(reached) > 1:
            store.delete(name)
            del reached[name]
    held = {row["id"] for row in store._rows("SELECT id FROM messages")}
    assert held == set().union(*reached.values())
    assert store.verify() == []


def test_a_reader_sees_what_is_committed_while_another_writes(store: Store, path: Path) -> None:
    info, chain = converse(store, "trip", "Hello", "Hi")
    record, frames = segment(chain, 0, 2)
    other = Store(path, busy_timeout_s=0)
    seen = []

    def watched() -> Iterator[tuple[int, int, bytes]]:
        for entry in frames:
            seen.append((other.session("trip").num_turns, other.segment(record.id)))
            yield entry

    store.put_segment(record, watched())
    assert seen == [(1, None)] * 4
    assert other.segment(record.id) is not None
    store.add_messages(info.id, talk(chain[-1], "More"), chain[-1].id)
    assert other.session("trip").num_turns == 2
    other.close()


def test_a_second_writer_is_told_to_wait(store: Store, path: Path) -> None:
    _, chain = converse(store, "trip", "Hello", "Hi")
    record, frames = segment(chain, 0, 2)
    other = Store(path, busy_timeout_s=0)

    def interrupting() -> Iterator[tuple[int, int, bytes]]:
        with pytest.raises(StoreError, match=r"kvchat\.db is busy: another kvchat is writing to it; try again"):
            other.create_session("other", MODEL, FINGERPRINT)
        yield from frames

    store.put_segment(record, interrupting())
    other.create_session("other", MODEL, FINGERPRINT)
    other.close()
    assert len(store.sessions()) == 2


def test_a_process_that_is_killed_while_writing_loses_only_that(store: Store, path: Path) -> None:
    info, chain = converse(store, "trip", "Hello", "Hi")
    code = f"""
import os
from pathlib import Path
from kvchat.store.store import Store
from tests.store_parts import say, segment
store = Store(Path({str(path)!r}))
chain = store.path({chain[-1].id!r})
more = say(chain[-1], "user", "saved before the kill")
store.add_messages({info.id}, [more], chain[-1].id)
record, frames = segment([*chain, more], 0, 3)
def dying():
    yield frames[0]
    os._exit(9)
store.put_segment(record, dying())
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 9
    assert store.path(store.session("trip").tip)[-1].content == "saved before the kill"
    assert store.stats()["segments"] == store.stats()["frames"] == 0 and store.verify() == []


@pytest.mark.parametrize(
    "content", [b"x", b"no database at all, only text. " * 100, b"SQLite format 3\0" + b"\xff" * 5000]
)
def test_a_file_that_is_no_database_is_refused_and_left_as_it_is(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(
        StoreError,
        match=r"(is damaged \(.*\); restore a copy, or move it away|is encrypted, or damaged: give its key).*: no",
    ) as error:
        Store(path)
    assert "\n" not in str(error.value)
    assert path.read_bytes() == content


def test_an_empty_file_becomes_a_store(path: Path) -> None:
    path.touch()
    store = Store(path)
    converse(store, "trip", "Hello")
    store.close()


def test_the_database_of_another_program_is_refused_and_left_as_it_is(path: Path) -> None:
    execute(path, "CREATE TABLE cookies (jar TEXT)")
    before = path.read_bytes()
    with pytest.raises(StoreError, match="is a database of another program; choose another file with --store"):
        Store(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "change",
    [
        "INSERT INTO _sqlite_migrations(migration_set, name, applied_at) VALUES ('kvchat', 'm999_later', 'then')",
        "UPDATE meta SET value = '2' WHERE key = 'format'",
    ],
)
def test_a_newer_schema_is_refused_and_left_as_it_is(path: Path, change: str) -> None:
    Store(path).close()
    execute(path, change)
    before = path.read_bytes()
    with pytest.raises(
        StoreError, match="was written by a newer kvchat; update kvchat to open it: nothing was changed"
    ):
        Store(path)
    assert path.read_bytes() == before


def test_a_truncated_file_is_refused_and_left_as_it_is(path: Path) -> None:
    store = Store(path)
    _, chain = converse(store, "trip", "Hello " * 10_000, "Hi")
    store.put_segment(*segment(chain, 0, 2))
    store.close()
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(StoreError, match="is damaged"):
        Store(path)
    assert path.read_bytes() == whole[: len(whole) // 2]


def test_a_malformed_page_is_one_line_and_never_a_traceback(path: Path) -> None:
    store = Store(path)
    converse(store, "trip", *(f"message {number}" * 50 for number in range(200)))
    store.close()
    whole = bytearray(path.read_bytes())
    page = sqlite3.connect(path).execute("SELECT rootpage FROM sqlite_master WHERE name = 'messages'").fetchone()[0]
    whole[(page - 1) * 16_384 : page * 16_384] = b"\xee" * 16_384
    path.write_bytes(whole)
    store = Store(path)
    with pytest.raises(StoreError, match="is damaged") as error:
        store.session("trip")
    assert "\n" not in str(error.value)
    problems = store.verify()
    assert problems and all("restore a copy" in line and "\n" not in line for line in problems)
    store.close()


def test_a_place_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match=r"cannot be made .*; choose another file with --store"):
        Store(tmp_path / "file" / "kvchat.db")
    with pytest.raises(StoreError, match=r"cannot be opened .* --store"):
        Store(tmp_path)


def test_a_file_that_may_only_be_read_is_read(store: Store) -> None:
    _, chain = converse(store, "trip", "Hello")
    store._db.execute("PRAGMA query_only = ON")
    assert store.path(store.session("trip").tip) == chain and store.search("hello")
    with pytest.raises(StoreError, match=r"cannot be written .*; allow writing"):
        store.rename("trip", "other")


def test_vacuum_gives_space_back(store: Store) -> None:
    _, chain = converse(store, "trip", "Hello", "Hi")
    record, frames = segment(chain, 0, 2)
    store.put_segment(record, [(chunk, grp, bytes(500_000)) for chunk, grp, _ in frames])
    store.drop_segment(record.id)
    before, after = store.vacuum()
    # An empty store takes a page of 16 KiB for each table and index, 36 of them.
    assert before > 2_000_000 and after < 600_000 and after == store.stats()["file_bytes"]
    assert store.search("hello") and store.verify() == []


@pytest.mark.parametrize(
    ("harm", "found"),
    [
        ("UPDATE messages SET content = 'Hallo' WHERE depth = 0", ["session 'trip': message b2:", "was altered"]),
        ("UPDATE messages SET token_ids = x'01000000' WHERE depth = 1", ["'trip': message b2:", "was altered"]),
        ("UPDATE messages SET turn = 7 WHERE depth = 1", ["'trip': message b2:", "was altered; restore a copy"]),
        ("UPDATE messages SET token_ids = x'0100' WHERE depth = 1", ["CHECK constraint failed", "restore a copy"]),
        ("DELETE FROM messages WHERE depth = 0", ["'trip': message b2:", "is missing, with all before it; restore"]),
        ("UPDATE sessions SET tip = 'b2:00'", ["session 'trip': message b2:00 is missing"]),
        ("UPDATE branches SET tip = 'b2:01'", ["session 'trip': message b2:01 is missing"]),
        ("UPDATE segments SET end_token = 5", ["'trip': segment b2:sealed", "its tokens [0, 5) are not"]),
        ("UPDATE segment_messages SET ordinal = 1 - ordinal + 5", ["segment b2:sealed", "do not follow each other"]),
        ("DELETE FROM segment_messages", ["segment b2:sealed", "do not follow each other; its KV is made again"]),
        ("DELETE FROM frames WHERE chunk = 1 AND grp = 0", ["segment b2:sealed", "chunk 1: group 0 is missing"]),
        ("UPDATE frames SET body = x'00' WHERE chunk = 1", ["'trip': segment b2:", "chunk 1: the frame is cut short"]),
        ("UPDATE segments SET header = x'00'", ["segment b2:sealed", "header: the frame is cut short: 1 bytes"]),
        ("UPDATE segments SET nbytes = nbytes + 1", ["segment b2:sealed", "bytes in 4 frames, and should have"]),
        ("INSERT INTO frames VALUES ('b2:none', 0, 0, 1, x'00')", ["1 rows of frames", "--repair` mends"]),
        ("INSERT INTO messages_fts(rowid, content) VALUES (99, 'ghost')", ["search index", "--repair` mends"]),
    ],
)
def test_verify_finds_and_names(path: Path, harm: str, found: list[str]) -> None:
    store = Store(path)
    info, chain = converse(store, "trip", "Hello", "Hi", "And?")
    store.put_segment(*segment(chain, 0, 2))
    store.set_tip(info.id, chain[1].id)
    assert store.verify() == store.verify("trip") == []
    store.close()
    execute(path, "PRAGMA ignore_check_constraints = ON", harm)
    store = Store(path)
    problems = store.verify()
    assert any(all(part in line for part in found) for line in problems), problems
    assert not any("\n" in line for line in problems)
    store.close()


def test_a_flipped_bit_of_a_frame_is_found_in_its_chunk(store: Store) -> None:
    _, chain = converse(store, "trip", "Hello", "Hi")
    record, frames = segment(chain, 0, 2)
    chunk, grp, body = frames[3]
    frames[3] = chunk, grp, body[:-1] + bytes([body[-1] ^ 1])
    store.put_segment(record, frames)
    [problem] = store.verify()
    assert "'trip'" in problem and "chunk 1: the frame is damaged" in problem and "made again" in problem


def test_verify_of_one_session_looks_at_its_own_segments(store: Store) -> None:
    _, sound = converse(store, "sound", "Hello", "Hi")
    _, broken = converse(store, "broken", "Bonjour", "Salut")
    store.put_segment(*segment(sound, 0, 2))
    store.put_segment(*segment(broken, 0, 2))
    store.fork("broken", "fork", broken[1].id)
    store._db.execute("DELETE FROM frames WHERE chunk = 0 AND segment_id = ?", [segment(broken, 0, 2)[0].id])
    assert store.verify("sound") == []
    [problem] = store.verify("broken")
    assert problem.startswith("session 'broken': segment ")
    [problem] = store.verify()
    assert problem.startswith("session 'broken', 'fork': segment ")


def test_vacuum_mends_the_search_index_and_drops_frames_without_a_segment(path: Path) -> None:
    store = Store(path)
    converse(store, "trip", "Hello")
    store.close()
    execute(path, "INSERT INTO messages_fts(rowid, content) VALUES (99, 'ghost')")
    execute(path, "INSERT INTO frames VALUES ('b2:none', 0, 0, 1, x'00')")
    store = Store(path)
    assert len(store.verify()) == 2
    store.vacuum()
    assert store.verify() == [] and store.search("hello") and not store.search("ghost")
    store.close()


def long_sessions(path: Path) -> None:
    """Two sessions whose messages fill many pages."""
    store = Store(path)
    for name in ("old", "new"):
        converse(store, name, *(f"{name} message {number} {'x' * 300}" for number in range(80)))
    store.close()


def hide_rows(path: Path, text: bytes) -> None:
    """Have the page of a table that holds `text` say that it has half its rows: a scan then reports no error."""
    data = bytearray(path.read_bytes())
    pages = [page for page in range(PAGE_SIZE, len(data), PAGE_SIZE) if data[page] == 0x0D]
    [page] = [page for page in pages if text in data[page : page + PAGE_SIZE] and b"b2:" in data[page:][:PAGE_SIZE]]
    data[page + 3 : page + 5] = (int.from_bytes(data[page + 3 : page + 5]) // 2).to_bytes(2)
    path.write_bytes(data)


def test_repair_does_not_take_rows_that_a_page_hides_for_deleted(path: Path) -> None:
    long_sessions(path)
    hide_rows(path, b"old message 60 ")
    before = path.read_bytes()
    store = Store(path)
    with pytest.raises(StoreDamaged, match="restore a copy of the database: nothing was changed"):
        store.repair()
    with pytest.raises(StoreDamaged, match=r"table messages .the index .* does not have its .* nothing was changed"):
        store.mend_pages()  # though nobody had looked before
    store.close()
    assert path.read_bytes() == before and [file.name for file in path.parent.iterdir()] == ["kvchat.db"]


@pytest.mark.parametrize(
    ("harm", "found"),
    [
        ("DELETE FROM messages WHERE depth = 1", "is not there"),
        ("UPDATE messages SET content = 'Hallo' WHERE depth = 1", "was altered"),
        ("UPDATE messages SET role = 'nobody' WHERE depth = 1", "CHECK constraint failed"),
        ("UPDATE sessions SET tip = 'b2:00'", "is not there"),
    ],
)
def test_pages_are_not_mended_with_a_copy_that_lacks_text(path: Path, harm: str, found: str) -> None:
    store = Store(path)
    _, chain = converse(store, "trip", "Hello", "Hi", "And?")
    store.put_segment(*segment(chain, 0, 2))
    store.close()
    execute(path, "PRAGMA ignore_check_constraints = ON", harm)
    store = Store(path)
    with pytest.raises(StoreDamaged, match=found):
        store.mend_pages()
    store.close()
    assert [file.name for file in path.parent.iterdir()] == ["kvchat.db"]


def test_mending_pages_keeps_all_text_and_sound_kv_and_lets_go_of_the_file(store: Store, path: Path) -> None:
    _, chain = converse(store, "trip", "Hello", "Hi")
    sound, broken = segment(chain, 0, 2), segment(chain, 1, 2)
    store.put_segment(*sound)
    store.put_segment(*broken)
    execute(path, f"UPDATE segment_messages SET message_id = 'b2:00' WHERE segment_id = '{broken[0].id}'")
    store.mend_pages()
    other = Store(path, busy_timeout_s=0)
    assert other.path(other.session("trip").tip) == chain and other.verify() == []
    assert other.segment(sound[0].id) is not None and other.segment(broken[0].id) is None
    other.add_messages(other.session("trip").id, talk(chain[-1], "More"), chain[-1].id)
    assert len(store.path(store.session("trip").tip)) == 3
    other.close()


def test_while_pages_are_mended_nobody_else_writes(store: Store, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    converse(store, "trip", "Hello", "Hi")
    fill, refused, modes = salvage.fill, list[str](), set[int]()

    def interrupted(copy: Database, db: Database) -> None:
        fill(copy, db)
        modes.update(stat.S_IMODE(file.stat().st_mode) for file in path.parent.glob(".kvchat.db.kvchat-salvage*"))
        with pytest.raises(StoreError, match="is busy") as caught:
            Store(path, busy_timeout_s=0)
        refused.append(str(caught.value))

    monkeypatch.setattr(salvage, "fill", interrupted)
    store.mend_pages()
    assert len(refused) == 1 and modes == {0o600}
    other = Store(path, busy_timeout_s=0)
    with pytest.raises(StoreError, match=r"kvchat\.db is busy: another kvchat is writing to it; try again"):
        store.mend_pages()
    other.rename("trip", "rome")
    other.close()
    assert store.session("rome").num_turns == 1


def test_writing_pages_back_does_not_wait_for_ever(path: Path) -> None:
    Store(path).close()
    writer = sqlite3.connect(path, isolation_level=None)
    writer.execute("BEGIN IMMEDIATE")
    source, target = sqlite3.connect(":memory:"), sqlite3.connect(path, timeout=0)
    with pytest.raises(sqlite3.OperationalError, match="locked") as caught:
        source.backup(target, progress=salvage._until(0.0))
    assert caught.value.sqlite_errorcode == sqlite3.SQLITE_BUSY
    for connection in (writer, source, target):
        connection.close()


@pytest.mark.parametrize("mends", [Store.mend_pages, Store.vacuum, lambda store: store.delete("trip")])
def test_what_a_killed_repair_left_is_removed(store: Store, path: Path, mends: Callable[[Store], object]) -> None:
    _, chain = converse(store, "trip", "Hello", SECRET)
    store.put_segment(*segment(chain, 0, 2))
    copy = open_database(salvage.copy_beside(path), 10.0)
    salvage.fill(copy, store._db)
    assert any(b"periwinkle" in file.read_bytes() for file in path.parent.glob("*salvage*"))
    with copy.conn:
        copy.execute("CREATE TEMP TABLE stale AS SELECT * FROM segments")
        copy.execute("UPDATE stale SET id = 'b2:stale'")
        copy.execute("INSERT INTO segments SELECT * FROM stale")
    mends(store)
    assert store.segment("b2:stale") is None
    assert not list(path.parent.glob("*salvage*")) and store.verify() == []
    copy.close()
