"""What commands do to the session that is open, and to others."""

from __future__ import annotations

from asyncio import to_thread
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Any

from kvchat.errors import InputError, KVChatError, SessionExists
from kvchat.tui.commands import assignment, number, tags, turn_and_name

if TYPE_CHECKING:
    from kvchat.handle import Session
    from kvchat.tui.chat import ChatScreen
    from kvchat.worker import Worker

STEPS = (1.0, 0.7, 0.5, 0.3, 0.2, 0.1)
"""What keys make of `compress.keep_ratio`: where a segment's ranking is cut, so that each is had at once."""


class Acts:
    """One method for each command, `do_` and its name, which takes the argument."""

    def __init__(self, screen: ChatScreen) -> None:
        self.screen = screen
        self._wanted: float | None = None

    # -- which session -----------------------------------------------------------------------------------------------

    def do_new(self, name: str) -> None:
        self._begin_session(name)

    def _begin_session(self, name: str = "", **how: Any) -> None:
        def make(engine: Worker) -> Session:
            fresh = name or f"{datetime.now():%Y-%m-%d-%H%M%S}"
            if fresh in [info.name for info in engine.sessions()]:
                raise SessionExists(f"a session named {fresh!r} is there already; /resume {fresh} goes on with it")
            return engine.open(fresh, **how)

        async def begin() -> None:
            await self.screen.prepare(self.screen.config.model.name)
            await self.screen.open_session(make)

        self.screen.jobs.begin("opening", begin())

    def do_resume(self, name: str) -> None:
        if not name:
            self.screen.attempt(self.screen.commands.run, "/sessions")
        else:
            self.resume(name)

    def resume(self, name: str, turn: int | None = None) -> None:
        """Go on with a session, and show a turn of it.

        Raises:
            InputError: that is another one than the open one, and the model is busy.
        """
        screen = self.screen

        async def go_over() -> None:
            await screen.open_session(lambda engine: engine.open(name, create=False))
            await screen.transcript.go_to(turn)

        if name != screen.session_name:
            screen.jobs.begin(f"opening {name}", go_over())
        else:
            screen.jobs.beside(screen.transcript.go_to(turn))

    def do_fork(self, argument: str) -> None:
        chat = self.screen.session()
        turn, name = turn_and_name(argument)
        job = self.screen.open_session(lambda _: chat.fork(name) if turn is None else chat.fork(name, turn))
        self.screen.jobs.begin("forking", job)

    def do_rename(self, new: str) -> None:
        chat = self.screen.session()

        async def rename(engine: Worker) -> None:
            await to_thread(engine.rename, chat.name, new)

        self._rework("renaming", rename)

    def do_model(self, name: str) -> None:
        chat = self.screen.session()
        if not name:
            self.screen.note(f"{chat.model}, with a window of {chat.context_window} tokens")
            return

        failures: list[KVChatError] = []

        def make(engine: Worker) -> Session:
            session, before = chat.name, chat.model
            chat.close()
            try:
                return engine.open(session, model=name, rebuild=True, create=False)
            except KVChatError as error:
                failures.append(error)
                return engine.open(session, model=before, create=False)

        async def change() -> None:
            await self.screen.open_session(make, same=True)
            if failures:
                raise failures[0]

        self.screen.jobs.begin(f"opening {name}", change())

    # -- what is known of it -----------------------------------------------------------------------------------------

    def do_title(self, title: str) -> None:
        chat = self.screen.session()

        async def change(engine: Worker) -> None:
            if title:
                await to_thread(engine.retitle, chat.name, "" if title == "-" else title)
            else:
                self.screen.note((await self.screen.info()).title or "this session has no title")

        self._rework("naming", change)

    def do_tag(self, argument: str) -> None:
        chat = self.screen.session()

        async def change(engine: Worker) -> None:
            found = (await self.screen.info()).tags
            if argument:
                found = tags(argument, found)
                await to_thread(engine.tag, chat.name, found)
            self.screen.note(f"tags: {', '.join(found) or 'none'}")

        self._rework("tagging", change)

    def do_system(self, text: str) -> None:
        if text:
            self._begin_session(system=text)
            return
        chat = self.screen.session()

        async def show() -> None:
            first = (await to_thread(chat.messages))[:1]
            spoken = [message.content for message in first if message.role == "system" and message.content]
            self.screen.note(f"system: {spoken[0]}" if spoken else "this session has no system prompt")

        self.screen.jobs.begin("reading", show())

    def do_set(self, argument: str) -> None:
        key, value = assignment(argument)
        told = f"{key} is {value} for this session" if value else f"{key} is for this session what it is for all"
        self._configure({key: value}, told)

    def do_keep(self, ratio: str) -> None:
        told = f"older turns now hold {ratio or 'what config.toml says'} of their KV pairs in memory"
        self._configure({"compress.keep_ratio": ratio or None}, told)

    def _configure(self, settings: Mapping[str, Any], told: str) -> None:
        chat = self.screen.session()

        async def change(_: Worker) -> None:
            await to_thread(chat.configure, settings)
            self.screen.note(told)

        self._rework("fitting memory", change)

    def step_keep(self, direction: int) -> None:
        """Keep the next step more (1) or less (-1); keys that are pressed meanwhile count too."""
        chat = self.screen.session()
        if self.screen.jobs.busy and self._wanted is None:
            raise InputError("what is kept can be changed when the model is idle; Escape stops an answer")
        present, begun = self._wanted or self.screen.keep_ratio, self._wanted is not None
        others = [step for step in STEPS if direction * (step - present) > 1e-9]
        self._wanted = min(others, key=lambda step: abs(step - present), default=present)
        if not begun:
            self.screen.jobs.begin("fitting memory", self._fit(chat))
        self.screen.status.tell(f"keep {self._wanted:g}")

    async def _fit(self, chat: Session) -> None:
        done: float | None = None
        try:
            while done != self._wanted:
                done = self._wanted
                await to_thread(chat.configure, {"compress.keep_ratio": done})
        finally:
            self._wanted = None
            self.screen.status.tell("")
        self.screen.keep_ratio = done or self.screen.keep_ratio
        self.screen.jobs.beside(self.screen.turns.measure(chat))

    # -- its turns ---------------------------------------------------------------------------------------------------

    def do_retry(self, _: str) -> None:
        self.screen.turns.retry()

    def do_continue(self, _: str) -> None:
        self.screen.turns.go_on()

    def do_rewind(self, argument: str) -> None:
        chat, turns = self.screen.session(), number("rewind", argument, 1)

        async def rewind(_: Worker) -> None:
            text = await to_thread(chat.rewind, turns)
            await self.screen.show_history(chat)
            self.screen.prompt.give_back(text)

        self._rework("taking back", rewind)

    def do_edit(self, argument: str) -> None:
        chat, turn = self.screen.session(), number("edit", argument, 0)

        async def begin() -> None:
            asked = [message.content for message in await to_thread(chat.messages) if message.role == "user"]
            if not asked or turn > len(asked):
                raise InputError(f"there is no turn {turn or 1}; this session has {len(asked)} turns")
            self.screen.begin_editing(turn or len(asked), asked[turn - 1])

        self.screen.jobs.begin("reading", begin())

    # -- helpers -----------------------------------------------------------------------------------------------------

    def _rework(self, words: str, change: Callable[[Worker], Any]) -> None:
        """Begin the job `change`, and show the figures anew after it."""
        screen, chat = self.screen, self.screen.session()

        async def job() -> None:
            await change(await to_thread(screen.connected))
            await screen.show_sessions()
            await screen.turns.measure(chat)

        screen.jobs.begin(words, job())
