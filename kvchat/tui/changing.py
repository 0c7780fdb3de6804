"""What the picker does to a session after asking: delete it, call it otherwise, tag it."""

from __future__ import annotations

from asyncio import to_thread
from typing import TYPE_CHECKING, Any, NamedTuple

from textual.app import App

from kvchat.figures import size
from kvchat.tui.asking import Fields, YesNo
from kvchat.tui.finding import title_of

if TYPE_CHECKING:
    from kvchat.store.store import SessionInfo
    from kvchat.worker import Worker


class Done(NamedTuple):
    """The name that the session has now, and what was done to it."""

    name: str
    words: str


async def delete(app: App[Any], engine: Worker, info: SessionInfo) -> Done | None:
    """Delete a session if the user says yes.

    Raises:
        KVChatError: it is open, or the store cannot be written; so for the others below.
    """
    about = f"{info.name}: {info.num_turns} turn{'s' * (info.num_turns != 1)}, {size(info.nbytes)} of KV."
    detail = f"{about} Nothing of it can be brought back."
    if not await app.push_screen_wait(YesNo(f"Delete “{title_of(info)}”?", detail, "Delete", "Keep")):
        return None
    await to_thread(engine.delete, info.name)
    return Done("", f"deleted {info.name}")


async def rename(app: App[Any], engine: Worker, info: SessionInfo) -> Done | None:
    """Give a session the title and the name that the user types."""
    hint = "Tab goes to the other, Enter saves, Escape leaves it as it is; no title: how the first question begins."
    fields = [("title", info.title), ("name, by which commands know it", info.name)]
    answer = await app.push_screen_wait(Fields("rename", fields, hint))
    title, name = answer or (None, None)
    if name is not None:
        await to_thread(engine.rename, info.name, name)
    now = info.name if name is None else name
    if title is not None:
        await to_thread(engine.retitle, now, title)
    return None if title is name is None else Done(now, "saved")


async def tag(app: App[Any], engine: Worker, info: SessionInfo) -> Done | None:
    """Give a session the tags that the user types."""
    hint = "Blanks between them; Enter saves, Escape leaves them as they are."
    answer = await app.push_screen_wait(Fields("tags", [(f"tags of {title_of(info)}", " ".join(info.tags))], hint))
    if answer is None or answer[0] is None:
        return None
    tags = sorted({word.removeprefix("#") for word in answer[0].split()} - {""})
    await to_thread(engine.tag, info.name, tags)
    return Done(info.name, "saved")
