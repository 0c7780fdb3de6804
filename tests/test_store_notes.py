"""Titles, tags, drafts and answers in the making, as the store keeps them."""

from __future__ import annotations

import io
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch

from kvchat import portable
from kvchat.cipher import Key
from kvchat.config import Config
from kvchat.errors import InputError, SessionNotFound, StoreError
from kvchat.store.migrations import PAGE_SIZE
from kvchat.store.store import SearchHit, Store
from kvchat.worker import Worker
from tests.store_parts import FINGERPRINT, MODEL, bytes_on_disk, converse, talk
from tests.tiny import make_model

SECRET = "xyzzy-plugh"


@pytest.fixture(params=[None, Key(f"x'{bytes(range(48)).hex()}'", "a test")], ids=["plain", "encrypted"])
def key(request: pytest.FixtureRequest) -> Key | None:
    if request.param is None:
        return None
    pytest.importorskip("sqlcipher3")
    assert isinstance(request.param, Key)
    return request.param


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "s.db"


@pytest.fixture
def store(path: Path, key: Key | None) -> Iterator[Store]:
    with closing(Store(path, key=key)) as store:
        yield store


# -- titles ----------------------------------------------------------------------------------------------------------


def test_a_title_takes_the_place_of_the_first_question_and_gives_it_back(store: Store) -> None:
    info, _ = converse(store, "trip", "Where did we stay?", "In Rome.")
    assert (info.title, info.titled) == ("Where did we stay?", "")
    for by, title in (("model", "A stay in Rome"), ("user", "Rome")):
        store.set_title(info.id, f"  {title}\n ", by)  # type: ignore[arg-type]
        found = store.session("trip")
        assert (found.title, found.titled) == (title, by) and store.sessions() == [found]
        assert found.updated == info.updated
    store.set_title(info.id, "", "user")
    assert store.session("trip") == info and store.sessions() == [info]


def test_the_model_never_titles_over_the_user(store: Store) -> None:
    info, _ = converse(store, "trip", "Hello")
    store.set_title(info.id, "Rome", "user")
    store.set_title(info.id, "A greeting", "model")
    store.set_title(info.id, "", "model")
    assert store.session("trip").title == "Rome"
    store.set_title(info.id, "", "user")
    store.set_title(info.id, "A greeting", "model")
    assert store.session("trip").titled == "model"


@pytest.mark.parametrize("title", ["\x1b[2Jgone", "a\0b", "\ud83d", "x" * 121, "\x9b31m"])
def test_what_is_no_title_is_refused(store: Store, title: str) -> None:
    info, _ = converse(store, "trip", "Hello")
    with pytest.raises(InputError, match="is no title"):
        store.set_title(info.id, title, "user")
    assert store.session("trip") == info


# -- tags ------------------------------------------------------------------------------------------------------------


def test_tags_are_replaced_as_a_whole_or_changed_one_by_one(store: Store) -> None:
    info, _ = converse(store, "trip", "Hello")
    converse(store, "other", "Hello")
    store.set_tags(info.id, ["work", "été", "[b]", "work"])
    assert store.session("trip").tags == ("[b]", "work", "été")
    assert store.change_tags(info.id, ["old", "work"], ["[b]", "absent"]) == ("old", "work", "été")
    assert {one.name: one.tags for one in store.sessions()} == {"trip": ("old", "work", "été"), "other": ()}
    store.set_tags(info.id, [])
    assert store.session("trip") == info


@pytest.mark.parametrize("tag", ["", " ", "a b", "a\n", "\u2028", "a\u00a0b", "\x1b[0m", "\ud83d", "x" * 65])
def test_what_is_no_tag_is_refused_and_nothing_changes(store: Store, tag: str) -> None:
    info, _ = converse(store, "trip", "Hello")
    store.set_tags(info.id, ["work"])
    for change in (lambda: store.set_tags(info.id, ["new", tag]), lambda: store.change_tags(info.id, [tag], ["work"])):
        with pytest.raises(InputError, match="is no tag"):
            change()
    assert store.session("trip").tags == ("work",)


# -- drafts and unfinished answers -----------------------------------------------------------------------------------


def test_a_draft_of_any_text_and_length_comes_back(store: Store) -> None:
    info, _ = converse(store, "trip", "Hello")
    for text in ("half a sent", "नमस्ते 👩‍🚀 \0 \r\n \x1b[2J", "a long paste " * 100_000, ""):
        store.set_draft(info.id, text)
        assert store.draft(info.id) == text
        assert store.session("trip") == info and store.sessions() == [info]
    with pytest.raises(InputError, match="surrogate"):
        store.set_draft(info.id, "\ud83d")


def test_an_unfinished_answer_is_kept_until_it_is_cleared(store: Store) -> None:
    info, chain = converse(store, "trip", "Hello", "Hi", "And?")
    assert store.unfinished(info.id) is None
    for ids in ([], [1, 2, 2**32 - 1], list(range(5000))):
        store.set_unfinished(info.id, chain[2].id, ids)
        assert store.unfinished(info.id) == (chain[2].id, ids)
    store.set_unfinished(info.id, chain[0].id, [7])
    assert store.unfinished(info.id) == (chain[0].id, [7])
    assert store.session("trip") == info
    store.clear_unfinished(info.id)
    store.clear_unfinished(info.id)
    assert store.unfinished(info.id) is None and store.verify() == []


@pytest.mark.parametrize("draft", [True, False])
def test_what_is_written_often_is_one_short_statement(store: Store, draft: bool) -> None:
    info, chain = converse(store, "trip", "Hello")
    said: list[str] = []
    store._db.conn.set_trace_callback(said.append)
    store.set_draft(info.id, "typing") if draft else store.set_unfinished(info.id, chain[0].id, [1])
    store._db.conn.set_trace_callback(None)
    begin, change, commit = [sql.split()[0] for sql in said if not sql.startswith("PRAGMA synchronous")]
    assert (begin, commit) == ("BEGIN", "COMMIT") and change in ("UPDATE", "INSERT")


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no process is killed like that here")
def test_draft_and_unfinished_answer_are_there_after_a_kill(path: Path) -> None:
    with closing(Store(path)) as store:
        info, chain = converse(store, "trip", "Hello")
    lines = (
        "import os, signal, pathlib, kvchat.store.store",
        f"store = kvchat.store.store.Store(pathlib.Path({str(path)!r}))",
        f"store.set_draft({info.id}, 'half a sent')",
        f"store.set_unfinished({info.id}, {chain[0].id!r}, [1, 2, 3])",
        "os.kill(os.getpid(), signal.SIGKILL)",
    )
    assert subprocess.run([sys.executable, "-c", "\n".join(lines)], check=False).returncode == -signal.SIGKILL
    with closing(Store(path)) as store:
        assert store.draft(info.id) == "half a sent" and store.unfinished(info.id) == (chain[0].id, [1, 2, 3])


# -- sessions that go, fork or are damaged ---------------------------------------------------------------------------


def note_all(store: Store, session: int, parent: str) -> None:
    store.set_title(session, f"title {SECRET}", "user")
    store.set_tags(session, [f"tag-{SECRET}"])
    store.set_draft(session, f"draft {SECRET}")
    store.set_unfinished(session, parent, [*SECRET.encode("utf-16-le")])


def test_what_is_noted_goes_with_the_session_from_the_file_too(store: Store, path: Path) -> None:
    info, chain = converse(store, "trip", "Hello", "Hi")
    store.fork("trip", "kept", chain[0].id)
    note_all(store, info.id, chain[1].id)
    assert SECRET in store.session("trip").title
    store.delete("trip")
    assert not any(SECRET.encode() in data for data in bytes_on_disk(path))
    counts = [store._rows(f"SELECT count(*) AS number FROM {table}")[0]["number"] for table in ("tags", "unfinished")]
    assert counts == [0, 0] and store.verify() == []


def test_nothing_is_noted_of_a_session_that_another_process_deleted(store: Store, path: Path, key: Key | None) -> None:
    info, chain = converse(store, "trip", "Hello")
    converse(store, "kept", "Hello")
    with closing(Store(path, key=key)) as other:
        other.delete("trip")
    for call in (
        lambda: store.set_title(info.id, "Rome", "user"),
        lambda: store.set_tags(info.id, ["work"]),
        lambda: store.change_tags(info.id, ["work"], []),
        lambda: store.set_draft(info.id, "half"),
        lambda: store.draft(info.id),
        lambda: store.set_unfinished(info.id, chain[0].id, [1]),
    ):
        with pytest.raises(StoreError, match="deleted by another kvchat"):
            call()
    store.clear_unfinished(info.id)
    assert store.unfinished(info.id) is None and store.tree(info.id) == [] and store.verify() == []


def test_an_unfinished_answer_follows_a_message(store: Store) -> None:
    info, _ = converse(store, "trip", "Hello")
    with pytest.raises(StoreError):
        store.set_unfinished(info.id, "b2:00", [1])
    assert store.unfinished(info.id) is None


def test_a_fork_takes_the_tags_alone(store: Store) -> None:
    info, chain = converse(store, "trip", "Hello", "Hi")
    store.set_title(info.id, "Rome", "user")
    store.set_tags(info.id, ["work", "old"])
    store.set_draft(info.id, "half a sent")
    store.set_unfinished(info.id, chain[1].id, [1])
    fork = store.fork("trip", "again", chain[1].id)
    assert (fork.title, fork.titled, fork.tags) == ("Hello", "", ("old", "work"))
    assert store.draft(fork.id) == "" and store.unfinished(fork.id) is None
    store.set_tags(fork.id, [])
    assert store.session("trip").tags == ("old", "work")


def test_what_is_noted_survives_a_repair_of_damaged_pages(path: Path, key: Key | None) -> None:
    with closing(Store(path, key=key)) as store:
        info, chain = converse(store, "trip", "Hello", "Hi")
        note_all(store, info.id, chain[1].id)
        noted = store.session("trip"), store.draft(info.id), store.unfinished(info.id)
        root = store._rows("SELECT rootpage FROM sqlite_schema WHERE name = 'frames_place'")[0]["rootpage"]
    with path.open("r+b") as file:
        file.seek((root - 1) * PAGE_SIZE)
        file.write(b"\xff" * 100)
    with closing(Store(path, key=key)) as store:
        assert store.verify() and store.repair()
        assert (store.session("trip"), store.draft(info.id), store.unfinished(info.id)) == noted
        assert store.verify() == []


def test_what_is_noted_is_of_this_machine_and_not_in_a_portable_file(store: Store) -> None:
    info, chain = converse(store, "trip", "Hello", "Hi")
    before, after = io.BytesIO(), io.BytesIO()
    portable.write(store, "trip", before)
    note_all(store, info.id, chain[1].id)
    portable.write(store, "trip", after)
    assert after.getvalue() == before.getvalue()


def test_an_open_session_has_its_title_and_tags_at_once(path: Path) -> None:
    config = Config.load(overrides={"store.path": str(path)})
    worker = Worker(config, None, lambda *_: make_model("llama", torch.float32))
    with worker.open("trip") as session:
        session.append([{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}])
        worker.retitle("trip", "Rome")
        worker.tag("trip", ["work"])
        [listed] = worker.sessions()
        [(conversation, _)] = worker._open.values()
        assert conversation.info == listed and (listed.title, listed.tags) == ("Rome", ("work",))
        assert [message.content for message in worker.preview("trip")][-2:] == ["Hello", "Hi"]
        with pytest.raises(SessionNotFound):
            worker.retitle("trap", "x")
        with pytest.raises(InputError):
            worker.tag("trip", ["a b"])
        assert worker.sessions() == [listed]
    worker.close()


# -- trees and hits --------------------------------------------------------------------------------------------------


def test_the_tree_has_every_branch_and_parents_first(store: Store) -> None:
    info, chain = converse(store, "trip", "one", "two", "three", "four")
    converse(store, "other", "not of this one")
    store.set_tip(info.id, chain[1].id)
    again = talk(chain[1], "three, edited", "four, again")
    store.add_messages(info.id, again, chain[1].id)
    found = store.tree(info.id)
    assert {message.id: message for message in found} == {message.id: message for message in [*chain, *again]}
    seen: set[str | None] = {None}
    for message in found:
        assert message.parent in seen
        seen.add(message.id)
    assert len(found) == 6 and store.session("trip").num_branches == 1
    assert {one.name: one.num_branches for one in store.sessions()} == {"trip": 1, "other": 0}
    assert store.tree(store.create_session("blank", MODEL, FINGERPRINT).id) == []


def test_a_tree_in_a_circle_comes_to_an_end(store: Store) -> None:
    info, chain = converse(store, "trip", "one", "two")
    store._db.execute("UPDATE messages SET parent = ? WHERE depth = 0", [chain[-1].id])
    assert len(store.tree(info.id)) == 2


@pytest.mark.parametrize(
    ("content", "words", "found"),
    [
        ("The Hotel\n\t Sole, by the hotel.", "hotel", ["Hotel", "hotel"]),
        ("नमस्ते 👩‍🚀 hotel [b] ]hotel[", "hotel", ["hotel", "hotel"]),
        ("\x1b[2J hotel\u202e \x9b", "hotel", ["hotel"]),
        ("þÿ hotel þÿ", "þÿ", ["þÿ", "þÿ"]),
        ("Café Sole", "cafe sol", ["Café", "Sole"]),
    ],
)
def test_hits_are_told_in_characters_whatever_the_text_holds(
    store: Store, content: str, words: str, found: list[str]
) -> None:
    converse(store, "trip", content)
    [hit] = store.search(words)
    assert [hit.snippet[first:last] for first, last in hit.spans] == found
    assert hit.snippet == " ".join(content.split())


@pytest.mark.parametrize("content", ["hotel " + "x" * 1_000_000, "x" * 1_000_000 + " hotel", "hotel" * 200_000])
def test_a_word_as_long_as_its_message_is_cut(store: Store, content: str) -> None:
    converse(store, "trip", content)
    [hit] = store.search("hotel")
    [(first, last)] = hit.spans
    assert hit.snippet[first:last].startswith("hotel") and len(hit.snippet) <= 402 and "…" in hit.snippet


def test_a_snippet_of_a_long_message_shows_its_hits(store: Store) -> None:
    converse(store, "trip", "word " * 500 + "the harbour " + "word " * 500)
    [hit] = store.search("harbour")
    assert hit == SearchHit("trip", 1, "user", hit.snippet, hit.spans)
    assert [hit.snippet[first:last] for first, last in hit.spans] == ["harbour"] and len(hit.snippet) < 200
    assert hit.snippet.startswith("…") and hit.snippet.endswith("…")
