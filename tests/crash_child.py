"""The program that `tests/test_crash.py` kills: for each store named on stdin, a fork of it holds one conversation.

After the word `half` it is one long answer, with a draft typed meanwhile: it says `kept` when both must be stored.

It says each step on stdout as it begins: `open`, `prefill`, `decode`, `seal`, and `commit` for every statement of a
transaction; `asked` when a turn has given its first event, `done` when it has given its last, `played` after all
turns.
"""

from __future__ import annotations

import os
import signal
import sqlite3
import sys
from itertools import chain
from pathlib import Path
from typing import Any

from kvchat.config import Config
from kvchat.events import Delta, Event, Listener, Progress, TurnDone
from kvchat.worker import Worker
from tests.tiny import make_model

# Exact KV, all of it held: the text is then the same however often the KV was computed again on the way.
SETTINGS = {
    "generate.temperature": 0,
    "generate.max_new_tokens": 16,
    "compress.segment_min": 120,
    "compress.keep_ratio": 1,
    "compress.score_chunk": 32,
    "codec.name": "raw",
    "model.prefill_chunk_size": 16,
}

QUESTIONS = [
    "Where did we stay in Rome, and what was the name of the street?",
    "What did it cost?",
    "Was it far from the river, or could we walk there after dinner?",
    "Who was with us on the second night?",
]

DRAFT = "And what did it\ncost?"

LONGEST_S = 60


def start(store: Path, listener: Listener | None = None) -> Worker:
    """A worker on `store` with the tiny model; every process computes the same with it."""
    overrides = {"store.path": str(store), **SETTINGS}
    return Worker(Config.load(overrides=overrides), listener, lambda *_: make_model())


def main() -> None:
    # A fork costs milliseconds, an interpreter with torch seconds.
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            how, _, store = line.strip().rpartition(" ")
            (play_half if how else play)(Path(store))
            return
        _, status = os.waitpid(pid, 0)
        say(f"end {os.waitstatus_to_exitcode(status)}")


def play(store: Path) -> None:
    """Ask all questions, then wait to be killed."""
    signal.alarm(LONGEST_S)
    say(str(os.getpid()))
    connections: list[sqlite3.Connection] = []
    sys.addaudithook(lambda event, arguments: watch(event, arguments, connections))
    worker = start(store, announce)
    worker.jobs.call(lambda: trace(connections[0]))
    session = worker.open("trip")
    for question in QUESTIONS:
        events = session.send(question)
        first = next(events)
        say("asked")
        for event in chain([first], events):
            announce(event)
    session.settle()
    say("played")
    signal.pause()


def play_half(path: Path) -> None:
    """Answer at length, and wait to be killed when some of it is in the store."""
    signal.alarm(LONGEST_S)
    say(str(os.getpid()))
    worker = start(path)
    session = worker.open("trip")
    store, number = session._conversation.store, session._conversation.info.id
    events = session.send(QUESTIONS[0], max_new_tokens=3000)
    session.set_draft(DRAFT)
    for _ in events:
        found = worker.jobs.call(lambda: store.unfinished(number), aside=True)
        if found and len(found[1]) >= 3:
            say("kept")
            signal.pause()


def announce(event: Event) -> None:
    """Say which phase an event belongs to."""
    match event:
        case Progress(phase, _, _):
            say(phase)
        case Delta():
            say("decode")
        case TurnDone():
            say("done")


def watch(event: str, arguments: tuple[Any, ...], connections: list[sqlite3.Connection]) -> None:
    """As an audit hook, note every database that is opened: the worker keeps its own to itself."""
    if event == "sqlite3.connect/handle":
        say("open")
        connections += arguments


def trace(connection: sqlite3.Connection) -> None:
    """Say each statement that is part of a transaction, also the ones that begin and end it."""

    def follow(statement: str) -> None:
        if connection.in_transaction or statement.startswith("BEGIN"):
            say("commit")

    connection.set_trace_callback(follow)


def say(line: str) -> None:
    """One write, so that lines of two threads never mix and nothing waits in a buffer when the kill comes."""
    os.write(1, f"{line}\n".encode())


if __name__ == "__main__":
    main()
