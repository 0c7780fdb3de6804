"""Titles that the model gives: what is a title, when there is one, and that nothing else changes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvchat.config import Config
from kvchat.handle import Session
from kvchat.titling import MOST_TOKENS, tidied
from kvchat.worker import Worker
from tests.tiny import make_model

Open = Callable[..., Worker]


@pytest.mark.parametrize(
    ("answer", "title"),
    [
        ("A Week in Rome", "A Week in Rome"),
        ('\n  "A Week in Rome."\n\nI hope you like it!', "A Week in Rome"),
        ("**Title:** Rome", "Rome"),
        ("Title: “Räder für Öfen”", "Räder für Öfen"),
        ("A\x1b[31m week\tin\u202e Rome", "A [31m week in Rome"),
        ("罗马的一周", "罗马的一周"),
        ("Sourdough Bread: A Guide to the Ultimate Recipe", "Sourdough Bread"),
        ('Rome, the Eternal City" or "Rome"', "Rome, the Eternal City"),
        ("", ""),
        (" \n ", ""),
        ('""...', ""),
        ("one two three four five six seven", ""),
        ("x" * 61, ""),
        ("<think>The user wants a title", ""),
        ("Rom\ufffd", ""),
    ],
)
def test_a_title_is_short_plain_and_on_one_line(answer: str, title: str) -> None:
    assert tidied(answer) == title


def test_an_answer_that_was_cut_in_its_first_line_is_no_title() -> None:
    assert tidied("A Week in", ended=False) == ""
    assert tidied("A Week in Rome\nAnd", ended=False) == "A Week in Rome"
    assert tidied('A Week in Rome", which', ended=False) == "A Week in Rome"


@pytest.fixture
def opener(tmp_path: Path) -> Iterator[Open]:
    workers: list[Worker] = []

    def start(**settings: Any) -> Worker:
        given = {"store.path": str(tmp_path / "s.db"), "generate.temperature": 0, "generate.max_new_tokens": 6}
        given |= {key.replace("__", "."): value for key, value in settings.items()}
        workers.append(Worker(Config.load(overrides=given), None, lambda *_: make_model()))
        return workers[-1]

    yield start
    for worker in workers:
        worker.close()


def asked(worker: Worker, times: int = 2) -> Session:
    session = worker.open("trip")
    for number in range(times):
        session.ask(f"Where did we stay, {number}?")
    session.settle()
    return session


def says(monkeypatch: pytest.MonkeyPatch, session: Session, text: str) -> list[int]:
    """Have the model say `text` to whatever it is asked; a list that grows with every time."""
    engine, calls = session._conversation.engine, list[int]()
    ids = [*engine.model.template.assistant(text).ids[11:-2], *engine.model.stop_ids]

    def answer(*_: Any) -> list[int]:
        calls.append(1)
        return ids

    monkeypatch.setattr(engine, "answer", answer)
    return calls


def give(worker: Worker, stop: bool = False) -> None:
    """What the worker does in idle time."""
    worker.jobs.call(lambda: worker._title(lambda: stop))


def title(worker: Worker) -> tuple[str, str]:
    info = worker.sessions()[0]
    return info.title, info.titled


def test_the_second_answer_gives_a_title_once(opener: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = opener()
    session = asked(worker, 1)
    calls = says(monkeypatch, session, '"A Week in Rome."')
    give(worker)
    assert title(worker) == ("Where did we stay, 0?", "") and not calls
    session.ask("And then?")
    give(worker)
    give(worker)
    assert title(worker) == ("A Week in Rome", "model") and len(calls) == 1
    assert session._conversation.info.title == "A Week in Rome"


def test_a_title_of_the_user_stays_and_none_is_made_where_that_is_set(
    opener: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = opener()
    calls = says(monkeypatch, asked(worker), "A Week in Rome")
    worker.retitle("trip", "Mine")
    give(worker)
    assert title(worker) == ("Mine", "user") and not calls
    worker.close()
    worker = opener(tui__titles=False)
    worker.retitle("trip", "")
    calls = says(monkeypatch, worker.open("trip"), "A Week in Rome")
    give(worker)
    assert title(worker)[1] == "" and not calls


def test_nonsense_is_no_title_and_is_asked_for_once_a_state(opener: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = opener()
    session = asked(worker)
    calls = says(monkeypatch, session, "I am sorry, but as a model I have no title for you")
    give(worker)
    give(worker)
    assert title(worker)[1] == "" and len(calls) == 1
    session.ask("And then?")
    give(worker)
    assert len(calls) == 2


def test_a_title_changes_nothing_and_a_job_stops_it(opener: Open) -> None:
    worker = opener()
    session = asked(worker)
    before = session.logprobs("And?", "Yes."), session.messages(), session.stats()["num_seen"]
    give(worker, stop=True)
    assert not worker._titler._asked
    give(worker)  # what a random model says is no title
    assert worker._titler._asked and title(worker)[1] == ""
    assert (session.logprobs("And?", "Yes."), session.messages(), session.stats()["num_seen"]) == before
    session.ask("And then?")

    conversation, steps = session._conversation, list[int]()

    def job_comes() -> bool:
        steps.append(1)
        return len(steps) > 3

    worker.jobs.call(lambda: list(worker._titler.title(conversation, job_comes)))
    assert len(steps) == 4 < MOST_TOKENS
    assert worker._titler._asked[conversation.info.id] != session.messages()[-1].id
