"""The handle on a conversation for asyncio: every method of `Session`, waited for in a thread."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from kvchat.attaching import Attached
from kvchat.branching import Node
from kvchat.events import Event, Reply, Usage
from kvchat.handle import Session
from kvchat.inspecting import Inspection
from kvchat.probe import Finding
from kvchat.store.store import Message


class AsyncSession:
    """`Session` for asyncio: the same methods, awaited; those that give events are asynchronous iterators."""

    def __init__(self, session: Session) -> None:
        self.session = session

    @property
    def title(self) -> str:
        """As `Session.title`."""
        return self.session.title

    async def send(self, text: str, **sampling: Any) -> AsyncIterator[Event]:
        """As `Session.send`."""
        async for event in _follow(self.session.send(text, **sampling)):
            yield event

    async def resend(self, **sampling: Any) -> AsyncIterator[Event]:
        """As `Session.resend`."""
        async for event in _follow(self.session.resend(**sampling)):
            yield event

    async def go_on(self, **sampling: Any) -> AsyncIterator[Event]:
        """As `Session.go_on`."""
        async for event in _follow(self.session.go_on(**sampling)):
            yield event

    async def edit(self, turn: int, text: str, **sampling: Any) -> AsyncIterator[Event]:
        """As `Session.edit`."""
        async for event in _follow(self.session.edit(turn, text, **sampling)):
            yield event

    async def ask(self, text: str, **sampling: Any) -> Reply:
        """As `Session.ask`."""
        return await asyncio.to_thread(self.session.ask, text, **sampling)

    async def regenerate(self, **sampling: Any) -> Reply:
        """As `Session.regenerate`."""
        return await asyncio.to_thread(self.session.regenerate, **sampling)

    def stop(self) -> None:
        """As `Session.stop`."""
        self.session.stop()

    async def append(self, messages: Sequence[Mapping[str, str]]) -> Usage:
        """As `Session.append`."""
        return await asyncio.to_thread(self.session.append, messages)

    async def attach(self, title: str, text: str) -> Attached:
        """As `Session.attach`."""
        return await asyncio.to_thread(self.session.attach, title, text)

    async def logprobs(self, prompt: str, continuation: str) -> list[tuple[str, float]]:
        """As `Session.logprobs`."""
        return await asyncio.to_thread(self.session.logprobs, prompt, continuation)

    async def prefetch(self) -> None:
        """As `Session.prefetch`."""
        self.session.prefetch()

    async def fork(self, name: str, at: int | None = None) -> AsyncSession:
        """As `Session.fork`."""
        return AsyncSession(await asyncio.to_thread(self.session.fork, name, at))

    async def rewind(self, turns: int = 1) -> str:
        """As `Session.rewind`."""
        return await asyncio.to_thread(self.session.rewind, turns)

    async def tree(self) -> list[Node]:
        """As `Session.tree`."""
        return await asyncio.to_thread(self.session.tree)

    async def switch(self, message_id: str) -> None:
        """As `Session.switch`."""
        await asyncio.to_thread(self.session.switch, message_id)

    async def inspect(self, turn: int) -> Inspection:
        """As `Session.inspect`."""
        return await asyncio.to_thread(self.session.inspect, turn)

    async def count(self, text: str) -> int:
        """As `Session.count`."""
        return await asyncio.to_thread(self.session.count, text)

    @property
    def draft(self) -> Awaitable[str]:
        """As `Session.draft`, to be awaited."""
        return asyncio.to_thread(lambda: self.session.draft)

    async def set_draft(self, text: str) -> None:
        """As `Session.set_draft`."""
        await asyncio.to_thread(self.session.set_draft, text)

    async def messages(self) -> list[Message]:
        """As `Session.messages`."""
        return await asyncio.to_thread(self.session.messages)

    async def configure(self, settings: Mapping[str, Any]) -> None:
        """As `Session.configure`."""
        await asyncio.to_thread(self.session.configure, settings)

    async def settle(self) -> float:
        """As `Session.settle`."""
        return await asyncio.to_thread(self.session.settle)

    async def stats(self) -> dict[str, Any]:
        """As `Session.stats`."""
        return await asyncio.to_thread(self.session.stats)

    async def episodes(self) -> list[dict[str, Any]]:
        """As `Session.episodes`."""
        return await asyncio.to_thread(self.session.episodes)

    async def check(self) -> Finding:
        """As `Session.check`."""
        return await asyncio.to_thread(self.session.check)

    async def close(self) -> None:
        """As `Session.close`."""
        await asyncio.to_thread(self.session.close)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        await self.close()


async def _follow(events: Iterator[Event]) -> AsyncIterator[Event]:
    """The events of a turn, each waited for in a thread."""
    end = object()
    while (event := await asyncio.to_thread(next, events, end)) is not end:
        yield event  # type: ignore[misc]
