"""The real program in a pseudo-terminal, and a rough idea of what its screen shows."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from time import monotonic

ROOT = Path(__file__).resolve().parent.parent
ROWS, COLUMNS = 24, 80
SEQUENCE = re.compile(
    r"\x1b\[(?P<given>[0-9;:<=>?]*)(?P<ends>[ -/]*[@-~])"  # CSI
    r"|\x1b[\]PX^_][^\x07\x1b]*(?:\x07|\x1b\\)"  # OSC, DCS and the like
    r"|\x1b[()][0-9A-B]|\x1b[=>78cDEHM]"
)


class Screen:
    """What a terminal shows of what was written to it, without colours."""

    def __init__(self) -> None:
        self.cells = [[" "] * COLUMNS for _ in range(ROWS)]
        self._row = self._column = 0
        self._rest = ""

    @property
    def text(self) -> str:
        """All lines."""
        return "\n".join("".join(line).rstrip() for line in self.cells)

    def feed(self, text: str) -> None:
        """Take in what the program wrote; a sequence that is cut off waits for its end."""
        text, place = self._rest + text, 0
        while place < len(text):
            if text[place] == "\x1b":
                found = SEQUENCE.match(text, place)
                if not found and len(text) - place < 200:
                    break
                if found and found["ends"]:
                    self._move(found["given"], found["ends"])
                place = found.end() if found else place + 1
            else:
                self._put(text[place])
                place += 1
        self._rest = text[place:]

    def _put(self, char: str) -> None:
        if char == "\n":
            self._row = min(self._row + 1, ROWS - 1)
        elif char == "\r":
            self._column = 0
        elif char == "\b":
            self._column = max(0, self._column - 1)
        elif char >= " " and self._column < COLUMNS:
            self.cells[self._row][self._column] = char
            self._column += 1

    def _move(self, given: str, ends: str) -> None:
        numbers = [int(number) if number else 0 for number in given.split(";")] if given[:1] not in "<=>?" else []
        first = numbers[0] if numbers else 0
        if ends in "Hf" and not given.startswith("?"):
            self._row = min(max(first, 1), ROWS) - 1
            self._column = min(max(numbers[1] if len(numbers) > 1 else 1, 1), COLUMNS) - 1
        elif ends == "J" and first == 2:
            self.cells = [[" "] * COLUMNS for _ in range(ROWS)]
        elif ends == "K":
            self.cells[self._row][self._column :] = [" "] * (COLUMNS - self._column)
        elif ends == "C":
            self._column = min(COLUMNS - 1, self._column + max(first, 1))


class Terminal:
    """A pseudo-terminal; programs are run in it one after the other."""

    def __init__(self) -> None:
        self.master, self.slave = pty.openpty()
        fcntl.ioctl(self.slave, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
        self.screen, self.written = Screen(), ""
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, *words: str, env: Mapping[str, str], program: Sequence[str] = ("-m", "kvchat")) -> None:
        """Run `kvchat WORDS`, or another Python program, in the foreground of this terminal."""
        self.screen, self.written = Screen(), ""
        self.process = subprocess.Popen(
            [sys.executable, *program, *words],
            stdin=self.slave,
            stdout=self.slave,
            stderr=self.slave,
            cwd=ROOT,
            env={**os.environ, "TERM": "xterm-256color", "OMP_NUM_THREADS": "1", **env},
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def read(self, seconds: float) -> bool:
        """Take in what is written within so many seconds; whether there was anything."""
        if not select.select([self.master], [], [], seconds)[0]:
            return False
        try:
            text = os.read(self.master, 1 << 16).decode(errors="replace")
        except OSError:  # nobody has it open any more
            return False
        self.written += text
        self.screen.feed(text)
        return True

    def until(self, is_so: Callable[[], object], seconds: float = 90) -> None:
        """Read until something is so."""
        end = monotonic() + seconds
        while not is_so():
            alive = self.process is not None and self.process.poll() is None
            assert alive and monotonic() < end, f"alive: {alive}; the screen is\n{self.screen.text}"
            self.read(0.05)

    def shows(self, pattern: str) -> bool:
        return re.search(pattern, self.screen.text) is not None

    def wait(self, seconds: float = 60) -> int:
        """Read until the program has ended; its exit code."""
        assert self.process
        end = monotonic() + seconds
        while self.process.poll() is None:
            assert monotonic() < end, f"it does not end; the screen is\n{self.screen.text}"
            self.read(0.05)
        while self.read(0.05):
            pass
        return self.process.returncode

    def send(self, number: int) -> None:
        assert self.process
        os.kill(self.process.pid, number)

    @property
    def is_sane(self) -> bool:
        """Whether a shell finds lines, echo and signals as usual."""
        given, taken, _, local, *_ = termios.tcgetattr(self.slave)
        usual = termios.ICANON | termios.ECHO | termios.ISIG
        return local & usual == usual and bool(given & termios.ICRNL) and bool(taken & termios.OPOST)

    @property
    def is_given_back(self) -> bool:
        """Whether the last that was said of each mode is as a shell wants it."""
        left = {"1049": "l", "25": "h", "1000": "l", "1003": "l", "2004": "l"}
        said = dict(re.findall(r"\x1b\[\?(\d+)([hl])", self.written))
        return all(said.get(mode, end) == end for mode, end in left.items())

    def close(self) -> None:
        if self.process and self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()
        for handle in (self.master, self.slave):
            with suppress(OSError):  # closed by the test
                os.close(handle)
