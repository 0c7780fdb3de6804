"""The screen under load: the real program without a terminal, over the real engine.

    restore   a saved session is opened, and its KV comes back
    prefill, generate, seal   turns
    open, scroll   a long session
    fence     an answer of code in one block, 200 tokens a second, drawn while it comes
    first paint   of a new process

Of each phase: how late the event loop comes to a callback that is due every 5 ms, and how long a key takes until the
input shows it.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from textual import events

from kvchat.bench.history import made_up, spread
from kvchat.bench.lag import Figures, Meter
from kvchat.bench.watched import WatchedWorker
from kvchat.config import Config
from kvchat.errors import InputError
from kvchat.events import Listener, Notice
from kvchat.keys import child_environment
from kvchat.tui.answer import Answer
from kvchat.tui.app import ChatApp
from kvchat.tui.heap import calm, set_aside
from kvchat.tui.prompt import Prompt
from kvchat.tui.transcript import Transcript
from kvchat.worker import Worker

SIZE = (120, 40)
CHILD = """
import json, os, pathlib, sys, time
import kvchat.cli.app
from kvchat.config import Config
from kvchat.tui import app
config = Config(**json.loads(sys.argv[1]))
def connect(listener):
    from kvchat.worker import Worker
    return Worker(config, listener)
class Timed(app.ChatApp):
    CSS_PATH = pathlib.Path(app.__file__).with_name(app.ChatApp.CSS_PATH)
    def _display(self, screen, drawn):
        if drawn is None:
            return
        print(json.dumps({"at": time.time(), "torch": "torch" in sys.modules}), file=sys.__stdout__, flush=True)
        os._exit(0)
Timed(connect, config).run(headless=True, size=(120, 40))
"""


@dataclass(frozen=True)
class Load:
    """How much there is to do."""

    question_tokens: int = 600
    answer_tokens: int = 96
    messages: int = 10_000
    pages: int = 100
    code_lines: int = 500
    tokens_per_s: int = 200


def tui(config: Config, listener: Listener | None, tokens: int, rounds: int, load: Load | None = None) -> Figures:
    """Lags and delays in milliseconds, of each phase.

    Args:
        config: the model and all settings; the store is a temporary one.
        listener: told of what is measured.
        tokens: length of the session that is restored.
        rounds: turns, and starts of a process.
    """
    load, tell = load or Load(), listener or (lambda event: None)
    with tempfile.TemporaryDirectory(prefix="kvchat-bench-") as folder:
        config = _settings(config, Path(folder) / "bench.db", load)
        tell(Notice("making a session"))
        _prepare(config, tokens)
        with calm():
            figures = asyncio.run(_Screen(config, load, rounds, tell).measure())
        tell(Notice("measuring first paint"))
        return figures | first_paint(config, rounds)


def _settings(config: Config, path: Path, load: Load) -> Config:
    store = config.store.model_copy(update={"path": str(path)})
    generate = config.generate.model_copy(update={"max_new_tokens": load.answer_tokens})
    return config.model_copy(update={"store": store, "generate": generate})


def _prepare(config: Config, tokens: int) -> None:
    worker = Worker(config)
    try:
        with worker.open("bench") as session:
            session.append(made_up(tokens))
            session.settle()
    finally:
        worker.close()


class _Screen:
    """One run of the program."""

    def __init__(self, config: Config, load: Load, rounds: int, tell: Listener) -> None:
        self.config, self.load, self.rounds, self.tell = config, load, rounds, tell
        self.meter = Meter()
        self.idle = asyncio.Event()

    async def measure(self) -> Figures:
        """All phases."""
        loop, workers = asyncio.get_running_loop(), list[Worker]()

        def phase(name: str) -> None:
            self.meter.phase = name
            loop.call_soon_threadsafe(self.idle.set if name == "idle" else self.idle.clear)

        def connect(listener: Listener) -> Worker:
            workers.append(Worker(self.config, listener))
            return cast(Worker, WatchedWorker(workers[-1], phase))

        self.app = ChatApp(set_aside(connect), self.config, "bench")
        try:
            async with self.app.run_test(size=SIZE, message_hook=self.meter.hook):
                prompt = self.app.screen.query_one(Prompt)
                async with self.meter.measuring(self.app, prompt):
                    seconds = await self._phases(prompt)
        finally:
            for worker in workers:
                await asyncio.to_thread(worker.close)
        names = ("load", "restore", "prefill", "generate", "seal", "open", "scroll", "fence")
        return {name: self.meter.figures(name) | seconds.get(name, {}) for name in names}

    async def _phases(self, prompt: Prompt) -> dict[str, Figures]:
        self.tell(Notice("measuring restore"))
        await self.idle.wait()
        for number in range(self.rounds):
            self.tell(Notice(f"measuring turn {number + 1}"))
            await self._turn(prompt, number)
        transcript = self.app.screen.query_one(Transcript)
        self.tell(Notice("measuring a long session"))
        open_s, scroll_s = await self._long(transcript)
        self.tell(Notice("measuring a block of code"))
        return {"open": {"s": open_s}, "scroll": {"s": scroll_s}, "fence": await self._fence(transcript)}

    async def _turn(self, prompt: Prompt, number: int) -> None:
        self.meter.types = False
        await asyncio.sleep(2 * Meter.KEY_EVERY_S)
        self.idle.clear()
        prompt.text = " ".join(message["content"] for message in made_up(self.load.question_tokens, number + 1))
        self.app.post_message(events.Key("enter", None))
        while prompt.text:
            await asyncio.sleep(Meter.EVERY_S)
        self.meter.types = True
        await self.idle.wait()

    async def _long(self, transcript: Transcript) -> tuple[float, float]:
        """Seconds to open a long session, and to scroll: some pages up, to its beginning, and to its end."""
        messages = list(_messages(self.load.messages))
        self.meter.phase = "open"
        begun = time.perf_counter()
        await transcript.show(messages)
        opened = time.perf_counter()
        self.meter.phase = "scroll"
        for _ in range(self.load.pages):
            transcript.scroll_page_up()
            await asyncio.sleep(0.03)
        await transcript.to_beginning()
        await transcript.to_end()
        return opened - begun, time.perf_counter() - opened

    async def _fence(self, transcript: Transcript) -> Figures:
        """An answer that is one block of code; seconds, and how many were planned."""
        pieces = list(_code(self.load.code_lines))
        answer = Answer()
        await transcript.add(answer)
        self.meter.phase, begun = "fence", time.perf_counter()
        for number, piece in enumerate(pieces):
            await answer.grow(piece)
            due = begun + (number + 1) / self.load.tokens_per_s
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
        await answer.finish("".join(pieces))
        self.meter.phase = "idle"
        return {"s": time.perf_counter() - begun, "planned_s": len(pieces) / self.load.tokens_per_s}


def _messages(number: int) -> Iterator[Any]:
    text = "Answer **{0}**, a list:\n\n- one\n- two\n\n```python\ndef f(x):\n    return x + {0}\n```\n\nThat is `all`."
    for place in range(number):
        is_user = place % 2 == 0
        content = f"Question {place // 2}?" if is_user else text.format(place // 2)
        yield SimpleNamespace(role="user" if is_user else "assistant", content=content)


def _code(lines: int) -> Iterator[str]:
    """Tokens of a block of code."""
    yield "```python\n"
    for number in range(lines):
        yield from ("    total", " +=", " weights", "[", str(number), "]", " *", ' "text"', "  # note", "\n")
    yield "```\n"


def first_paint(config: Config, rounds: int) -> Figures:
    """Seconds from starting a process until its window is drawn, and whether it waited for torch.

    Raises:
        InputError: the process failed; the last line that it wrote.
    """
    seconds, torch = [], False
    for _ in range(rounds):
        begun = time.time()
        command = [sys.executable, "-c", CHILD, config.model_dump_json()]
        child = subprocess.run(command, env=child_environment(), capture_output=True, text=True, check=False)
        lines = child.stdout.splitlines()
        if child.returncode or not lines:
            raise InputError(f"the measuring process failed: {(child.stderr.splitlines() or ['no output'])[-1]}")
        answer = json.loads(lines[-1])
        seconds.append(answer["at"] - begun)
        torch = torch or answer["torch"]
    return {"first_paint_s": spread(seconds), "torch_at_first_paint": torch}
