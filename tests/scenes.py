"""The main screens over an engine that says the same every time: for snapshots of text and for screenshots.

A scene is the chat with keys pressed until something is to be seen. Stamps are so many hours before now, so that ages
read the same; nothing blinks or moves.
"""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from textual.pilot import Pilot
from textual.widgets import Input, TextArea

from kvchat.branching import Node
from kvchat.config import Config
from kvchat.events import Delta, Event, Timings, TurnDone, Usage
from kvchat.inspecting import Inspection
from kvchat.store.records import Message, SearchHit, SessionInfo
from kvchat.tui.app import ChatApp
from kvchat.tui.picker import SessionPicker
from tests.fake_inspection import inspection
from tests.tui_host import wait_until

NOTES = """# Lisbon, May

- Thursday: tram 28 early, then Alfama on foot
- Friday: Belém by train, the tower before ten
- Saturday: rain? then the tile museum
"""
SETTINGS = """[tui]
theme = "{theme}"

[compress]
keep_ratio = 0.3  # of what is sealed
"""
ASKED = (
    (
        "Plan three days in Lisbon in May, on foot where we can.",
        "Here is one that keeps the hills for the mornings.",
    ),
    (
        "Which day is best for Belém?",
        "**Friday.** The monastery is closed on Mondays, and on weekends it is full.",
    ),
    ("And if it rains?", "Then the tile museum: it is dry, quiet and worth two hours."),
    ("What was the name of the café that Ana told us about?", "*Pastelaria Alcôa*, in the Chiado."),
)
LAST = "How long do the walks take, as a table and as code?"
ANSWER = """\
About six hours in all:

| day      | walk             | hours |
|----------|------------------|------:|
| Thursday | Alfama           |   2.5 |
| Friday   | Belém, riverside |   2.0 |
| Saturday | Chiado           |   1.5 |

```python
walks = {"Alfama": 2.5, "Belém": 2.0, "Chiado": 1.5}
print(f"{sum(walks.values())} hours")
```
"""
TIERS = ["disk", "disk", "text", "disk", "part", "part", "disk", "part", "memory", "part", "memory", "memory"]
TURNS = len(ASKED) + 8
OTHERS = {"a": "And if we rent bicycles?", "b": "Then stay by the river."}


def stamp(hours: float) -> str:
    """So long ago and half a unit more, so that it reads the same for a while."""
    return (datetime.now(UTC) - timedelta(hours=hours, minutes=25)).isoformat()


def info(name: str, hours: float, title: str, **more: Any) -> SessionInfo:
    facts: dict[str, Any] = {"id": 1, "model": "qwen2.5-1.5b", "fingerprint": {}, "tip": "tip", "settings": {}}
    facts |= {"created": stamp(hours + 50), "updated": stamp(hours), "stored": 1.0, "titled": "model"}
    facts |= {"num_turns": 12, "num_tokens": 4012, "nbytes": 18_300_000}
    return SessionInfo(**(facts | {"name": name, "title": title} | more))


SESSIONS = (
    {"name": "lisbon", "hours": 0, "title": "Three days in Lisbon", "tags": ("travel",), "num_branches": 2},
    {"name": "thesis", "hours": 3, "title": "Second chapter, first draft", "num_turns": 48, "num_tokens": 61_200},
    {"name": "review", "hours": 26, "title": "Review of the storage patch", "tags": ("work", "code"), "num_turns": 7},
    {"name": "garden", "hours": 75, "title": "What to plant in October", "num_turns": 3, "nbytes": 2_100_000},
    {"name": "letters", "hours": 400, "title": "Letters to the landlord", "num_turns": 21, "stored": 0.0, "nbytes": 0},
)


def segment(number: int, tier: str) -> dict[str, Any]:
    """Of one turn of about 330 tokens."""
    start, size = 330 * number, 280 + 37 * (number % 4)
    held = {"memory": 1.0, "part": 0.25 + 0.1 * (number % 3)}.get(tier, 0.0)
    return {
        "id": str(number),
        "start": start,
        "end": start + size,
        "place": start,
        "kind": "text" if tier == "text" else "sealed",
        "turns": [number + 1, number + 1],
        "codec": "k8v4",
        "num_chunks": 8,
        "stored_chunks": 0 if tier == "text" else 8,
        "chunks_held": round(8 * held),
        "tier": tier,
        "position": start if held else None,
        "recalled": number == 4,
        "rows": round(size * 56 * held),
        "rows_total": size * 56,
        "rows_stored": 0 if tier == "text" else size * 56,
        "bytes_in_memory": round(1_500_000 * held),
        "bytes_on_disk": 0 if tier == "text" else 740_000,
        "seal_s": 0.4,
    }


class Session:
    """A conversation of a dozen turns."""

    name, model, context_window, draft = "lisbon", "qwen2.5-1.5b", 32_768, ""
    title = "Three days in Lisbon"

    def __init__(self) -> None:
        self.said: list[Message] = []
        for question, answer in ASKED:
            self._say("user", question)
            self._say("assistant", answer)

    def _say(self, role: Any, text: str) -> None:
        parent = self.said[-1].id if self.said else None
        ids = tuple(range(len(text) // 4))
        self.said.append(Message.new(parent, role, text, ids, (0, len(ids)), created=stamp(1)))

    def messages(self) -> list[Message]:
        return list(self.said)

    def send(self, text: str) -> Iterator[Event]:
        yield Delta(ANSWER)
        self._say("user", text)
        self._say("assistant", ANSWER)
        timings = Timings(0.0, 0.31, (0.04,) * 90)
        yield TurnDone(ANSWER, Usage(4012, 3953, 59, 91, (1320,)), timings, "stop")

    def stats(self) -> dict[str, Any]:
        segments = [segment(number, tier) for number, tier in enumerate(TIERS)]
        turns = [
            {"turn": one["turns"][0], "tokens": one["end"] - one["start"], "rows": one["rows"]}
            | {"bytes_in_memory": one["bytes_in_memory"], "bytes_on_disk": one["bytes_on_disk"]}
            for one in segments
        ]
        facts = {"name": self.name, "model": self.model, "device": "cpu", "context_window": self.context_window}
        facts |= {"num_turns": TURNS, "num_seen": 3991, "num_tokens": 3991, "position": 3991, "offset": 0}
        facts |= {"rebased": False, "kv_budget": "", "keep_ratio": 0.3, "num_pairs": 223_496, "num_kept": 68_112}
        facts |= {
            "bytes_in_memory": 18_000_000,
            "bytes_on_disk": 8_140_000,
            "stored": 0.92,
            "in_host": {"1": 8, "3": 6},
        }
        facts |= {"in_host": {"1": 8, "3": 6}}
        return facts | {"segments": segments, "turns": turns, "last": {"seal_s": 0.42}}

    def episodes(self) -> list[dict[str, Any]]:
        return [
            {"name": "walks and hills", "turns": (1, 2, 3, 4, 5)},
            {"name": "museums, rain", "turns": (6, 7, 8, 9)},
            {"name": "cafés of the Chiado", "turns": (10, 11, 12)},
        ]

    def inspect(self, turn: int) -> Inspection:
        return inspection(turn)

    def count(self, text: str) -> int:
        return len(text.split())

    def tree(self) -> list[Node]:
        nodes, parent = list[Node](), None
        for number, message in enumerate(self.said):
            node = Node(str(number), parent, message.role, message.content[:80], number // 2 + 1, True, stamp(2))
            nodes.append(node)
            parent = node.id
        other = Node("a", "3", "user", OTHERS["a"], 3, False, stamp(4))
        return [*nodes, other, Node("b", "a", "assistant", OTHERS["b"], 3, False, stamp(4))]

    def set_draft(self, text: str) -> None:
        pass

    def prefetch(self) -> None:
        pass

    def stop(self) -> None:
        pass

    def close(self) -> None:
        pass


class Engine:
    """Holds the sessions."""

    def connect(self, _: Any) -> Engine:
        return self

    def open(self, name: str | None = None, **_: Any) -> Session:
        return Session()

    def sessions(self) -> list[SessionInfo]:
        return [info(**one) for one in SESSIONS]  # type: ignore[arg-type]

    def search(self, words: str) -> list[SearchHit]:
        return [SearchHit("lisbon", 3, "assistant", "Then the tile museum", ((9, 13),))]

    def preview(self, name: str) -> list[Message]:
        return Session().messages() if name == "lisbon" else []

    def said(self, message_id: str) -> str:
        texts = [*(text for both in ASKED for text in both), LAST, ANSWER]
        return OTHERS.get(message_id) or texts[int(message_id)]

    def close(self) -> None:
        pass


Step = tuple[Sequence[str], str]
"""Keys, and words that are to be seen before the next step."""


@dataclass(frozen=True, slots=True)
class Scene:
    """Steps, in a chat in which the last question is still to be asked, or was."""

    steps: Sequence[Step]
    is_asked: bool = True


SCENES = {
    "chat": Scene([]),
    "map": Scene([(["f3"], "cafés of the Chiado"), (["shift+tab", "left", "left"], "turn 10 ·")]),
    "inspector": Scene([(["f4"], "pairs kept ")]),
    "attach": Scene([(["ctrl+t"], "attach a document"), ([*"notes.md"], " tokens")], False),
    "picker": Scene([(["ctrl+r"], "Letters to the landlord")], False),
    "help": Scene([(["f1"], "Esc")], False),
    "settings": Scene([(["f2"], "settings")], False),
    "branches": Scene([(["f5"], "rent bicycles")]),
}


def shown(app: ChatApp) -> str:
    """What is on the screen, line by line."""
    strips = app.screen._compositor.render_strips()
    return undated("\n".join("".join(part.text for part in strip).rstrip() for strip in strips) + "\n")


def undated(text: str) -> str:
    """The same on another day."""
    return re.sub(r"\d{4}-\d\d-\d\d( |&#160;)\d\d:\d\d", r"2026-11-28\g<1>09:30", text)


async def still(app: ChatApp, pilot: Pilot[None]) -> None:
    """Wait until nothing changes any more."""
    before, same = "", 0
    # The list of sessions reads its preview a moment after the last key.
    enough = 20 if isinstance(app.screen, SessionPicker) else 3
    while same < enough:
        for field in app.screen.query("Input, TextArea"):
            if isinstance(field, (Input, TextArea)):
                field.cursor_blink = False
        await pilot.pause(0.02)
        now = shown(app)
        before, same = now, same + 1 if now == before else 0


@asynccontextmanager
async def acted(
    scene: Scene, size: tuple[int, int], theme: str = "kvchat-dark"
) -> AsyncIterator[tuple[ChatApp, Pilot[None]]]:
    """The program, after the keys of a scene."""
    with away_from_home():
        Path("config.toml").write_text(SETTINGS.format(theme=theme))
        config = Config.load(Path("config.toml"))
        app = ChatApp(Engine().connect, config)  # type: ignore[arg-type]
        app.animation_level = "none"
        async with app.run_test(size=size) as pilot:
            # Stats, from which the screen knows how many tokens are free, are asked after the jobs.
            await wait_until(lambda: not app.chat.jobs.busy and app.chat.room is not None)
            if scene.is_asked:
                app.chat.prompt.text = LAST
                await pilot.press("enter")
                await wait_until(lambda: "kept 68112/223496 pairs" in shown(app))
            for keys, words in scene.steps:
                await pilot.press(*keys)
                await wait_until(lambda words=words: words in shown(app))  # type: ignore[misc]
            await still(app, pilot)
            yield app, pilot


@contextlib.contextmanager
def away_from_home() -> Iterator[None]:
    """Where there is one file, and no settings of anyone's."""
    kept = {name: value for name, value in os.environ.items() if name.startswith("KVCHAT_")}
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        Path("notes.md").write_text(NOTES)
        try:
            for name in kept:
                del os.environ[name]
            yield
        finally:
            os.environ.update(kept)
