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
BEGINNING = 'Title: "'
"""Of the answer, given to the model: so small models too give a title and nothing else, and it ends with the quote."""
MOST_TOKENS, MOST_WORDS, MOST_CHARACTERS = 32, 6, 60
LEAST_ANSWERS = 2
"""Before that there is little to name."""
AROUND = "\"'`*_#“”„‘’«»‹› \t\n.:-"
"""What models put around a title."""
END = re.compile(r'["“”«»\r\n]')
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
    engine, cache = conversation.engine, conversation.residence.cache
    beginning = engine.model.template.assistant(BEGINNING)
    prompt = (*conversation.question(QUESTION), *beginning.ids[slice(*beginning.content_span)])
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
    """The title in a model's answer, "" if there is none that is short and plain; `ended`: it said all it wanted to.

    Of a longer one with a colon it is what stands before that.
    """
    text = LEAD.sub("", answer.lstrip(AROUND)).lstrip(AROUND)
    end = END.search(text)
    if not end and not ended:
        return ""
    line = text[: end.start()] if end else text
    spaced = "".join(" " if unicodedata.category(one) in ("Cc", "Zl", "Zp") else one for one in line)
    visible = "".join(one for one in spaced if not unicodedata.category(one).startswith("C"))
    title = " ".join(visible.split()).strip(AROUND)
    if not _is_short(title):
        title = title.partition(": ")[0]
    plain = "<" not in title and "\ufffd" not in title and any(character.isalnum() for character in title)
    return title if plain and _is_short(title) else ""


def _is_short(title: str) -> bool:
    return len(title) <= MOST_CHARACTERS and len(title.split()) <= MOST_WORDS
