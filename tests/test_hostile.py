"""Hostile text, through every place that shows text of users, models, stores and files: nothing raw is shown."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kvchat.cli.app import main
from kvchat.errors import InputError, KVChatError, ModelError
from kvchat.events import Delta, Event, Notice, Timings, TurnDone
from kvchat.segment_page import page
from kvchat.store.store import Store
from tests.fake_worker import INFO, STATS, USAGE, FakeSession, FakeWorker
from tests.hostile import HOSTILE, ON_A_LINE, is_harmless
from tests.store_parts import converse
from tests.tui_parts import FakeWorker as Engine
from tests.tui_parts import chat, done, idle, wait_until

each = pytest.mark.parametrize("text", list(HOSTILE.values()), ids=list(HOSTILE))


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run a command on a terminal; all that it showed there."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setenv("TERM", "dumb")

    def ask(prompt: str) -> str:
        print(prompt)
        return "no passphrase"

    monkeypatch.setattr("getpass.getpass", ask)

    def run(*words: str, worker: Any = None, stdin: str = "") -> str:
        shown = Terminal()
        for name, stream in (("stdin", Terminal(stdin)), ("stdout", shown), ("stderr", shown)):
            monkeypatch.setattr(sys, name, stream)
        main([words[0], "--store", str(tmp_path / "kvchat.db"), *words[1:]], worker or FakeWorker())
        return shown.getvalue()

    return run


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with closing(Store(tmp_path / "kvchat.db")) as opened:
        yield opened


def with_notes(store: Store, name: str, title: str, tag: str) -> None:
    """A session as another program may have left it."""
    info, _ = converse(store, "trip", "Where?", "There.")
    with store._write():
        store._db.execute("UPDATE sessions SET name = ?, title = ?, titled = 'user'", [name, title])
        store._db.execute("INSERT INTO tags(session_id, tag) VALUES (?, ?)", [info.id, tag])


@each
def test_what_was_said(text: str, store: Store, run: Any) -> None:
    converse(store, "trip", f"words {text}", f"{text} words {text}")
    slow = [] if len(text) > 1000 else [["export", "trip"], ["verify"]]
    for words in (["show", "trip"], ["ls"], ["search", "words"], ["title", "trip"], *slow):
        assert is_harmless(shown := run(*words)), words
        assert "internal error" not in shown
    assert max(map(len, run("ls").splitlines())) < 1000
    assert len(run("search", "words")) < 2000
    assert json.loads(run("show", "trip", "--json"))[0]["content"] == f"words {text}"
    assert is_harmless(run("show", "trip", "--json"))


@each
def test_names_titles_and_tags_of_another_program(text: str, store: Store, run: Any) -> None:
    with_notes(store, f"n{text}", f"t{text}", f"a{text}"[:64])
    for words in (["ls"], ["ls", "--json"], ["search", "Where"], ["show", "trip"], ["verify"], ["stats", "--why"]):
        assert is_harmless(run(*words)), words
    if "\x00" not in text and len(text) < 1000:
        for words in (["show"], ["rm"], ["title"], ["tag"], ["set"], ["export"], ["archive"]):
            assert is_harmless(shown := run(*words, f"n{text}", stdin="n\n")) and "internal error" not in shown, words


@each
def test_a_name_with_control_characters_is_refused(text: str, store: Store) -> None:
    session = store.create_session("trip", "tiny", {})
    if text in ON_A_LINE.values():
        return
    for name in (f"trip{text}", text):
        with pytest.raises(InputError, match="no session name"):
            store.create_session(name, "tiny", {})
        with pytest.raises(InputError, match="no session name"):
            store.rename("trip", name)
        with pytest.raises(InputError, match="no session name"):
            store.fork("trip", name, None)
        with pytest.raises(InputError):
            store.set_tags(session.id, [f"a{text}"])
    assert [info.name for info in store.sessions()] == ["trip"]


@each
def test_names_of_files(text: str, run: Any, tmp_path: Path) -> None:
    name = text[:80].replace("/", "").replace("\x00", "")
    file = tmp_path / f"a{name}.txt"
    for words in (
        ["import", str(file)],
        ["attach", "trip", str(file)],
        ["eval", "report", str(file)],
        ["stats", "trip", "--html", str(file)],
        ["stats", "trip", "--html", str(file)],
        ["export", "trip", "--output", str(file)],
        ["ls", "--config", str(file)],
        ["show", "trip", "--store", str(file)],
    ):
        assert is_harmless(shown := run(*words)) and "internal error" not in shown, words


@each
def test_errors_and_usage(text: str, run: Any) -> None:
    class Failing(FakeWorker):
        def open(self, name: str | None = None, **how: Any) -> FakeSession:
            raise ModelError(f"{text} is no model")

    for words in (["ask", "trip", "Hi"], ["chat", "trip", "--plain"], ["stats", "trip"], ["import", "none"]):
        assert is_harmless(run(*words, worker=Failing())), words
    for words in (
        [text],
        ["ls", f"--{text}"],
        ["ls", "--set", text],
        ["show", text],
        ["bench", text],
        ["search", text],
    ):
        if "\x00" not in text and len(text) < 1000:
            assert is_harmless(run(*words)), words


class Told(FakeSession):
    """Answers with a text, in pieces of one character if it is short, and tells it too."""

    def __init__(self, name: str, worker: FakeWorker, text: str) -> None:
        super().__init__(name, worker)
        self.text, self.model = text, f"model {text}"

    def send(self, text: str) -> Iterator[Event]:
        yield Notice(f"notice {self.text}")
        yield from map(Delta, self.text if len(self.text) < 1000 else [self.text])
        yield TurnDone(self.text, USAGE, Timings(0.0, 0.25, (0.1,)), "stop")

    def resend(self) -> Iterator[Event]:
        return self.send(self.text)

    def rewind(self, turns: int = 1) -> str:
        return self.text

    def messages(self) -> list[SimpleNamespace]:
        return [SimpleNamespace(role=role, content=self.text) for role in ("system", "user", "assistant")]

    def stats(self) -> dict[str, Any]:
        return STATS | {"name": self.text, "model": self.text}

    def episodes(self) -> list[dict[str, Any]]:
        return [{"name": self.text, "turns": (1,)}]


class Teller(FakeWorker):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = text
        self.infos = [
            SimpleNamespace(**INFO | {"name": "trip", "title": text, "tags": (text,), "settings": {"a": text}})
        ]

    def open(self, name: str | None = None, **how: Any) -> FakeSession:
        return Told(name or "trip", self, self.text)

    def search(self, text: str) -> Sequence[Any]:
        return [SimpleNamespace(session=self.text, turn=1, role="user", snippet=self.text)]


@each
def test_answers_and_the_line_chat(text: str, run: Any, tmp_path: Path) -> None:
    worker = Teller(text)
    commands = ("retry", "rewind", "sessions", "search x", "title", "tag", "set", "system", "stats", "map", "model")
    lines = "".join(f"{line}\n" for line in ("Hi", *(f"/{command}" for command in commands)))
    assert is_harmless(shown := run("chat", "trip", "--plain", worker=worker, stdin=lines))
    assert "internal error" not in shown and "notice " in shown
    assert is_harmless(run("ask", "trip", "Hi", worker=worker))
    answer = run("ask", "trip", "Hi", "--json", worker=worker)
    assert is_harmless(answer) and json.loads(answer.splitlines()[-1])["text"] == text


@each
def test_maps_and_pages(text: str, run: Any, tmp_path: Path) -> None:
    for words in (["stats", "trip", "--map"], ["show", "trip", "--map"], ["stats", "trip"]):
        assert is_harmless(run(*words, worker=Teller(text))), words
    assert max(map(len, run("stats", "trip", "--map", worker=Teller(text)).splitlines())) <= 240

    class Tags(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            assert tag not in ("script", "img", "a") and not any(name.startswith("on") for name, _ in attrs)

    written = page(STATS | {"name": text, "model": text}, [{"name": text, "turns": (1,)}])
    Tags().feed(written)
    assert is_harmless(written)


@pytest.mark.parametrize("text", ["half \ud83d of a pair", "\udcff"])
def test_what_is_no_unicode_is_refused_before_it_is_kept(text: str, run: Any, store: Store, tmp_path: Path) -> None:
    (tmp_path / "chat.json").write_text(json.dumps([{"role": "user", "content": text}]))
    assert "not valid Unicode" in run("import", str(tmp_path / "chat.json"))
    assert "not valid Unicode" in run("ask", "trip", text)
    with pytest.raises(KVChatError):
        store.create_session(text, "tiny", {})
    assert is_harmless(run("ask", "trip", "Hi", worker=Teller(text)))


# -- the screen --------------------------------------------------------------------------------------------------------


def told(screen: Any) -> list[str]:
    """The lines on the screen."""
    return ["".join(part.text for part in strip) for strip in screen._compositor.render_strips()]


def settled(screen: Any) -> bool:
    """Whether each line is as wide as the screen, in cells, and harmless."""
    strips = screen._compositor.render_strips()
    return all(strip.cell_length == screen.size.width for strip in strips) and is_harmless("\n".join(told(screen)))


SHORT = {name: text for name, text in HOSTILE.items() if len(text) < 1000}


async def test_the_screen_shows_nothing_raw_and_stays_whole() -> None:
    engine = Engine("trip")
    session = engine.all["trip"]
    for name, text in SHORT.items():
        session.say("user", f"{name} {text}")
        session.say("assistant", f"{name} {text}\n\n```\n{text}\n```\n\n| a |\n|---|\n| {text.splitlines()[0]} |")
        engine.titles[f"{name} {text}"] = text
        engine.all[f"{name} {text}"] = type(session)(engine, f"{name} {text}")
        engine.tags[f"{name} {text}"] = (text,)
    async with chat(engine) as (screen, pilot):
        assert settled(screen)
        for _ in range(4):
            await pilot.press("pageup")
            await pilot.pause()
            assert settled(screen), "\n".join(told(screen))
        shown = "\n".join(told(screen))
        assert "␛" in shown or "�" in shown


async def test_answers_notices_and_errors_on_the_screen() -> None:
    engine = Engine("trip")
    async with chat(engine) as (screen, pilot):
        for name, text in SHORT.items():
            engine.all["trip"].script = [Notice(f"n {text}"), *map(Delta, f"a {text} z"), done(f"a {text} z")]
            screen.note(f"e {text}", "-error")
            screen.turns.send(text)
            await idle(screen)
            await pilot.pause()
            assert settled(screen), (name, "\n".join(told(screen)))


@pytest.mark.parametrize("name", ["Rich markup", "Textual markup"])
async def test_markup_is_shown_as_it_is(name: str) -> None:
    engine = Engine("trip")
    engine.all["trip"].script = [Delta(HOSTILE[name]), done(HOSTILE[name])]
    async with chat(engine) as (screen, pilot):
        screen.turns.send(HOSTILE[name])
        await idle(screen)
        await pilot.pause()
        assert "\n".join(told(screen)).count(HOSTILE[name][:12]) >= 2


@pytest.mark.parametrize("name", [name for name in HOSTILE if name not in SHORT])
async def test_a_line_of_a_megabyte_on_the_screen(name: str) -> None:
    engine = Engine("trip")
    text = HOSTILE[name]
    engine.all["trip"].script = [Delta(text[:500_000]), Delta(text[500_000:]), done(text)]
    async with chat(engine) as (screen, pilot):
        screen.turns.send(text)
        await idle(screen)
        await pilot.pause()
        await wait_until(lambda: settled(screen))
