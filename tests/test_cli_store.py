"""Facts about the commands that read and write the store, on a real one."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kvchat import planning
from kvchat.cli.app import main
from kvchat.store.store import LONGEST_NAME, Message, Store
from kvchat.utility import MEMORY, Decision, Place
from tests.fake_worker import FakeWorker

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def worker() -> FakeWorker:
    return FakeWorker()


@pytest.fixture
def database(tmp_path: Path) -> Path:
    """A store with the session "trip" of two turns."""
    path = tmp_path / "kvchat.db"
    store = Store(path)
    session = store.create_session("trip", "tiny", {"weights": "x"})
    messages: list[Message] = []
    spoken = [
        ("system", ""),
        ("user", "Where is Rome?"),
        ("assistant", "In Italy."),
        ("user", "And Oslo?"),
        ("assistant", "In Norway."),
    ]
    for role, content in spoken:
        messages.append(Message.new(messages[-1].id if messages else None, role, content, (1, 2, 3), (1, 2)))
    store.add_messages(session.id, messages, None)
    store.close()
    return path


@pytest.fixture
def run(database: Path, worker: FakeWorker, capsys: pytest.CaptureFixture[str]) -> Any:
    def run(*argv: str, code: int = 0) -> tuple[str, str]:
        assert main([argv[0], "--store", str(database), *argv[1:]], worker) == code
        return capsys.readouterr()

    return run


def test_an_unknown_session_is_one_line_and_exit_code_1(run: Any) -> None:
    for argv in (
        ["show", "trap"],
        ["export", "trap"],
        ["rename", "trap", "x"],
        ["rm", "trap", "--yes"],
        ["fork", "trap", "x"],
    ):
        out, err = run(*argv, code=1)
        assert not out
        assert re.fullmatch(r"kvchat: .*trip.*\n", err)


def test_a_name_that_is_too_long_is_one_line_and_one_from_before_the_limit_serves(
    run: Any, database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    longest = "n" * LONGEST_NAME
    for argv in (["rename", "trip"], ["fork", "trip"]):
        out, err = run(*argv, longest + "n", code=1)
        assert not out and re.fullmatch(r"kvchat: .* at most 200 characters; .* has 201\n", err) and len(err) < 120
    with monkeypatch.context() as before:
        before.setattr("kvchat.store.store.LONGEST_NAME", 500)
        run("rename", "trip", "o" * 400)
    assert "In Norway." in run("show", "o" * 400)[0] and "o" * 400 in run("ls", "--json")[0]
    run("fork", "o" * 400, "copy")
    run("rename", "o" * 400, longest)
    assert {one["name"] for one in json.loads(run("ls", "--json")[0])} == {longest, "copy"}


def test_a_store_that_is_not_there_is_an_error_and_is_not_created(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "none.db"
    assert main(["show", "trip", "--store", str(path)]) == 1
    assert capsys.readouterr().err.startswith(f"kvchat: there is no store at {path} yet")
    assert main(["ls", "--json", "--store", str(path)]) == 0
    assert json.loads(capsys.readouterr().out) == []
    assert not path.exists()


def test_a_file_that_is_no_database_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "notes.db"
    path.write_text("not a database " * 100)
    assert main(["ls", "--store", str(path)]) == 1
    assert re.fullmatch(r"kvchat: .*\n", capsys.readouterr().err)


def test_chat_new_refuses_a_name_that_is_taken(run: Any, worker: FakeWorker) -> None:
    assert run("chat", "trip", "--new", code=1)[1].startswith("kvchat: a session named 'trip' is there already")
    assert worker.opened == []


def test_import_refuses_a_name_that_is_taken_before_it_loads_a_model(run: Any, worker: FakeWorker) -> None:
    _, err = run("import", str(ROOT / "sessions" / "example.json"), "--name", "trip", code=1)
    assert err == "kvchat: a session named 'trip' is there already; give another with --name\n"
    assert worker.opened == []


def test_ls_lists_sessions(run: Any) -> None:
    header, row = run("ls")[0].splitlines()
    columns = ["name", "turns", "branches", "tokens", "disk", "saved", "model", "updated", "tags", "title"]
    assert header.split() == columns
    assert row.split()[:2] == ["trip", "2"]
    [listed] = json.loads(run("ls", "--json")[0])
    assert (listed["name"], listed["num_turns"]) == ("trip", 2)


def test_show_prints_what_was_said_and_no_empty_opening(run: Any) -> None:
    assert run("show", "trip", "--turn", "2")[0] == "[2] user:\nAnd Oslo?\n\n[2] assistant:\nIn Norway.\n\n"
    shown = json.loads(run("show", "trip", "--json")[0])
    assert [message["turn"] for message in shown] == [1, 1, 2, 2]
    assert run("show", "trip", "--turn", "9", code=1)[1] == "kvchat: trip has no turn 9; it has turns 1 to 2\n"


def test_search_finds_words_and_takes_any_text(run: Any) -> None:
    [hit] = json.loads(run("search", "Norway", "--json")[0])
    assert (hit["session"], hit["role"]) == ("trip", "assistant")
    assert "Norway" in run("search", "norway")[0]
    assert run("search", '"NEAR( *')[0] == ""


def test_rename_then_rm(run: Any) -> None:
    run("rename", "trip", "rome")
    assert run("rm", "rome", code=1)[1] == "kvchat: deleting 'rome' needs a yes; add --yes\n"
    run("rm", "rome", "--yes")
    assert json.loads(run("ls", "--json")[0]) == []


def test_fork_takes_over_the_first_turns(run: Any) -> None:
    run("fork", "trip", "early", "--at", "1")
    run("fork", "trip", "whole")
    assert [len(json.loads(run("show", name, "--json")[0])) for name in ("early", "whole", "trip")] == [2, 4, 4]
    assert run("fork", "trip", "late", "--at", "3", code=1)[1] == "kvchat: trip has no turn 3; it has turns 1 to 2\n"


@pytest.mark.parametrize("format", ["json", "jsonl", "sharegpt", "md"])
def test_an_export_can_be_imported(format: str, run: Any, worker: FakeWorker, tmp_path: Path) -> None:
    path = tmp_path / "out"
    run("export", "trip", "--format", format, "--output", str(path))
    assert path.read_text() == run("export", "trip", "--format", format)[0]
    run("import", str(path), "--name", "again")
    assert worker.heard == ["Where is Rome?", "In Italy.", "And Oslo?", "In Norway."]


def test_a_conversation_is_written_as_a_page(run: Any, tmp_path: Path) -> None:
    path = tmp_path / "trip.html"
    run("export", "trip", "--format", "html", "--output", str(path))
    text = path.read_text()
    assert text == run("export", "trip", "--format", "html")[0] and text.startswith("<!doctype html>")
    assert text.index("Where is Rome?") < text.index("In Italy.") < text.index("In Norway.")
    assert "<h2>system" not in text


def test_export_does_not_overwrite_a_file_unless_told(run: Any, tmp_path: Path) -> None:
    path = tmp_path / "mine.md"
    path.write_text("mine")
    assert run("export", "trip", "--output", str(path), code=1)[1].endswith("add --force to overwrite it\n")
    assert path.read_text() == "mine"
    run("export", "trip", "--output", str(path), "--force")
    assert "Norway" in path.read_text()


def test_verify_and_vacuum_report(run: Any) -> None:
    assert run("verify")[0] == "no problems\n"
    assert json.loads(run("verify", "trip", "--json")[0]) == []
    assert set(json.loads(run("vacuum", "--json")[0])) == {"bytes_before", "bytes_after"}


def test_a_closed_pipe_is_quiet(database: Path) -> None:
    command = [sys.executable, "-m", "kvchat", "show", "trip", "--store", str(database)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT)
    assert process.stdout and process.stderr
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 1


def test_what_would_give_way_is_told_of_the_session_of_just_that_name(
    run: Any, database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, left = Place(2, 2, 2), Place(1, 2, 2)
    names = ["trip 0-40", "trip 2 0-40"]
    decided = [Decision(0, name, MEMORY, held, left, 1, 1.0, 1.0) for name in names]
    monkeypatch.setattr(planning, "would_decide", lambda *_: decided)
    run("fork", "trip", "trip 2")
    told = {name: json.loads(run("stats", *name, "--why", "--json")[0]) for name in [(), ("trip",), ("trip 2",)]}
    assert [[line.partition(":")[0] for line in lines] for lines in told.values()] == [names, names[:1], names[1:]]
