"""When the terminal goes away or the system asks to end, the program leaves as by /quit; what a kill left is mended."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from time import sleep
from types import FrameType
from typing import Any, TextIO, cast

SIGNALS = tuple(getattr(signal, name) for name in ("SIGHUP", "SIGTERM") if hasattr(signal, name))


def code_of(number: int) -> int:
    """The exit code that shells give a program which a signal ended."""
    return 128 + number


@contextmanager
def as_exit() -> Iterator[None]:
    """Inside, in the main thread, such a signal is a SystemExit: all that is open is closed on the way out."""
    heard = False

    def leave(number: int, _: FrameType | None) -> None:
        nonlocal heard
        heard = True
        for each, handler in before.items():
            signal.signal(each, handler)  # a second one ends it at once
        raise SystemExit(code_of(number))

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    with nudged(lambda: heard):
        before = {number: signal.signal(number, leave) for number in SIGNALS}
        try:
            yield
        finally:
            heard = True
            for number, handler in before.items():
                signal.signal(number, handler)


@contextmanager
def nudged(is_heard: Callable[[], bool]) -> Iterator[None]:
    """Inside, such a signal does not wait for the next key, whenever it comes.

    Python runs handlers between its own steps. A signal that comes when readline has looked for one and does not yet
    wait for a key is seen with that key, perhaps never. So a thread, told of each signal as it comes, interrupts the
    waiting with another one, without effect, until the handler has run.
    """
    if not hasattr(signal, "SIGWINCH"):  # Windows
        yield
        return
    told, teller = socket.socketpair()
    teller.setblocking(False)  # Python demands it
    main = threading.get_ident()

    def nudge() -> None:
        while number := told.recv(1):
            sleep(0.05)
            while number[0] in SIGNALS and not is_heard():
                signal.pthread_kill(main, signal.SIGWINCH)
                sleep(0.05)

    before = signal.set_wakeup_fd(teller.fileno(), warn_on_full_buffer=False)
    thread = threading.Thread(target=nudge, name="kvchat-nudge", daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        teller.close()
        thread.join()
        told.close()


def follow(leave: Callable[[int], None]) -> None:
    """Have the running loop call `leave` with the first such signal; a second one ends the program at once."""
    loop = asyncio.get_running_loop()

    def first(number: int) -> None:
        for each in SIGNALS:
            loop.remove_signal_handler(each)
        leave(number)

    with suppress(NotImplementedError, RuntimeError):  # on Windows, and outside the main thread
        for number in SIGNALS:
            loop.add_signal_handler(number, first, number)


class Unfailing:
    """A stream to a terminal that may go away: from then on nothing is written, and nothing fails or waits.

    Textual's writing thread ends with the first error, and whoever writes then waits for it for ever.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with self._given_up():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._given_up():
            self._stream.flush()

    @contextmanager
    def _given_up(self) -> Iterator[None]:
        try:
            yield
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def unfailing_screen() -> Iterator[None]:
    """Inside, what Textual draws on may go away."""
    before = sys.__stderr__
    sys.__stderr__ = cast(Any, Unfailing(before)) if before else before  # type: ignore[misc]
    try:
        yield
    finally:
        sys.__stderr__ = before  # type: ignore[misc]


def mend_terminal() -> None:
    """Let a terminal that a killed program left without lines and echo have them again, before it is taken over."""
    try:
        import termios
    except ImportError:  # Windows
        return
    with suppress(termios.error, OSError):
        handle = sys.stdin.fileno()
        given, taken, control, local, *rest = termios.tcgetattr(handle)
        usual = termios.ICANON | termios.ECHO | termios.ISIG | termios.IEXTEN
        if local & usual != usual:
            kept = [given | termios.ICRNL, taken | termios.OPOST, control, local | usual, *rest]
            termios.tcsetattr(handle, termios.TCSANOW, kept)
