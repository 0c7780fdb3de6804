"""Titles that the model gives sessions in idle time, on a scratch pass: nothing of the conversation changes."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from contextlib import suppress

from kvchat.engine import Stop, likeliest
from kvchat.errors import OutOfMemory, StoreError
from kvchat.events import Notice
from kvchat.session import Conversation

QUESTION = "Give our conversation a title of at most six words. Answer with the title alone."
MOST_TOKENS, MOST_WORDS, MOST_CHARACTERS = 32, 6, 60
LEAST_ANSWERS = 2
"""Before that there is little to name."""
AROUND = "\"'`*_#“”„‘’«»‹› \t.:-"
"""What models put around a title."""
LEAD = re.compile(r"^(?:the )?title\s*:", re.IGNORECASE)


class Titler:
    """Gives titles, and remembers where the model had none, so that it is asked once for each state."""

    def __init__(self) -> None:
        self._asked: dict[int, str] = {}

    def title(self, conversation: Conversation, stop: Stop) -> Iterator[Notice]:
        """Give a session a title unless it has one or is too short; yields nothing.

        What stops it, a store that cannot be written or a lack of memory costs only the title.
        """
        info, store, path = conversation.info, conversation.store, conversation.path
        answers = sum(message.role == "assistant" for message in path)
        if answers >= LEAST_ANSWERS and path[-1].role == "assistant" and self._asked.get(info.id) != path[-1].id:
            with suppress(StoreError, OutOfMemory):
                now = store.session(store.name_of(info.id), info.id)
                title = "" if now.titled else suggested(conversation, stop)
                if title:
                    store.set_title(info.id, title, "model")
                    conversation.info = store.session(now.name, info.id)
                if title is not None:
                    self._asked[info.id] = path[-1].id
        yield from ()


def suggested(conversation: Conversation, stop: Stop) -> str | None:
    """A title, "" if the model has no good one; None if it was stopped, or the KV or the room for it is not there."""
    engine, cache, prompt = conversation.engine, conversation.residence.cache, conversation.question(QUESTION)
    room = engine.model.context_window - cache.position - len(prompt) - MOST_TOKENS
    if cache.num_seen != conversation.num_tokens or room < 0 or stop():
        return None
    ends = engine.model.stop_ids
    ids = engine.answer(cache, prompt, MOST_TOKENS, likeliest, ends, stop)
    ended = bool(ids) and ids[-1] in ends
    if not ended and len(ids) < MOST_TOKENS:
        return None
    return tidied(engine.model.template.text(ids), ended)


def tidied(answer: str, ended: bool = True) -> str:
    """The title in a model's answer, "" if there is none that is short and plain; `ended`: it said all it wanted to."""
    lines = [line for line in answer.splitlines() if line.strip()]
    if not lines or (len(lines) == 1 and not ended):
        return ""
    shown = "".join(" " if unicodedata.category(one) in ("Cc", "Zl", "Zp") else one for one in lines[0])
    visible = "".join(one for one in shown if not unicodedata.category(one).startswith("C"))
    line = LEAD.sub("", " ".join(visible.split()).strip(AROUND)).strip(AROUND)
    plain = "<" not in line and "\ufffd" not in line and any(character.isalnum() for character in line)
    return line if plain and len(line) <= MOST_CHARACTERS and len(line.split()) <= MOST_WORDS else ""
