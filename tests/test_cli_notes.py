"""Facts about titles, tags and what is found, on the command line."""

from __future__ import annotations

import io
import json
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from rich.cells import cell_len

from kvchat.cli.app import main
from kvchat.store.store import Store
from tests.store_parts import converse, talk


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs a command on a store with the sessions "trip", which has a branch, and "notes"."""
    path = tmp_path / "kvchat.db"
    with closing(Store(path)) as store:
        converse(store, "notes", "Where is Oslo?", "In Norway, \x1b[2Jnot in [Italy].")
        info, chain = converse(store, "trip", "Where is Rome?", "In Italy, it is.")
        store.set_tip(info.id, chain[0].id)
        store.add_messages(info.id, talk(None, "Where is Rome?", "Ask me later.")[1:], chain[0].id)

    def run(*argv: str, code: int = 0) -> tuple[str, str]:
        assert main([argv[0], "--store", str(path), *argv[1:]]) == code
        return capsys.readouterr()

    return run


def test_a_title_is_shown_changed_and_taken_away(run: Any) -> None:
    assert run("title", "trip")[0] == "Where is Rome?\n"
    assert run("title", "trip", "  The way\nto Rome ") == ("", "")
    assert run("title", "trip")[0] == "The way to Rome\n"
    assert json.loads(run("title", "trip", "--json")[0]) == {
        "name": "trip",
        "title": "The way to Rome",
        "titled": "user",
    }
    assert run("ls")[0].splitlines()[1].endswith("The way to Rome")
    assert json.loads(run("title", "trip", "", "--json")[0])["titled"] == ""
    assert run("title", "trip")[0] == "Where is Rome?\n"


def test_what_is_no_title_or_no_session_is_one_line(run: Any) -> None:
    assert run("title", "trap", "x", code=1)[1].startswith("kvchat: there is no session 'trap'; did you mean 'trip'")
    assert run("title", "trip", "\x1b[31m", code=1)[1].startswith("kvchat: '\\x1b[31m' is no title")
    assert run("tag", "trip", "+a b", code=1)[1].startswith("kvchat: 'a b' is no tag")
    assert run("title", "trip")[0] == "Where is Rome?\n" and run("tag", "trip")[0] == ""


@pytest.mark.parametrize("away", ["old", "hot", "set", "-old", "o", "json=1", "été"])
def test_tags_come_and_go_by_their_signs(run: Any, away: str) -> None:
    assert run("tag", "trip", "+work", f"+{away}")[0].split() == sorted(["work", away])
    assert run("tag", "trip", f"-{away}", "+new", "--json")[0] == run("tag", "trip", "--json")[0]
    assert json.loads(run("tag", "trip", "--json")[0]) == {"name": "trip", "tags": ["new", "work"]}
    assert run("tag", "trip", "-work", "-new", "-absent") == ("", "")


def test_a_tag_without_a_sign_and_one_with_both_change_nothing(run: Any) -> None:
    assert run("tag", "trip", "+a", "work", code=1)[1].startswith("kvchat: 'work' has no sign; write +work")
    assert run("tag", "trip", "+a", "-a", code=1)[1] == "kvchat: 'a' is both added and taken away\n"
    assert run("tag", "trip")[0] == ""


def test_ls_shows_tags_and_branches_and_keeps_to_a_tag(run: Any) -> None:
    run("tag", "trip", "+work", "+rome")
    run("tag", "notes", "+work")
    header, trip, _ = run("ls")[0].splitlines()
    at = header.index("branches")
    assert trip[at:].split()[0] == "1" and trip[header.index("tags") :].startswith("rome work  Where is Rome?")
    names = [one["name"] for one in json.loads(run("ls", "--tag", "work", "--json")[0])]
    assert names == ["trip", "notes"]
    [listed] = json.loads(run("ls", "--tag", "work", "--tag", "rome", "--json")[0])
    assert (listed["name"], listed["tags"], listed["num_branches"], listed["titled"]) == (
        "trip",
        ["rome", "work"],
        1,
        "",
    )
    assert run("ls", "--tag", "none\x1b[2J") == ("", "no session has the tag 'none\\x1b[2J'\n")


def test_columns_stay_aligned_whatever_the_names_are(run: Any) -> None:
    run("rename", "trip", "東京 ｱ é\u0301")
    run("title", "notes", "\u202egnp.exe")
    header, trip, notes = run("ls")[0].splitlines()
    assert cell_len(trip[: trip.index("1")]) == header.index("turns") == notes.index("1")
    assert cell_len(trip[: trip.index("Where")]) == header.index("title") and "\u202e" not in notes


class Terminal(io.StringIO):
    """Stands in for stdout."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def test_hits_are_bold_on_a_terminal_alone(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = run("search", "italy")[0]
    assert "In Italy, it is." in plain and "\x1b" not in plain and "␛[2Jnot in [Italy]." in plain
    hits = json.loads(run("search", "italy", "--json")[0])
    assert {hit["snippet"][first:last] for hit in hits for first, last in hit["spans"]} == {"Italy"}
    monkeypatch.setattr("sys.stdout", terminal := Terminal())
    run("search", "italy")
    shown = terminal.getvalue()
    assert shown.count("\x1b[1mItaly\x1b[22m") == 2 and "␛[2Jnot in [\x1b[1mItaly\x1b[22m]." in shown
    assert shown.replace("\x1b[1m", "").replace("\x1b[22m", "") == plain
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setattr("sys.stdout", terminal := Terminal())
    run("search", "italy")
    assert terminal.getvalue() == plain


@pytest.mark.parametrize("columns", [140, 80, 50, 30])
def test_ls_keeps_to_the_width_of_a_terminal(run: Any, monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    run("title", "trip", "東京 and the way there " * 5)
    run("tag", "trip", "+work")
    whole = run("ls")[0]
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr("sys.stdout", terminal := Terminal())
    run("ls")
    header, trip, notes = terminal.getvalue().splitlines()
    assert max(map(cell_len, (header, trip, notes))) <= columns
    assert set(header.split()) <= set(whole.split()) and {"name", "turns", "tags", "title"} <= set(header.split())
    assert trip.endswith("…") and trip[: trip.index("work")].startswith("trip") and "Where" in notes
    assert ("model" in header, "updated" in header) == (columns >= 140, columns >= 80)
