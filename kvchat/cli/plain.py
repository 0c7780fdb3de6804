"""Answers and progress on a plain terminal: answers go to stdout, everything else to stderr."""

from __future__ import annotations

import base64
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO

from kvchat.errors import InputError
from kvchat.events import Delta, Event, Notice, Progress, TurnDone
from kvchat.figures import format_room as format_room
from kvchat.figures import format_stats as format_stats
from kvchat.figures import part as part
from kvchat.figures import recalled
from kvchat.figures import size as size
from kvchat.terminal import Stream, neutralise

if TYPE_CHECKING:
    from rich.progress import Progress as Bars
    from rich.progress import TaskID

    from kvchat.cli.flags import ModelFlags
    from kvchat.handle import Session
    from kvchat.worker import Worker

LABELS = {
    "download": "Downloading the model",
    "convert": "Converting the model",
    "load": "Loading the model",
    "restore": "Restoring saved turns",
    "rebuild": "Computing saved turns again",
    "prefill": "Reading",
    "import": "Importing",
    "seal": "Sealing",
    "evaluate": "Measuring",
    "fit": "Fitting",
}

EVERY_S = 5.0
"""Seconds between two lines of progress, and until the first."""


def say(text: str) -> None:
    """One line on stderr."""
    print(neutralise(text) if sys.stderr.isatty() else text, file=sys.stderr, flush=True)


def write(text: str) -> None:
    """Text on stdout, at once; harmless to a terminal, unchanged in a pipe."""
    sys.stdout.write(neutralise(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def to_clipboard(text: str) -> None:
    """Ask the terminal to put a text, neutralised already, on its clipboard (OSC 52: over SSH too).

    Raises:
        InputError: stdout is no terminal, or one that would print the sequence.
    """
    if not sys.stdout.isatty() or os.environ.get("TERM") == "dumb":
        raise InputError("this is no terminal with a clipboard; /export FILE writes the conversation")
    sys.stdout.write(f"\x1b]52;c;{base64.b64encode(text.encode()).decode()}\a")
    sys.stdout.flush()


class Status:
    """A listener: progress is a bar, if stderr is a terminal, and a notice is a line. Any thread may call it.

    Args:
        lines: no bar: of what takes long there is a line now and then, as screen readers and simple terminals want it.
        clock: seconds that never go back.
    """

    def __init__(self, lines: bool = False, clock: Callable[[], float] = time.monotonic) -> None:
        self._stderr = sys.stderr  # the libraries that load models take the name away for a while
        self._lines = lines or os.environ.get("TERM") == "dumb"
        self._clock = clock
        self._lock = threading.Lock()
        self._bars: Bars | None = None
        self._task: tuple[str, TaskID] | None = None
        self._told: tuple[str, float] | None = None
        self._waiting: list[str] | None = None

    def __call__(self, event: Progress | Notice) -> None:
        if isinstance(event, Notice):
            self.clear()
            self._say(event.text)
        elif event.total and event.done >= event.total:
            self.clear()
        elif self._stderr.isatty() and self._waiting is None:
            with self._lock:
                (self._tell if self._lines else self._show)(event)

    @contextmanager
    def typing(self) -> Iterator[None]:
        """Inside, the user types: nothing is written over the line, and notices wait for its end."""
        self.clear()
        with self._lock:
            self._waiting = []
        try:
            yield
        finally:
            with self._lock:
                waiting, self._waiting = self._waiting, None
            for text in waiting or ():
                say(text)

    def clear(self) -> None:
        """Remove the bar, so that text can follow."""
        with self._lock:
            if self._bars:
                self._bars.stop()
            self._bars = self._task = self._told = None

    def _say(self, text: str) -> None:
        with self._lock:
            if self._waiting is not None and self._stderr.isatty():
                self._waiting.append(text)
                return
        say(text)

    def _tell(self, event: Progress) -> None:
        now = self._clock()
        if self._told is None or self._told[0] != event.phase:
            self._told = event.phase, now
        elif now - self._told[1] >= EVERY_S:
            self._told = event.phase, now
            say(f"{LABELS[event.phase]}: {_amount(event)}".removesuffix(": "))

    def _show(self, event: Progress) -> None:
        if self._bars is None:
            self._bars = _bars(self._stderr)
            self._bars.start()
        if self._task is None or self._task[0] != event.phase:
            for task in self._bars.task_ids:
                self._bars.remove_task(task)
            self._task = event.phase, self._bars.add_task(LABELS[event.phase], total=None, amount="")
        self._bars.update(self._task[1], completed=event.done, total=event.total or None, amount=_amount(event))


@contextmanager
def working(flags: ModelFlags, lines: bool = False) -> Iterator[tuple[Worker, Status]]:
    """A worker and the display of its progress, as `lines` or bars; closed at the end."""
    status = Status(lines)
    worker = flags.connect()(status)
    try:
        yield worker, status
    finally:
        status.clear()
        worker.close()


@contextmanager
def opened(
    flags: ModelFlags, name: str | None, *, lines: bool = False, **how: Any
) -> Iterator[tuple[Worker, Session, Status]]:
    """A worker and its progress display, and the session `name` opened; all closed at the end."""
    with (
        working(flags, lines) as (worker, status),
        worker.open(name, model=flags.model, rebuild=flags.rebuild, **how) as session,
    ):
        status.clear()
        yield worker, session, status


def _bars(stream: TextIO) -> Bars:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[amount]}"), TimeRemainingColumn()
    console = Console(file=stream)
    return Progress(*columns, console=console, transient=True, redirect_stdout=False, redirect_stderr=False)


def _amount(event: Progress) -> str:
    """'1200/6000 tokens' or '12.5/98.0 MB'."""
    scale, unit = (1e6, "MB") if event.phase in ("download", "convert", "load") else (1, "tokens")
    unit = {"evaluate": "runs", "fit": "steps"}.get(event.phase, unit)
    figures = [f"{count / scale:.1f}" if scale > 1 else str(count) for count in (event.done, event.total) if count]
    return f"{'/'.join(figures)} {unit}" if figures else ""


@contextmanager
def interruptible(session: Session) -> Iterator[None]:
    """Inside, the first Ctrl+C ends the turn, which keeps what was said; the second is a KeyboardInterrupt."""

    def stop(*_: object) -> None:
        signal.signal(signal.SIGINT, before)
        session.stop()

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def show_turn(events: Iterable[Event], status: Status, quiet: bool = False) -> TurnDone:
    """Stream one turn to the terminal (`quiet`: only its progress) and give back its end."""
    done: TurnDone | None = None
    typed, harmless = sys.stdout.isatty(), Stream()
    for event in events:
        match event:
            case Delta(text):
                status.clear()
                if not quiet:
                    write(harmless.step(text) if typed else text)
            case TurnDone():
                done = event
            case _:
                status(event)
    status.clear()
    assert done, "a turn ends with TurnDone"
    if not quiet:
        write("\n")
    return done


def summary(done: TurnDone) -> str:
    """The turn's counts and times as one line."""
    usage, timings = done.usage, done.timings
    parts = [f"{usage.cached_tokens} tokens cached, {usage.prefilled_tokens} read, {usage.completion_tokens} written"]
    parts.extend([back] if (back := recalled(usage.recalled)) else [])
    parts.append(f"first text after {timings.ttft_s:.2f} s")
    if timings.itl_s and sum(timings.itl_s) > 0:
        parts.append(f"{len(timings.itl_s) / sum(timings.itl_s):.1f} tokens/s")
    endings = {"length": "cut at max_new_tokens", "interrupted": "stopped", "context": "the context window is full"}
    parts.extend([endings[done.finish_reason]] if done.finish_reason in endings else [])
    return f"[{'; '.join(parts)}]"
