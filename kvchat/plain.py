"""Chat and progress on a plain terminal: answers go to stdout, everything else to stderr."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from kvchat.errors import InputError, KVChatError
from kvchat.events import Delta, Event, Notice, Progress, TurnDone
from kvchat.figures import format_room as format_room
from kvchat.figures import format_stats as format_stats
from kvchat.figures import part as part
from kvchat.figures import recalled
from kvchat.figures import size as size
from kvchat.terminal import neutralise

if TYPE_CHECKING:
    from rich.progress import Progress as Bars
    from rich.progress import TaskID

    from kvchat.flags import ModelFlags
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
HELP = """\
/retry        answer the last message again
/rewind [N]   take back the last N turns (1)
/keep [F]     hold this fraction of older turns' KV, from now on
/fork NAME    go on in a copy of this session
/attach FILE  take a text file in
/stats        what is kept, in memory and on disk
/quit         leave (or Ctrl+D); Ctrl+C stops an answer"""


def say(text: str) -> None:
    """One line on stderr."""
    print(neutralise(text) if sys.stderr.isatty() else text, file=sys.stderr, flush=True)


def write(text: str) -> None:
    """Text on stdout, at once; harmless to a terminal, unchanged in a pipe."""
    sys.stdout.write(neutralise(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


class Status:
    """A listener: progress is a bar, if stderr is a terminal, and a notice is a line. Any thread may call it."""

    def __init__(self) -> None:
        self.hidden = False
        """Set while the user types: background work must not draw over the line."""
        self._stderr = sys.stderr  # the libraries that load models take the name away for a while
        self._lock = threading.Lock()
        self._bars: Bars | None = None
        self._task: tuple[str, TaskID] | None = None

    def __call__(self, event: Progress | Notice) -> None:
        if isinstance(event, Notice):
            self.clear()
            say(event.text)
        elif event.total and event.done >= event.total:
            self.clear()
        elif self._stderr.isatty() and not self.hidden:
            with self._lock:
                self._show(event)

    def clear(self) -> None:
        """Remove the bar, so that text can follow."""
        with self._lock:
            if self._bars:
                self._bars.stop()
            self._bars = self._task = None

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
def working(flags: ModelFlags) -> Iterator[tuple[Worker, Status]]:
    """A worker and the display of its progress; closed at the end."""
    status = Status()
    worker = flags.connect()(status)
    try:
        yield worker, status
    finally:
        status.clear()
        worker.close()


@contextmanager
def opened(flags: ModelFlags, name: str | None, **how: Any) -> Iterator[tuple[Worker, Session, Status]]:
    """A worker and its progress display, and the session `name` opened; all closed at the end."""
    with (
        working(flags) as (worker, status),
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
    for event in events:
        match event:
            case Delta(text):
                status.clear()
                if not quiet:
                    write(text)
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


def chat(session: Session, status: Status) -> None:
    """Read lines and answer them until /quit or the end of input. Typed lines survive an error, piped ones do not."""
    say(f"{session.name}: {session.model}. /help lists commands, /quit leaves.")
    while True:
        try:
            line = _ask_line(status)
            session = _answer(session, line, status)
        except EOFError:
            return
        except KVChatError as error:
            status.clear()
            if not sys.stdin.isatty():
                raise
            say(f"kvchat: {error}")


def _ask_line(status: Status) -> str:
    """The next line that is not blank; the prompt appears only if someone types."""
    typed = sys.stdin.isatty() and sys.stdout.isatty()
    if typed:
        with suppress(ImportError):  # there is none on Windows
            import readline  # noqa: F401  (gives input() a history and editing)
    status.hidden = True
    status.clear()
    try:
        while not (line := input("> " if typed else "").strip()):
            pass
    finally:
        status.hidden = False
    return line


def _answer(session: Session, line: str, status: Status) -> Session:
    """Do what `line` says; the session to go on with. /quit is an EOFError."""
    name, _, argument = line.partition(" ")
    match name:
        case "/quit" | "/exit":
            raise EOFError
        case "/help":
            say(HELP)
        case "/stats":
            say(format_stats(session.stats()))
        case "/retry":
            _turn(session, session.resend(), status)
        case "/rewind":
            say(f"took back: {session.rewind(_count(argument))}")
        case "/keep":
            session.configure({"compress.keep_ratio": argument.strip() or None})
            say(format_stats(session.stats()).splitlines()[2])
        case "/fork":
            session = session.fork(argument.strip())
            say(f"now in {session.name}")
        case "/attach":
            from kvchat.documents import read_document

            file = Path(argument.strip()).expanduser()
            attached = session.attach(file.name, read_document(file))
            status.clear()
            say(f"attached, {attached.tokens} tokens, {attached.computed} computed")
        case _ if name.startswith("/") and name.removeprefix("/").isalpha():
            raise InputError(f"unknown command {name}; /help lists commands")
        case _:
            _turn(session, session.send(line), status)
    return session


def _turn(session: Session, events: Iterable[Event], status: Status) -> None:
    with interruptible(session):
        done = show_turn(events, status)
    say(summary(done))


def _count(argument: str) -> int:
    if argument and not (argument.isdecimal() and int(argument) > 0):
        raise InputError(f"/rewind takes a number of turns, got {argument!r}")
    return int(argument or 1)
