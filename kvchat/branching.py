"""The tree that a conversation is: every answer that was given once more and every message that was said anew.

A session goes along one path of it, from the root to its tip. What lies beside it stays in the store, KV and all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvchat.errors import InputError
from kvchat.store.store import Message

if TYPE_CHECKING:
    from kvchat.session import Conversation

LONGEST = 80
"""Characters of a node's text."""


@dataclass(frozen=True, slots=True)
class Node:
    """A message of the user or the model in the tree.

    id       of the message
    parent   id of the node before it; None: it begins a branch of the root
    role     user or assistant
    text     its first line, at most LONGEST characters, as it was said: nothing in it is neutralised
    turn     number of the turn, from 1
    on_path  whether the session's path goes through it
    created  ISO 8601 in UTC
    """

    id: str
    parent: str | None
    role: str
    text: str
    turn: int
    on_path: bool
    created: str


def tree(conversation: Conversation) -> list[Node]:
    """All messages of all branches, parents before children; a system prompt is none of them."""
    on_path = {message.id for message in conversation.path}
    turns: dict[str, int] = {}
    nodes = list[Node]()
    shown = set[str]()
    for message in conversation.store.tree(conversation.info.id):
        turns[message.id] = turns.get(message.parent or "", 0) + (message.role == "user")
        if message.role == "system":
            continue
        shown.add(message.id)
        parent, turn = message.parent if message.parent in shown else None, max(1, turns[message.id])
        text, here = first_line(message.content), message.id in on_path
        nodes.append(Node(message.id, parent, message.role, text, turn, here, message.created))
    return nodes


def first_line(content: str) -> str:
    """The first line that is not blank, cut to LONGEST characters."""
    line = next((line for line in content.splitlines() if line.strip()), "").strip()
    return line if len(line) <= LONGEST else line[: LONGEST - 1].rstrip() + "…"


def switch(conversation: Conversation, message_id: str) -> None:
    """Go on at the newest end of the branches that the message lies on; the path left stays as a branch.

    Its KV comes from the store when it is needed, as that of a session that is opened again.

    Raises:
        InputError: the session has no such message.
    """
    messages = {message.id: message for message in conversation.store.tree(conversation.info.id)}
    if message_id not in messages:
        raise InputError(f"this session has no message {message_id!r}; its branches name those that it has")
    end = _newest_below(message_id, messages)
    if conversation.path and conversation.path[-1].id == end:
        return
    conversation.save()  # what is written later must not be of messages that are gone
    conversation.store.set_tip(conversation.info.id, end)
    conversation.path = conversation.store.path(end)
    conversation.residence.let_go()


def _newest_below(message_id: str, messages: Mapping[str, Message]) -> str:
    """The message without an answer or question after it that was said last, of all below one, or itself."""
    below, inner = [message_id], set[str]()
    reached = {message_id}
    for message in messages.values():  # parents come before children
        if message.parent in reached:
            reached.add(message.id)
            below.append(message.id)
            inner.add(str(message.parent))
    ends = [one for one in below if one not in inner]
    return max(reversed(ends), key=lambda one: messages[one].created)


def fork(conversation: Conversation, name: str, at: int | None) -> None:
    """Store a session that shares the path up to the end of turn `at` (None = all); InputError: no such turn."""
    path, asked = conversation.path, questions(conversation.path)
    if at is not None and not 1 <= at <= len(asked):
        raise InputError(f"this session has {len(asked)} turns; there is no turn {at} to fork at")
    end = len(path) if at is None or at == len(asked) else asked[at]
    store = conversation.store
    store.fork(store.name_of(conversation.info.id), name, path[end - 1].id if end else None)


def question_at(path: Sequence[Message], turn: int) -> int:
    """Index in a path of the user's message of a turn, from 1.

    Raises:
        InputError: there is no such turn.
    """
    asked = questions(path)
    if not 1 <= turn <= len(asked):
        raise InputError(f"this session has {len(asked)} turns; there is no turn {turn}")
    return asked[turn - 1]


def questions(path: Sequence[Message]) -> list[int]:
    """Where in a path the user's messages stand."""
    return [index for index, message in enumerate(path) if message.role == "user"]
