"""Messages as they would stand after a path, all checked before any is stored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast, get_args

from kvchat.errors import CapacityError, InputError
from kvchat.residence.residence import Residence
from kvchat.store.store import Message, Role
from kvchat.template import ChatTemplate, Piece

Drafted = tuple[str, str, Piece]
"""Role, text and ids of a message that is not committed yet."""


def drafts(messages: Sequence[Mapping[str, str]], path: Sequence[Message], residence: Residence) -> list[Drafted]:
    """{"role", "content"} messages as they would stand after `path`.

    Raises:
        InputError: an unknown role, a system message that is not the first, a blank message.
        CapacityError: the window has no room for all.
    """
    template = residence.engine.model.template
    asked = any(message.role == "user" for message in path)
    found: list[Drafted] = []
    for number, message in enumerate(messages, 1):
        role, text = str(message.get("role")), message.get("content")
        if not isinstance(text, str) or not (text.strip() or role == "assistant"):
            raise InputError(f"message {number} is empty; write something, or leave it out")
        if role == "system" and (path or found):
            raise InputError(f"message {number} is a system message; only the first of a session can be one")
        if not (path or found) and role != "system":
            found.append(("system", "", template.system(None)))
        found.append((role, text, piece_of(template, role, text, asked, number)))
        asked = asked or role == "user"
    if found:
        require_room(path, found, residence)
    return [draft for draft in found if draft[2].ids]


def chained(found: Sequence[Drafted], parent: str | None, **about: Any) -> list[Message]:
    """Messages that follow `parent` one after the other, with what is told `about` them."""
    messages: list[Message] = []
    for role, text, piece in found:
        messages.append(Message.new(parent, cast(Role, role), text, piece.ids, piece.content_span, **about))
        parent = messages[-1].id
    return messages


def require_room(path: Sequence[Message], found: Sequence[Drafted], residence: Residence) -> None:
    """Raise CapacityError unless each draft finds room when its turn comes."""
    model = residence.engine.model
    around = len(model.template.generation_prompt) + len(model.template.assistant_close)
    used = residence.bounds(path)[-1]
    begun = path[:1] or chained(found[:1], None)
    for number, (_, _, piece) in enumerate(found, 1):
        needed, free = len(piece.ids) + around + 1, residence.longest(used, begun)
        if needed > free:
            raise CapacityError(
                f"message {number} has {needed} tokens and does not fit: of the model's window of "
                f"{model.context_window} {free} can be free; shorten it or give it in parts (nothing was cut)"
            )
        used += len(piece.ids)


def piece_of(template: ChatTemplate, role: str, text: str, asked: bool, number: int = 1) -> Piece:
    """The ids of a message, the `number`th of those given; `asked`: a user's message stands before it.

    Raises:
        InputError: an unknown role, or half a surrogate pair.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"message {number} is not valid Unicode at character {error.start}; mend it there") from None
    if role not in get_args(Role):
        raise InputError(f"message {number} has the role {role!r}; known roles: {', '.join(get_args(Role))}")
    return template.message(role, text, first=not asked)
