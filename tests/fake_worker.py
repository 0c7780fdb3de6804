"""A stand-in for the worker: it answers at once and remembers how it was called."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

from kvchat.attaching import Attached
from kvchat.branching import Node
from kvchat.config import Config
from kvchat.errors import CapacityError
from kvchat.events import Delta, Event, Listener, Notice, Progress, Timings, TurnDone, Usage
from kvchat.probe import Finding
from kvchat.store.records import SearchHit

USAGE = Usage(prompt_tokens=12, cached_tokens=8, prefilled_tokens=4, completion_tokens=2)
STATS = {
    "name": "trip",
    "model": "tiny",
    "context_window": 100,
    "num_turns": 1,
    "num_seen": 12,
    "num_tokens": 12,
    "position": 12,
    "offset": 0,
    "rebased": False,
    "kv_budget": "",
    "num_pairs": 96,
    "num_kept": 48,
    "keep_ratio": 0.5,
    "bytes_in_memory": 2048,
    "bytes_on_disk": 4096,
    "stored": 0.5,
    "store": {"bytes_in_use": 8_000_000, "disk_budget": 0, "bytes_free": 9_000_000_000, "min_free": 1 << 30},
    "segments": [
        {
            "id": "x",
            "start": 0,
            "end": 12,
            "kind": "sealed",
            "turns": [1, 1],
            "codec": "k8v8",
            "rows": 48,
            "rows_total": 96,
        }
        | {"place": 0, "position": 0, "tier": "part", "recalled": False, "rows_stored": 96, "stored_chunks": 7}
        | {"chunks_held": 5, "num_chunks": 7, "bytes_in_memory": 2048, "bytes_on_disk": 4096, "seal_s": 0.1}
    ],
    "turns": [],
    "last": None,
}


INFO = {"name": "trip", "title": "Rome by night", "titled": "model", "tags": ("italy",), "num_turns": 3, "settings": {}}
NODES = (
    Node("m1", None, "user", "Where is Rome?", 1, True, "2026-01-01T10:00"),
    Node("m2", "m1", "assistant", "In Italy.", 1, True, "2026-01-01T10:01"),
    Node("m3", "m2", "user", "And Oslo?", 2, False, "2026-01-01T10:02"),
    Node("m4", "m3", "assistant", "In Norway.", 2, False, "2026-01-01T10:03"),
    Node("m5", "m2", "user", "And Bern?", 2, True, "2026-01-01T10:04"),
    Node("m6", "m5", "assistant", "In Switzerland.", 2, True, "2026-01-01T10:05"),
)


class FakeSession:
    """Answers every message with its upper case; a message "full" does not fit."""

    def __init__(self, name: str, worker: FakeWorker) -> None:
        self.name, self.model, self.context_window = name, "tiny", 100
        self.worker = worker

    def send(self, text: str) -> Iterator[Event]:
        if text == "full":
            raise CapacityError("the window has no room for 1 token; begin a new session")
        self.worker.heard.append(text)
        yield Progress("prefill", 2, 4)
        yield Notice("one segment was rebuilt")
        yield from map(Delta, text.upper())
        yield TurnDone(text.upper(), USAGE, Timings(0.0, 0.25, (0.1,)), "stop")

    def resend(self) -> Iterator[Event]:
        return self.send(self.worker.heard.pop())

    def edit(self, turn: int, text: str) -> Iterator[Event]:
        self.worker.asked.append(("edit", turn))
        return self.send(text)

    def go_on(self) -> Iterator[Event]:
        return self.send("and so on")

    def tree(self) -> list[Node]:
        return list(NODES)

    def switch(self, message_id: str) -> None:
        self.worker.asked.append(("switch", message_id))

    def messages(self) -> list[SimpleNamespace]:
        return [SimpleNamespace(role="user", content=text) for text in self.worker.heard]

    def configure(self, settings: dict[str, Any]) -> None:
        self.worker.asked.append(("configure", settings))

    def stop(self) -> None:
        self.worker.asked.append(("stop", self.name))

    def append(self, messages: Sequence[dict[str, str]]) -> Usage:
        for message in messages:
            if message["content"] == "full":
                raise CapacityError("the window has no room for 1 token; begin a new session")
            self.worker.heard.append(message["content"])
        return USAGE

    def attach(self, title: str, text: str) -> Attached:
        self.worker.heard.append(text)
        return Attached(f"document {title} 0", 2, 12, 4)

    def rewind(self, turns: int = 1) -> str:
        return [self.worker.heard.pop() for _ in range(turns)][-1]

    def fork(self, name: str, at: int | None = None) -> FakeSession:
        self.worker.asked.append(("fork", at))
        return FakeSession(name, self.worker)

    def settle(self) -> float:
        return 0.5

    def stats(self) -> dict[str, Any]:
        return STATS

    def episodes(self) -> list[dict[str, Any]]:
        return [{"name": "dogs park", "turns": (1,)}]

    def check(self) -> Finding:
        return Finding(self.name, "same", ())

    def close(self) -> None:
        pass

    def __enter__(self) -> FakeSession:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class FakeWorker:
    """Remembers how it was called."""

    def __init__(self) -> None:
        self.heard: list[str] = []
        self.asked: list[tuple[str, Any]] = []
        self.infos = [SimpleNamespace(**INFO)]
        self.opened: list[tuple[str | None, dict[str, Any]]] = []
        self.deleted: list[str] = []
        self.closed = False

    def __call__(self, config: Config, listener: Listener, key: Any = None) -> FakeWorker:
        self.config = config
        return self

    def open(self, name: str | None = None, **how: Any) -> FakeSession:
        self.opened.append((name, how))
        return FakeSession(name or "last", self)

    def delete(self, name: str) -> None:
        self.deleted.append(name)

    def take_in(self, file: Any, name: str, *_: Any) -> FakeSession:
        return FakeSession(name, self)

    def sessions(self) -> list[SimpleNamespace]:
        return list(self.infos)

    def search(self, text: str) -> list[SearchHit]:
        return [SearchHit("trip", 2, "user", f"a {text} there", ((2, 2 + len(text)),))] if text != "nothing" else []

    def rename(self, name: str, new: str) -> None:
        self.asked.append(("rename", (name, new)))

    def retitle(self, name: str, title: str) -> None:
        self.infos[0].title = title

    def tag(self, name: str, tags: Sequence[str]) -> None:
        self.infos[0].tags = tuple(sorted(tags))

    def close(self) -> None:
        self.closed = True
