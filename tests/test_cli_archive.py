"""Facts about `kvchat archive`: what it writes anew and what not, for whom, and what it says of that."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from kvchat import recode
from kvchat.cli.app import main
from kvchat.codecs import encode_segment
from kvchat.errors import SessionBusy
from kvchat.fingerprint import fingerprint_id
from kvchat.locks import SessionLock
from kvchat.store.records import segment_id
from kvchat.store.store import Message, SegmentRecord, Store
from tests.store_parts import FINGERPRINT, converse, segment, talk
from tests.test_codecs import normal, random_ranking
from tests.test_recode import worker
from tests.test_session import QUESTIONS

SHAPE = (2, 2, 90, 16)
CODEC = ["k8v8", "k4v4"]
MODEL = fingerprint_id(FINGERPRINT)


def put(store: Store, path: Sequence[Message], index: int, codecs: Sequence[str] = CODEC) -> str:
    """Seal two messages of 45 tokens each, random numbers in four chunks."""
    first, last = path[2 * index], path[2 * index + 1]
    ranking, name = random_ranking(*SHAPE[:3], 4, 90 * index), ",".join(codecs)
    keys, values = (normal(*SHAPE, torch.bfloat16, index + seed) for seed in (0, 50))
    header, frames = encode_segment(codecs, list(keys), list(values), ranking)
    record = SegmentRecord(
        *(segment_id(MODEL, "sealed", "random", name, first.id, last.id), MODEL, 90 * index, 90 * index + 90, "sealed"),
        codec=name,
        scorer="random",
        messages=(first.id, last.id),
        header=header.to_bytes(),
        num_chunks=4,
        num_groups=header.num_groups,
        stored_chunks=4,
    )
    store.put_segment(record, frames)
    return record.id


def begin(store: Store, number: int = 3, codecs: Sequence[str] = CODEC) -> list[Message]:
    """The session "trip" with so many sealed segments."""
    _, path = converse(store, "trip", *("x" * 43 for _ in range(2 * number)))
    for index in range(number):
        put(store, path, index, codecs)
    return path


def codecs(store: Store) -> list[str]:
    return [row["codec"] for row in store._rows("SELECT codec FROM segments ORDER BY start_token, created")]


@pytest.fixture
def database(tmp_path: Path) -> Path:
    return tmp_path / "s.db"


@pytest.fixture
def run(database: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    def run(*argv: str, code: int = 0) -> Any:
        assert main([argv[0], "--store", str(database), *argv[1:]]) == code
        out, err = capsys.readouterr()
        return err if code else json.loads(out) if "--json" in argv else out

    return run


# -- other sessions --------------------------------------------------------------------------------------------------


def test_no_session_that_shares_a_segment_can_be_opened_meanwhile(
    database: Path, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(database)
    path = begin(store)
    shares, apart = store.fork("trip", "shares", path[1].id), converse(store, "apart", "y" * 43)[0]
    plainly, tried = recode.recode, list[bool]()

    def slow(*given: Any) -> list[SegmentRecord]:
        for info in (shares, apart):
            try:
                SessionLock(database, info.id, info.name).release()
                tried.append(True)
            except SessionBusy:
                tried.append(False)
        return plainly(*given)

    monkeypatch.setattr(recode, "recode", slow)
    assert run("archive", "trip", "--json")["recoded"] == 3
    assert tried == [False, True]
    SessionLock(database, shares.id, shares.name).release()
    store.close()


def test_what_an_open_session_shares_is_left_and_who_else_shares_is_named(database: Path, run: Any) -> None:
    store = Store(database)
    path = begin(store)
    f2, _ = store.fork("trip", "f2", path[1].id), store.fork("trip", "f3", path[3].id)
    with SessionLock(database, f2.id, "f2"):
        first, *rest = run("archive", "trip").splitlines()
    assert first.startswith("trip: 2 of 3 segments; ")
    assert rest == ["1 is in use by 'f2', which is open", "shared with, and so written anew for, 'f3'"]
    assert codecs(store) == ["k8v8,k4v4", "archive", "archive"]
    said = run("archive", "trip", "--json")
    assert (said["recoded"], said["few_bits"], said["shared_with"]) == (1, 2, ["f3", "f2"])
    assert len(store._rows("SELECT id FROM bases")) == 1
    store.close()


def test_a_segment_that_only_a_branch_of_another_session_holds_is_shared_too(database: Path, run: Any) -> None:
    store = Store(database)
    path = begin(store)
    other = store.fork("trip", "other", path[-1].id)
    store.set_tip(other.id, path[1].id)
    with SessionLock(database, other.id, "other"):
        assert run("archive", "trip", "--json")["in_use"] == 3
    store.close()


def test_the_branches_of_a_session_go_with_it(database: Path, run: Any) -> None:
    store = Store(database)
    path, info = begin(store), store.session("trip")
    store.set_tip(info.id, path[3].id)
    other = talk(path[3], "y" * 43, "z" * 43)
    store.add_messages(info.id, other, path[3].id)
    put(store, [*path[:4], *other], 2)
    assert store.branches(info.id) == [path[-1].id]
    assert run("archive", "trip", "--json")["recoded"] == 4
    assert codecs(store) == ["archive"] * 4 and store.verify() == []
    store.close()


# -- what has few bits already ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "asked"),
    [
        (["k4v4"], "k8v8"),
        (["k4v4"], "raw"),
        (["k4v4"], "eb5"),
        (["eb10"], "k4v4"),
        (["k8v4"], "k8v4, k8v4,k8v4"),
        (["k4v4", "k4v4"], "k4v4"),
        (["k8v8", "k2v2"], "k8v8,k3v3"),
        (["k8v8", "k2v2"], "k8v4"),  # its first chunk alone has more
    ],
)
def test_what_would_have_no_fewer_bits_is_left(database: Path, run: Any, old: list[str], asked: str) -> None:
    store = Store(database)
    begin(store, 1, old)
    before = store._rows("SELECT id, nbytes FROM segments")[0]
    [first, second] = run("archive", "trip", "--codec", asked).splitlines()
    assert first.startswith("trip: 0 of 1 segments; ")
    assert second == "all is written with as few bits already"
    assert tuple(store._rows("SELECT id, nbytes FROM segments")[0]) == tuple(before)
    store.close()


@pytest.mark.parametrize(
    ("old", "asked", "name"),
    [(["raw"], "eb2", "eb2"), (["k8v8", "k4v4"], "k4v4,k4v4", "k4v4"), (["k8v8"], " k8v8 , k4v4", "k8v8,k4v4")],
)
def test_what_would_have_fewer_bits_is_written_anew(
    database: Path, run: Any, old: list[str], asked: str, name: str
) -> None:
    store = Store(database)
    begin(store, 1, old)
    said = run("archive", "trip", "--codec", asked, "--json")
    assert said["recoded"] == 1 and said["codec"] == name and said["bytes_after"] < said["bytes_before"]
    assert codecs(store) == [name]
    store.close()


@pytest.mark.parametrize("wrong", ["archive,k4v4", "", "k4v4,", "k1v1", "k4v4;k4v4"])
def test_a_wrong_codec_is_one_line_that_names_the_known_ones(database: Path, run: Any, wrong: str) -> None:
    Store(database).close()
    said = run("archive", "trip", "--codec", wrong, code=1)
    assert said.startswith(f"kvchat: --codec {wrong!r} is none; known: raw, k8v8, ") and said.count("\n") == 1
    assert "eb20" in said and "archive by itself" in said


# -- what it says ----------------------------------------------------------------------------------------------------


def test_what_is_left_is_explained_and_what_is_free_named(database: Path, run: Any) -> None:
    store = Store(database)
    path = begin(store, 4)
    record, frames = segment(path, 6, 8, "open", MODEL)
    store._db.execute("DELETE FROM segments WHERE start_token = 270")
    store._db.conn.commit()
    store.put_segment(record, frames)
    store.close()
    first, second = run("archive", "trip").splitlines()
    assert first.startswith("trip: 3 of 4 segments; ") and second == "1 is waiting to be sealed"
    free = run("archive", "trip", "--json")["bytes_free"]
    assert free > 0 and first.endswith("; `kvchat vacuum` gives " + first.split("gives ")[1])
    assert run("archive", "trip").splitlines()[1] == "3 are archived already; 1 is waiting to be sealed"
    run("vacuum")
    assert "vacuum" not in run("archive", "trip")


def test_all_that_is_archived_is_said_so(database: Path, run: Any) -> None:
    store = Store(database)
    begin(store)
    store.close()
    run("archive", "trip")
    assert run("archive", "trip").splitlines()[1:] == ["all are archived already"]


def test_every_command_counts_what_segments_share_and_once(database: Path, run: Any) -> None:
    store = Store(database)
    begin(store)
    after = run("archive", "trip", "--json")["bytes_after"]
    shared = store._rows("SELECT length(body) AS nbytes FROM bases")[0]["nbytes"]
    assert after == sum(row["nbytes"] for row in store._rows("SELECT nbytes FROM segments")) + shared
    [listed] = run("ls", "--json")
    with SessionLock(database, store.session("trip").id, "trip"):  # what is open elsewhere is read from the store
        stats = run("stats", "trip", "--json")
    assert listed["nbytes"] == stats["bytes_on_disk"] == store.stats()["kv_bytes"] == after
    assert sum(one["bytes_on_disk"] for one in stats["segments"]) == after - shared
    store.close()


def test_an_open_session_counts_as_the_listing_does(database: Path, run: Any) -> None:
    running = worker(database)
    with running.open("trip") as session:
        for question in QUESTIONS:
            session.ask(question)
    running.close()
    after = run("archive", "trip", "--json")["bytes_after"]
    running = worker(database)
    with running.open("trip") as session:
        stats = session.stats()
        [listed] = running.sessions()
    running.close()
    assert stats["bytes_on_disk"] == listed.nbytes == after > sum(one["bytes_on_disk"] for one in stats["segments"])
