"""How often what says which old turns a question concerns names the right ones, of all that was ever said.

All conversations are taken in one after the other as one, without any KV: only text, and vectors of it. Each question
is asked at the end; the turn with its evidence (the last, where there are several) should come first.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from kvchat.config import Config
from kvchat.engine import Engine
from kvchat.episodes.embedder import Embedder, find_embedder
from kvchat.episodes.selectors import Candidate, Selector, Sources, best, find_selector, turns_between
from kvchat.episodes.vectors import Vectors
from kvchat.errors import InputError
from kvchat.evals.cases import Case
from kvchat.events import Listener, Progress
from kvchat.store.store import Message, Store

TOPS = (1, 2, 4, 8)


@dataclass(frozen=True, slots=True)
class Asked:
    """A question at the end of it all, its kind, and the index of the turn with its evidence."""

    message: Message
    kind: str
    turn: int


def select(
    engine: Engine, config: Config, cases: Sequence[Case], names: Sequence[str], listener: Listener
) -> list[dict[str, Any]]:
    """A row for each selector and each kind of question: how often the turn was among the first of TOPS, and ms.

    A name may be NAME or NAME:EMBEDDER, as in text+embedding:minilm.

    Raises:
        InputError: no such selector; one that needs KV in memory; or no question has evidence.
    """
    if any("attention" in name for name in names):
        raise InputError("nothing is in memory here that attention could be read from; `kvchat eval far` tries it")
    with tempfile.TemporaryDirectory(prefix="kvchat-") as folder, closing(Store(Path(folder) / "all.db")) as store:
        path, starts = as_one(engine, cases)
        info = store.create_session("all", engine.model.name, engine.model.fingerprint)
        store.add_messages(info.id, path, None)
        candidates = candidates_of(path)
        asked = list(_asked(engine, cases, path, starts, candidates))
        if not asked:
            raise InputError("no question here has evidence; give LoCoMo's files")
        rows = []
        for name in names:
            by, _, embedder = name.partition(":")
            settings = config.replaced({"episodes.embedder": embedder} if embedder else {})
            sources = Sources(store, engine, engine.new_cache(), find_embedder(settings.episodes, engine))
            if "embedding" in by:
                _embed(store, sources.embedder, path, listener)
            rows += _figures(name, _places(find_selector(by, sources), asked, path, candidates, listener), asked)
    return rows


def candidates_of(path: Sequence[Message]) -> list[Candidate]:
    """Every turn; what comes before the first message of the user is a part of none."""
    bounds = [0, *accumulate(len(message.token_ids) for message in path)]
    first = next((index for index, message in enumerate(path) if message.role == "user"), len(path))
    return turns_between(path, bounds, first, len(path))


def as_one(engine: Engine, cases: Sequence[Case]) -> tuple[list[Message], list[list[int]]]:
    """All messages, after the first conversation's system message; and where each turn of each begins."""
    path, starts = [_message(engine, None, "system", cases[0].system)], list[list[int]]()
    for case in cases:
        starts.append([])
        for turn in case.turns:
            starts[-1].append(len(path))
            for message in turn:
                path.append(_message(engine, path, message["role"], message["content"]))
    return path, starts


def _message(engine: Engine, path: Sequence[Message] | None, role: Any, text: str | None) -> Message:
    template = engine.model.template
    if path is None:
        text = text if template.supports_system else None
        piece = template.system(text)
        return Message.new(None, "system", text or "", piece.ids, piece.content_span)
    assert text is not None
    piece = template.message(role, text, len(path) == 1)
    return Message.new(path[-1].id, role, text, piece.ids, piece.content_span)


def _asked(
    engine: Engine,
    cases: Sequence[Case],
    path: Sequence[Message],
    starts: Sequence[Sequence[int]],
    candidates: Sequence[Candidate],
) -> Iterator[Asked]:
    for case, begins in zip(cases, starts, strict=True):
        for question in case.questions:
            if question.evidence and question.answer:
                place = begins[question.evidence - 1]
                for turn, one in enumerate(candidates):
                    if one.first <= place < one.last:
                        yield Asked(_message(engine, path, "user", question.text), question.kind, turn)


def _embed(store: Store, embedder: Embedder, path: Sequence[Message], listener: Listener) -> None:
    for left in Vectors(store, embedder).fill(path):
        listener(Progress("evaluate", len(path) - left, len(path)))


def _places(
    selector: Selector,
    asked: Sequence[Asked],
    path: Sequence[Message],
    candidates: Sequence[Candidate],
    listener: Listener,
) -> list[tuple[int, float]]:
    """For each question the place of its turn, from 0, and the seconds that it took to say so."""
    found = []
    for number, one in enumerate(asked, start=1):
        begun = time.perf_counter()
        order = best(selector.scores(one.message, path, candidates), candidates)
        found.append((order.index(one.turn), time.perf_counter() - begun))
        listener(Progress("evaluate", number, len(asked)))
    return found


def _figures(name: str, places: Sequence[tuple[int, float]], asked: Sequence[Asked]) -> list[dict[str, Any]]:
    rows = []
    for kind in ("all", *sorted({one.kind for one in asked})):
        own = [pair for pair, one in zip(places, asked, strict=True) if kind in ("all", one.kind)]
        tops = {f"top_{top}": sum(place < top for place, _ in own) / len(own) for top in TOPS}
        middle = sorted(seconds for _, seconds in own)[len(own) // 2]
        rows.append({"by": name, "kind": kind, "questions": len(own), **tops, "ms": middle * 1000})
    return rows
