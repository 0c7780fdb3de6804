"""The real program in a pseudo-terminal, with the real model: a chat from its first key to a kill, and what is left."""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import pytest

from kvchat.hangup import as_exit, code_of, follow, nudged
from tests.pty_program import Terminal


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    opened = Terminal()
    yield opened
    opened.close()


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    return {
        "KVCHAT_STORE__PATH": str(tmp_path / "kvchat.db"),
        "XDG_CONFIG_HOME": str(tmp_path),
        "KVCHAT_GENERATE__TEMPERATURE": "0",
        "KVCHAT_TUI__TITLES": "false",
    }


def stored(env: dict[str, str], sql: str) -> list[Any]:
    """Rows of the store, which the program has open."""
    with closing(sqlite3.connect(f"file:{env['KVCHAT_STORE__PATH']}?mode=ro", uri=True)) as database:
        return database.execute(sql).fetchall()


@pytest.mark.weights
def test_a_chat_from_its_first_key_to_a_kill_and_back(terminal: Terminal, env: dict[str, str]) -> None:
    terminal.start("chat", "trip", env=env)
    terminal.until(lambda: terminal.shows("A new session"))
    terminal.type("Tell me a long story about a fox.\r")
    terminal.until(lambda: terminal.shows(r"answering.* tokens/s"))
    terminal.type("\x1b")
    terminal.until(lambda: terminal.shows("stopped"))
    terminal.type("Who is")
    terminal.until(lambda: terminal.shows("│ Who is"))
    terminal.type("\x11")  # Ctrl+Q
    assert terminal.wait() == 0
    assert terminal.is_sane and terminal.is_given_back
    assert [row[0] for row in stored(env, "SELECT role FROM messages ORDER BY depth")][-2:] == ["user", "assistant"]

    terminal.start("-c", env=env)
    terminal.until(lambda: terminal.shows("Tell me a long story") and terminal.shows("│ Who is"))
    terminal.type(" the fox? Tell me all about it.\r")
    terminal.until(lambda: terminal.shows(r"answering.* tokens/s"))
    terminal.type("half a tho")
    terminal.until(lambda: stored(env, "SELECT 1 FROM unfinished, sessions WHERE draft = 'half a tho'"))
    terminal.send(signal.SIGKILL)
    assert terminal.wait() == -signal.SIGKILL
    assert not terminal.is_sane and not terminal.is_given_back

    terminal.start("-c", env=env)  # on the terminal as the kill left it
    terminal.until(lambda: terminal.shows("Who is the fox") and terminal.shows("│ half a tho"))
    partial = stored(env, "SELECT content FROM messages ORDER BY depth DESC LIMIT 1")[0][0]
    assert terminal.shows(r"\s+".join(partial.split()[:3]))
    terminal.send(signal.SIGHUP)
    assert terminal.wait() == code_of(signal.SIGHUP) == 129
    assert terminal.is_sane and terminal.is_given_back


WITHOUT_A_MODEL = """
from kvchat import tui
from kvchat.config import Config
from kvchat.errors import ModelError

def connect(listener):
    raise ModelError("there is none")

tui.run(connect, Config())
"""


@pytest.mark.parametrize("shown", ["Message, or /help", "there is none"])
def test_the_program_ends_with_its_terminal(shown: str, terminal: Terminal, env: dict[str, str]) -> None:
    terminal.start(env=env, program=("-c", WITHOUT_A_MODEL))
    terminal.until(lambda: terminal.shows(shown))
    assert terminal.process
    os.close(terminal.slave)
    os.close(terminal.master)
    assert terminal.process.wait(60) == code_of(signal.SIGHUP)


LINES = """
from types import SimpleNamespace as Fake
from kvchat.hangup import as_exit
from kvchat.cli.line_chat import chat
from kvchat.cli.plain import Status

said = lambda what: lambda: print(what)
session = Fake(name="trip", model="tiny", context_window=100, settle=said("saved"), close=said("closed"))
with as_exit():
    try:
        chat(None, session, Status(lines=True))
    finally:
        session.close()
"""


def test_the_line_chat_moves_no_cursor_and_gives_the_terminal_back(terminal: Terminal, env: dict[str, str]) -> None:
    terminal.start(env=env, program=("-c", LINES))
    terminal.until(lambda: terminal.shows("quit leaves.\n>"))
    terminal.type("/model\r")
    terminal.until(lambda: terminal.shows("tiny, a window of 100 tokens"))
    terminal.type("half a line")
    terminal.until(lambda: terminal.shows("> half a line"))
    terminal.send(signal.SIGTERM)
    assert terminal.wait() == 143
    assert terminal.is_sane and terminal.shows("closed") and "\x1b" not in terminal.written


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM])
def test_a_signal_closes_what_is_open_on_the_way_out(number: int) -> None:
    before, closed = signal.getsignal(number), []
    with pytest.raises(SystemExit) as ended, as_exit():
        try:
            signal.raise_signal(number)
        finally:
            closed.append(signal.getsignal(number) is before)  # a second one would end it at once
    assert (ended.value.code, closed) == (128 + number, [True])
    assert signal.getsignal(number) is before


def test_a_signal_that_came_just_before_a_wait_for_a_key_does_not_wait_for_it() -> None:
    nudges: list[int] = []
    before = signal.signal(signal.SIGWINCH, lambda number, _: nudges.append(number))
    try:
        with nudged(lambda: len(nudges) >= 2):
            told = signal.set_wakeup_fd(-1)
            for number in (signal.SIGWINCH, signal.SIGTERM):  # as if no handler ran for them; the first is another's
                os.write(told, bytes([number]))
            end = monotonic() + 30
            while len(nudges) < 2:
                assert monotonic() < end
                sleep(0.01)
    finally:
        signal.signal(signal.SIGWINCH, before)


async def test_the_first_signal_is_told_and_the_second_is_not_caught() -> None:
    told: list[int] = []
    follow(told.append)
    os.kill(os.getpid(), signal.SIGTERM)
    while not told:
        await asyncio.sleep(0)
    assert told == [signal.SIGTERM]
    assert signal.getsignal(signal.SIGTERM) == signal.getsignal(signal.SIGHUP) == signal.SIG_DFL
