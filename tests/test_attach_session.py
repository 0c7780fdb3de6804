"""Documents by way of the worker, the command line and the plain chat."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kvchat.asynchronous import AsyncSession
from kvchat.cli import plain
from kvchat.cli.app import main
from kvchat.cli.line_chat import LineChat
from kvchat.config import Config
from kvchat.errors import CapacityError, InputError
from kvchat.events import Notice, Progress
from kvchat.worker import Worker
from tests.fake_worker import FakeWorker
from tests.test_attach import LONG, TEXT
from tests.tiny import make_model

SETTINGS = {
    "generate.temperature": 0,
    "generate.max_new_tokens": 8,
    "compress.segment_min": 60,
    "compress.recent_tokens": 20,
    "compress.scorer": "random",
}
Open = Callable[..., Worker]


@pytest.fixture
def opener(tmp_path: Path) -> Iterator[Open]:
    """Makes workers on one store."""
    workers: list[Worker] = []

    def start(listener: Any = None, window: int = 512, **settings: Any) -> Worker:
        given = {"store.path": str(tmp_path / "s.db"), **SETTINGS, **settings}
        loaded = replace(make_model(), context_window=window)
        workers.append(Worker(Config.load(overrides=given), listener, lambda *_: loaded))
        return workers[-1]

    yield start
    for worker in workers:
        worker.close()


def documents(worker: Worker) -> list[str]:
    return [info.name for info in worker.sessions() if info.name.startswith("document ")]


@pytest.mark.parametrize("budget", ["0", "150kB"])
def test_a_second_session_computes_nothing_and_answers_alike_after_resuming(opener: Open, budget: str) -> None:
    told: list[Any] = []
    worker = opener(told.append, **{"model.memory_budget": budget})
    with worker.open("one", system="Be brief.") as one, worker.open("two", system="Be kind.") as two:
        two.ask("Are you there?")
        first, second = one.attach("report.txt", TEXT), two.attach("report.txt", TEXT)
        assert first.computed > 0 and second.computed == 0
        assert first.tokens == second.tokens and first.parts == second.parts > 2
        assert documents(worker) == [first.document]
        assert any(isinstance(event, Progress) and event.phase == "import" for event in told)
        told.clear()
        assert one.attach("report.txt", TEXT).computed == 0  # once more behind itself
        replies = [each.ask("Where is the anchor?") for each in (one, two)]
        assert all(reply.usage.prefilled_tokens < 100 for reply in replies)
        probes = [each.logprobs("And then?", "It was.") for each in (one, two)]
    worker.close()
    again = opener(**{"model.memory_budget": budget})
    for name, probe in zip(("one", "two"), probes, strict=True):
        with again.open(name) as session:
            assert session.logprobs("And then?", "It was.") == probe


def test_a_document_is_computed_anew_for_its_own_session_only_if_it_is_gone(opener: Open) -> None:
    worker = opener()
    with worker.open("one") as one:
        done = one.attach("report.txt", TEXT)
    worker.delete(done.document)
    with worker.open("one") as one:
        assert [message.content for message in one.messages()][-1] == "I have read it."
        assert one.ask("Where is the anchor?").usage.prefilled_tokens < 100  # shared with the session: it stays
    with worker.open("two", system="Be kind.") as two:
        assert two.attach("report.txt", TEXT).document == done.document


def test_a_document_is_not_attached_to_itself_and_nothing_empty_is(opener: Open) -> None:
    worker = opener()
    with worker.open("one") as one:
        done = one.attach("report.txt", TEXT)
        with pytest.raises(InputError, match="empty"):
            one.attach("blank.txt", " \n")
        with pytest.raises(InputError, match="not valid Unicode"):
            one.attach("bad.txt", "half \ud800 of it")
    with worker.open(done.document) as own, pytest.raises(InputError, match="already"):
        own.attach("report.txt", TEXT)


def test_what_does_not_fit_leaves_nothing_behind(opener: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = opener()
    with worker.open("one") as one:
        monkeypatch.setattr(type(one._conversation.engine.anatomy), "turns", False)
        before = one.messages()
        with pytest.raises(CapacityError, match="does not fit"):
            one.attach("long.txt", LONG)
        assert one.messages() == before and not documents(worker)


def test_stopped_half_way_it_goes_on_the_next_time(opener: Open) -> None:
    worker = opener()
    with worker.open("one", system="Be brief.") as one:
        thread = threading.Thread(target=lambda: one.attach("long.txt", LONG))
        thread.start()
        while not documents(worker):
            pass
        one.stop()
        thread.join()
        assert one.ask("Where does word20 lie?").text is not None
    with worker.open("two", system="Be kind.") as two:
        two.attach("long.txt", LONG)
    with worker.open("three", system="Be wise.") as three:
        assert three.attach("long.txt", LONG).computed == 0


def test_it_can_be_awaited(opener: Open) -> None:
    worker = opener()

    async def run() -> int:
        async with AsyncSession(worker.open("one")) as session:
            return (await session.attach("report.txt", TEXT)).tokens

    assert asyncio.run(run()) > 100


# -- front ends ----------------------------------------------------------------------------------------------------


def test_the_command_says_what_was_attached(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    worker, files = FakeWorker(), [tmp_path / "a.txt", tmp_path / "b.txt"]
    for file in files:
        file.write_text(f"text of {file.name}")
    command = ["attach", "--store", str(tmp_path / "none.db"), "trip", *map(str, files)]
    assert main(command, worker) == 0
    out, err = capsys.readouterr()
    assert out == "" and err.splitlines() == [
        f"{n}: attached, 12 tokens in 2 parts, 4 computed" for n in ("a.txt", "b.txt")
    ]
    assert worker.heard == ["text of a.txt", "text of b.txt"]
    assert main([*command, "--json"], worker) == 0
    out, _ = capsys.readouterr()
    assert json.loads(out)[0] == {"document": "document a.txt 0", "parts": 2, "tokens": 12, "computed": 4}


@pytest.mark.parametrize("content", [None, b"", b"\xff\xfe\x00", b"a\0b", "folder"])
def test_a_file_that_cannot_be_attached_is_one_line(
    content: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    worker, file = FakeWorker(), tmp_path / "file"
    if content == "folder":
        file.mkdir()
    elif content is not None:
        file.write_bytes(content)
    assert main(["attach", "--store", str(tmp_path / "none.db"), "trip", str(file)], worker) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("kvchat: ") and len(err.splitlines()) == 1
    assert worker.opened == []


def test_the_plain_chat_attaches(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "my file.txt").write_text("text")
    worker: Any = FakeWorker()
    lines = LineChat(worker, worker.open("trip"), plain.Status())
    lines.answer(f"/attach {tmp_path / 'my file.txt'}")
    assert worker.heard == ["text"] and "attached, 12 tokens, 4 computed" in capsys.readouterr().err
    with pytest.raises(InputError, match="none"):
        lines.answer(f"/attach {tmp_path / 'none'}")


def test_notices_of_a_document_reach_the_listener(opener: Open) -> None:
    told: list[Any] = []
    with opener(told.append).open("one", system="Be brief.") as one:
        one.attach("long.txt", LONG)
    assert any(isinstance(event, Notice) and "goes on at position" in event.text for event in told)
