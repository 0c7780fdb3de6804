"""Deep checks, repairs, and what is computed again in the background: on a tiny model, through the real worker."""

from __future__ import annotations

import json
import random
import shutil
import sqlite3
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kvchat import probe
from kvchat import worker as worker_module
from kvchat.cli.app import main
from kvchat.config import Config
from kvchat.errors import StoreDamaged
from kvchat.events import Notice, Progress
from kvchat.probe import disagreements, state_of
from kvchat.residence.residence import Residence
from kvchat.store.migrations import PAGE_SIZE
from kvchat.store.store import SegmentRecord, Store
from kvchat.worker import Worker
from tests.test_session import QUESTIONS, SETTINGS, flip_a_bit
from tests.tiny import make_model

FRAME = "SELECT body FROM frames JOIN segments ON segments.id = segment_id WHERE kind = 'sealed' LIMIT 1"
HEADER = "SELECT header FROM segments WHERE kind = 'sealed' ORDER BY start_token LIMIT 1"
TEXT = "SELECT CAST(content AS BLOB) FROM messages WHERE role = 'user' LIMIT 1"


@pytest.fixture(autouse=True)
def short_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "NUM_TOKENS", 8)


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with the session "trip" of five turns, some sealed, some waiting."""
    path = tmp_path_factory.mktemp("played") / "s.db"
    worker = start(path)
    with worker.open("trip") as session:
        for question in [*QUESTIONS, "So?"]:
            session.ask(question)
        assert {segment["kind"] for segment in session.stats()["segments"]} == {"sealed", "open"}
    worker.close()
    return path


@pytest.fixture
def store(played: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copy(played, tmp_path))


def start(path: Path, listener: Any = None, **settings: Any) -> Worker:
    given = {"store.path": str(path), **SETTINGS, **{key.replace("__", "."): v for key, v in settings.items()}}
    return Worker(Config.load(overrides=given), listener, lambda *_: make_model())


def verify(path: Path, capsys: pytest.CaptureFixture[str], *flags: str, code: int = 0) -> str:
    """What `kvchat verify` prints."""
    settings = [part for key, value in SETTINGS.items() for part in ("--set", f"{key}={value}")]

    def tiny_worker(config: Config, listener: Any, key: Any) -> Worker:
        return Worker(config, listener, lambda *_: make_model())

    assert main(["verify", *flags, "--store", str(path), *settings], tiny_worker) == code, capsys.readouterr().err
    return capsys.readouterr().out


def contents(path: Path) -> list[str]:
    store = Store(path)
    said = [message.content for message in store.path(store.session("trip").tip)]
    store.close()
    return said


def change(path: Path, sql: str, *values: object) -> None:
    with sqlite3.connect(path) as database:
        assert database.execute(sql, values).rowcount > 0
    database.close()


def overwrite_page(path: Path, query: str) -> None:
    """Fill the page that holds the middle of a blob with noise."""
    with sqlite3.connect(path) as database:
        [(blob,)] = database.execute(query).fetchall()
    database.close()
    data = bytearray(path.read_bytes())
    place = data.index(blob[len(blob) // 2 : len(blob) // 2 + 64])
    page = place // PAGE_SIZE * PAGE_SIZE
    data[page : page + PAGE_SIZE] = random.Random(0).randbytes(PAGE_SIZE)
    path.write_bytes(data)


def wait_for(condition: Callable[[], bool]) -> None:
    for _ in range(1000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it did not happen")


def test_a_deep_check_records_once_and_then_compares(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = contents(store)
    assert verify(store, capsys, "--deep") == "trip: recorded\nno problems\n"
    assert verify(store, capsys, "trip", "--deep") == "trip: answers as recorded\nno problems\n"
    found = json.loads(verify(store, capsys, "--deep", "--json"))
    assert found == {
        "repaired": [],
        "problems": [],
        "sessions": [{"name": "trip", "outcome": "same", "why": ""}],
    }
    assert contents(store) == said

    change(store, "UPDATE probes SET token_ids = zeroblob(length(token_ids))")
    out = verify(store, capsys, "--deep", code=1)
    assert out.startswith("trip: answers otherwise than recorded\nsession 'trip' answers otherwise than recorded, from")
    assert "--rebuild" in out
    # After a rebuild the KV is another, and nothing is known of it.
    assert verify(store, capsys, "trip", "--deep", "--rebuild") == "trip: recorded\nno problems\n"


def test_another_budget_or_a_further_turn_has_no_record(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    verify(store, capsys, "--deep")
    small = start(store, compress__keep_ratio=0.2, compress__recent_tokens=0)
    with small.open("trip") as session:
        assert session.check().outcome == "recorded"
        assert session.check().outcome == "same"
        session.ask("And then?")
        assert session.check().outcome == "recorded"
    small.close()


def test_a_changed_frame_whose_checksum_is_right_is_found(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    verify(store, capsys, "--deep")
    where = "segment_id = (SELECT id FROM segments WHERE kind = 'open' ORDER BY start_token DESC LIMIT 1)"
    with sqlite3.connect(store) as database:
        [(rowid, body)] = database.execute(f"SELECT rowid, body FROM frames WHERE {where}").fetchall()
        database.execute("UPDATE frames SET body = ? WHERE rowid = ?", [forged(body), rowid])
        grown = [len(forged(body)) - len(body)]
        database.execute(f"UPDATE segments SET nbytes = nbytes + ? WHERE {where.replace('segment_id', 'id', 1)}", grown)
    database.close()
    assert verify(store, capsys) == "no problems\n"
    assert "otherwise than recorded, from token" in verify(store, capsys, "--deep", code=1)


def test_kv_that_is_not_finite_is_a_problem_and_never_recorded(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from kvchat.codecs import frame

    with sqlite3.connect(store) as database:
        [(rowid, old)] = database.execute(
            "SELECT frames.rowid, body FROM frames JOIN segments ON segments.id = segment_id WHERE kind = 'open'"
            " ORDER BY start_token DESC LIMIT 1"
        ).fetchall()
        head, planes = frame.unpack(old, limit=1 << 24)
        # Exact KV may be anything; of `raw` words all ones are no number.
        body = frame.pack(head, {name: plane * 0 + 255 for name, plane in planes.items()})
        database.execute("UPDATE frames SET body = ?, nbytes = ? WHERE rowid = ?", [body, len(body), rowid])
        database.execute(
            "UPDATE segments SET nbytes = length(header) + (SELECT total(nbytes) FROM frames WHERE segment_id = id)"
        )
    database.close()
    assert verify(store, capsys) == "no problems\n"
    out = verify(store, capsys, "--deep", code=1)
    assert out.startswith("trip: gives no answer\nsession 'trip': ") and "not finite; open it with --rebuild" in out
    assert num_recorded(store) == 0
    worker = start(store)
    with worker.open("trip") as session:
        session._call(lambda: list(probe.record(session._conversation, lambda: False)))
    worker.close()
    assert num_recorded(store) == 0


def forged(body: bytes) -> bytes:
    """A sound frame with other rows."""
    from kvchat.codecs import frame

    header, planes = frame.unpack(body, limit=1 << 24)
    return frame.pack(header, {name: plane[::-1].copy() for name, plane in planes.items()})


def test_what_a_live_session_records_holds_after_resuming(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_module, "PROBE_AFTER_S", 0.0)
    worker = start(store)
    with worker.open("trip") as session:
        session.ask("And then?")
        session.settle()
        with sqlite3.connect(store) as database:
            database.execute("DELETE FROM probes")
        database.close()
        session.messages()  # any job begins another quiet time
        wait_for(lambda: num_recorded(store) == 1)
    worker.close()
    worker = start(store)
    with worker.open("trip") as session:
        assert session.check().outcome == "same"
    worker.close()


@pytest.mark.parametrize("chore", ["probe", "mend"])
def test_what_fails_while_nobody_waits_costs_the_user_nothing(
    store: Path, monkeypatch: pytest.MonkeyPatch, chore: str
) -> None:
    told: list[Progress | Notice] = []

    def fail(*_: object) -> Any:
        raise MemoryError("no room")

    if chore == "probe":
        monkeypatch.setattr(worker_module, "PROBE_AFTER_S", 0.0)
        monkeypatch.setattr(probe, "answer", fail)
    else:
        monkeypatch.setattr(Residence, "mend", fail)
    worker = start(store, told.append)
    with worker.open("trip") as session:
        wait_for(lambda: any("MemoryError: no room" in getattr(event, "text", "") for event in told))
        assert session.ask("And then?").text
        session.settle()
    worker.close()
    assert num_recorded(store) == 0 and all("\n" not in getattr(event, "text", "") for event in told)


def test_a_record_of_exact_kv_without_a_segment_is_not_compared_with_what_is_computed_anew(store: Path) -> None:
    worker = start(store, store__disk_budget=1)
    with worker.open("trip") as session:
        residence = session._conversation.residence
        session.ask("And then?")
        session.settle()
        unsaved = session._call(lambda: state_of(session._conversation))
        assert session._call(lambda: state_of(session._conversation)) == unsaved
        assert session.check().outcome == "recorded" and session.check().outcome == "same"
        assert residence.cache.tail_length and not residence.waiting
        with torch.inference_mode():  # as when computed otherwise
            residence.cache.layers[-1].values[:, residence.cache.tail_length - 1] += 1e-3
        assert session._call(lambda: state_of(session._conversation)) != unsaved
        assert session.check().outcome == "recorded"
    worker.close()


def test_a_tail_that_lost_its_segment_has_another_state(store: Path) -> None:
    worker = start(store)
    with worker.open("trip") as session:
        assert session.check().outcome == "recorded"
        conversation = session._conversation
        assert conversation.residence.waiting and probe._unsaved(conversation.residence) == ""
        saved = session._call(lambda: state_of(conversation))
        conversation.residence.waiting.pop()
        assert probe._unsaved(conversation.residence) and session._call(lambda: state_of(conversation)) != saved
    worker.close()


def test_a_segment_that_another_process_sheds_at_once_is_no_failure(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = Store.put_segment

    def put_and_shed(self: Store, record: SegmentRecord, *rest: Any) -> bool:
        put(self, record, *rest)
        self.drop_segment(record.id)
        return True

    monkeypatch.setattr(Store, "put_segment", put_and_shed)
    worker = start(store)
    with worker.open("trip") as session:
        for question in QUESTIONS:
            assert session.ask(question).text
        session.settle()
    worker.close()


def num_recorded(path: Path) -> int:
    with sqlite3.connect(path) as database:
        [(count,)] = database.execute("SELECT count(*) FROM probes").fetchall()
    database.close()
    return int(count)


def test_recording_in_idle_time_ends_when_a_job_comes(store: Path) -> None:
    worker = start(store)
    with worker.open("trip") as session:
        conversation = session._conversation
        asked = list[bool]()

        def stop() -> bool:
            asked.append(True)
            return len(asked) > 3

        session._call(lambda: list(probe.record(conversation, stop)))
        assert len(asked) == 4
        assert session._call(lambda: conversation.store.probe(conversation.info.id)) is None
        before = session.logprobs("And then?", "We left.")
        assert session.check().outcome == "recorded"
        assert session.logprobs("And then?", "We left.") == before
    worker.close()


def test_tokens_that_do_not_say_their_text_are_named(store: Path) -> None:
    worker = start(store)
    worker.open("trip", create=True).append([{"role": "assistant", "content": "  Ümlaut,\ttab \u2028 <|im_end|> end "}])
    with worker.open("trip") as session:
        conversation = session._conversation
        assert session.check().problems == ()
        conversation.path[1] = replace(conversation.path[1], content="Something else")
        conversation.path[2] = replace(conversation.path[2], content="Something else")
        assert [problem.split(":")[0] for problem in disagreements(conversation)] == [
            f"message {number} ({conversation.path[number - 1].role})" for number in (2, 3)
        ]
    worker.close()


def test_a_session_that_is_open_elsewhere_is_not_asked(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    worker = start(store)
    worker.open("trip")
    out = verify(store, capsys, "--deep")
    assert out.startswith("trip: not asked: session 'trip' is open in") and out.endswith("no problems\n")
    verify(store, capsys, "trip", "--deep", code=1)
    worker.close()


def test_what_is_damaged_at_the_end_is_computed_again_while_nobody_waits(store: Path) -> None:
    last = "(SELECT id FROM segments ORDER BY end_token DESC LIMIT 1)"
    flip_a_bit(store, "frames", "body", f"segment_id = {last}")
    told: list[Progress | Notice] = []
    worker = start(store, told.append)
    session = worker.open("trip")
    total = sum(len(message.token_ids) for message in session.messages())
    wait_for(lambda: stored_tokens(store) == total)
    assert any(isinstance(event, Notice) and "damaged and removed" in event.text for event in told)
    assert any(isinstance(event, Progress) and event.phase == "rebuild" for event in told)
    assert session.stats()["num_seen"] == total
    reply = session.ask("And then?")
    assert 0 < reply.usage.cached_tokens < total  # what was computed again is not said to have been cached
    worker.close()


def stored_tokens(path: Path) -> int:
    with sqlite3.connect(path) as database:
        [(end,)] = database.execute("SELECT max(end_token) FROM segments").fetchall()
    database.close()
    return int(end or 0)


def test_computing_again_ends_when_a_job_comes(store: Path) -> None:
    change(store, "DELETE FROM segments")
    worker = start(store)
    with worker.open("trip") as session:
        residence, path = session._conversation.residence, session._conversation.path
        session._call(lambda: list(residence.mend(path, lambda: residence.cache.num_seen > 0)))
        seen = session._call(lambda: residence.cache.num_seen)
        assert 0 < seen < residence.bounds(path)[-1]
        assert session.ask("And then?").text
    worker.close()


@pytest.mark.parametrize(
    ("table", "column", "where"),
    [
        ("frames", "body", "segment_id IN (SELECT id FROM segments WHERE kind = 'sealed')"),
        ("segments", "header", "kind = 'sealed'"),
    ],
)
def test_repair_removes_a_damaged_segment_and_opening_makes_it_again(
    store: Path, capsys: pytest.CaptureFixture[str], table: str, column: str, where: str
) -> None:
    said = contents(store)
    flip_a_bit(store, table, column, where)
    assert "its KV is made again" in verify(store, capsys, code=1)
    out = verify(store, capsys, "--repair")
    assert out.startswith("session 'trip': segment b2:") and out.endswith("no problems\n")
    assert contents(store) == said
    worker = start(store)
    with worker.open("trip") as session:
        assert session.ask("And then?").text
    worker.close()
    assert verify(store, capsys, "--repair") == "no problems\n"


def test_repair_mends_index_and_orphans_and_leaves_text_alone(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change(store, "INSERT INTO messages_fts(rowid, content) VALUES (99, 'ghost')")
    change(store, "INSERT INTO frames VALUES ('b2:none', 0, 0, 1, x'00')")
    change(store, "UPDATE messages SET content = 'forged' WHERE depth = 2")
    repaired = json.loads(verify(store, capsys, "--repair", "--json", code=1))
    assert repaired["repaired"] == [
        "the search index was made anew",
        "1 rows of frames without a segment were removed",
    ]
    [problem] = repaired["problems"]
    assert "was altered; restore a copy" in problem
    assert contents(store)[2] == "forged"


def test_a_page_of_frames_full_of_noise_is_a_miss_until_it_is_repaired(
    store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = contents(store)
    overwrite_page(store, FRAME)
    assert "`kvchat verify --repair` mends it" in verify(store, capsys, code=1)
    told: list[Progress | Notice] = []
    worker = start(store, told.append)
    with worker.open("trip") as session:
        for question in ("And then?", "And after that?", "Where did it end?"):
            assert session.ask(question).text
            session.settle()
    worker.close()
    assert contents(store)[: len(said)] == said
    assert len(contents(store)) == len(said) + 6
    notices = [event.text for event in told if isinstance(event, Notice)]
    assert notices and all("\n" not in notice for notice in notices)
    assert any("kvchat verify --repair" in notice for notice in notices)

    out = verify(store, capsys, "--repair")
    assert "written anew without its damaged pages" in out and out.endswith("no problems\n")
    worker = start(store)
    with worker.open("trip") as session:
        assert session.ask("And now?").text
    worker.close()
    assert verify(store, capsys) == "no problems\n"
    assert not list(store.parent.glob("*salvage*"))


def test_a_page_of_the_list_of_segments_full_of_noise_is_one_line_and_can_be_repaired(
    store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = contents(store)
    overwrite_page(store, HEADER)
    worker = start(store)
    with pytest.raises(StoreDamaged, match="`kvchat verify --repair` saves what it can") as caught:
        worker.open("trip")
    assert "\n" not in str(caught.value)
    worker.close()
    assert verify(store, capsys, "--repair").endswith("no problems\n")
    assert contents(store) == said


def test_a_page_of_text_full_of_noise_is_not_repaired(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overwrite_page(store, TEXT)
    before = store.read_bytes()
    opened = Store(store)
    assert "restore a copy" in opened.verify()[0]
    with pytest.raises(StoreDamaged, match="nothing was changed"):
        opened.repair()
    opened.close()
    assert store.read_bytes() == before and not list(store.parent.glob("*salvage*"))
