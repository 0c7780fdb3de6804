"""One turn on the screen: from the message, over the answer as it comes, to the line of numbers below it.

The engine's thread only fills a queue. The screen empties it when it has time, so neither waits for the other: at most
ten times a second, and less often the longer drawing takes (a long code block takes 0.2 s each time).
"""

from __future__ import annotations

from asyncio import create_task, to_thread, wait
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING, Any

from kvchat.errors import InputError, KVChatError
from kvchat.events import Delta, Event, TurnDone
from kvchat.tui.answer import Answer
from kvchat.tui.items import Question
from kvchat.tui.numbers import Speed, speed_of, turn_line
from kvchat.tui.plain_text import Note

if TYPE_CHECKING:
    from kvchat.handle import Session
    from kvchat.tui.session_screen import SessionScreen

SHORTEST, LONGEST = 0.1, 2.0
"""Seconds between two drawings."""


class Turns:
    """Runs turns of the session that is open in `screen`."""

    def __init__(self, screen: SessionScreen) -> None:
        self.screen = screen
        self._last: TurnDone | None = None

    def send(self, text: str) -> None:
        """Begin a turn; two slashes at the beginning of `text` stand for one."""
        chat = self.screen.session()
        self._begin(self._ask(chat, text.removeprefix("/") if text.startswith("//") else text))

    def retry(self) -> None:
        """Begin to answer the last message again."""
        self._begin(self._again(self.screen.session()))

    def edit(self, turn: int, text: str) -> None:
        """Begin turn `turn` anew with another message."""
        self._begin(self._edited(self.screen.session(), turn, text))

    def go_on(self) -> None:
        """Begin to continue the last answer."""
        self._begin(self._continued(self.screen.session()))

    def _begin(self, turn: Any) -> None:
        self.screen.jobs.begin("answering", turn)

    async def _ask(self, chat: Session, text: str) -> None:
        question, answer = Question(text), Answer()
        await self.screen.transcript.add(question, answer)
        try:
            await self._run(chat, partial(chat.send, text), answer)
        except Exception:
            if await _is_saved(chat, text):
                self.screen.note("Your message is saved; /retry answers it.")
            else:
                await question.remove()
                self.screen.prompt.give_back(text)
            if not answer.text:
                await answer.remove()
            raise

    async def _again(self, chat: Session) -> None:
        await self.screen.transcript.to_end()
        before, answer = self.screen.transcript.last_reply(), Answer()
        self.screen.transcript.set_aside(before)
        await self.screen.transcript.add(answer)
        try:
            await self._run(chat, chat.resend, answer)
        except Exception:
            await answer.remove()
            self.screen.transcript.set_aside(before, False)
            raise
        await self.screen.transcript.remove_children(before)

    async def _edited(self, chat: Session, turn: int, text: str) -> None:
        messages = await to_thread(chat.messages)
        asked = [place for place, message in enumerate(messages) if message.role == "user"]
        await self.screen.transcript.show(messages[: asked[turn - 1]])
        answer = Answer()
        await self.screen.transcript.add(Question(text), answer)
        try:
            await self._run(chat, partial(chat.edit, turn, text), answer)
        except Exception:
            is_saved = await _is_saved(chat, text)
            await self.screen.show_history(chat)
            if is_saved:
                self.screen.note("Your message is saved; /retry answers it.")
            else:
                self.screen.prompt.give_back(text)
            raise

    async def _continued(self, chat: Session) -> None:
        await self.screen.transcript.to_end()
        reply = self.screen.transcript.last_reply()
        before = next((widget for widget in reply if isinstance(widget, Answer)), None)
        if before is None:
            raise InputError("there is no answer to continue")
        # Only what has been appended from the beginning can be appended to: see Answer.
        answer = Answer()
        await self.screen.transcript.mount(answer, after=before)
        await answer.grow(before.text)
        self.screen.transcript.set_aside(reply)
        try:
            await self._run(chat, chat.go_on, answer)
        except Exception:
            await answer.remove()
            self.screen.transcript.set_aside(reply, False)
            raise
        await self.screen.transcript.remove_children(reply)

    async def _run(self, chat: Session, start: Callable[[], Iterator[Event]], answer: Answer) -> None:
        self.screen.jobs.answering = True
        done = self._last = await self._stream(start, answer)
        self.screen.jobs.say(speed_of(done.timings))
        self.screen.title_bar.measure(done.usage.prompt_tokens + done.usage.completion_tokens, chat.context_window)
        self.screen.jobs.beside(self.measure(chat, done, self.screen.note(turn_line(done, "sealing"), "-turn")))

    async def _stream(self, start: Callable[[], Iterator[Event]], answer: Answer) -> TurnDone:
        """Run the turn that `start` begins in a thread, and show its events as they come.

        Raises:
            Exception: whatever the turn raised, after what came before it has been shown.
        """
        received: deque[Event] = deque()
        speed = Speed(monotonic())

        def fill() -> None:
            for event in start():
                if isinstance(event, Delta):
                    speed.count(monotonic())
                received.append(event)

        turn = create_task(to_thread(fill))
        pause, done = SHORTEST, None
        while not turn.done() or received:
            await wait([turn], timeout=pause)
            begun = monotonic()
            done = await self._draw([received.popleft() for _ in range(len(received))], answer, speed) or done
            pause = min(LONGEST, max(SHORTEST, 10 * (monotonic() - begun)))
        await turn
        assert done, "a turn ends with TurnDone"
        await answer.finish(done.text)
        return done

    async def _draw(self, batch: list[Event], answer: Answer, speed: Speed) -> TurnDone | None:
        """Show what came since the last time, in one go; the turn's end if it is among it."""
        done: TurnDone | None = None
        pieces: list[str] = []
        for event in batch:
            match event:
                case Delta(text):
                    pieces.append(text)
                case TurnDone():
                    done = event
                case _:
                    self.screen.show_event(event)
        if text := "".join(pieces):
            if self.screen.jobs.told != "stopping…":
                self.screen.jobs.say(f"answering… {speed}")
            await answer.grow(text)
        return done

    async def measure(self, chat: Session, done: TurnDone | None = None, line: Note | None = None) -> None:
        """Wait for the seal, then show what is held: in the turn's `line`, the meters, the session list and the map."""
        screen, stats = self.screen, None
        try:
            stats = await to_thread(chat.stats)
        except KVChatError:
            if chat is screen.chat:
                raise
        finally:
            if done and line:
                line.show(turn_line(done, self._of(done, stats)))
        screen.drain()
        screen.clear_progress()
        if stats and chat is screen.chat:
            screen.keep_ratio = stats["keep_ratio"]
            screen.room = stats["context_window"] - stats["position"]
            screen.title_bar.measure(stats["num_seen"], stats["context_window"], stats["offset"])
            screen.status.measure(stats)
            await screen.show_sessions()
            await screen.segment_map.update(chat, stats)

    def _of(self, done: TurnDone, stats: dict[str, Any] | None) -> dict[str, Any] | None:
        # A later turn may have ended before the numbers came: then they are not this turn's.
        return stats if done is self._last else None


async def _is_saved(chat: Session, text: str) -> bool:
    """Whether the message of a failed turn is in the store."""
    with suppress(Exception):  # the turn's own error is the one to show
        messages = await to_thread(chat.messages)
        return bool(messages) and messages[-1].role == "user" and messages[-1].content == text
    return False
