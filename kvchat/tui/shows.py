"""What commands show, in the transcript or on a screen of its own. Screens are read when they are opened: a chat that
needs none of them begins sooner."""

from __future__ import annotations

from asyncio import to_thread
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kvchat.errors import InputError
from kvchat.tui.commands import COMMANDS, number, usage
from kvchat.tui.numbers import stats_table

if TYPE_CHECKING:
    from kvchat.store.store import Message
    from kvchat.tui.chat import ChatScreen

FORMATS = {".md": "md", ".markdown": "md", ".json": "json", ".jsonl": "jsonl", ".html": "html"}


class Shows:
    """One method for each command, `do_` and its name, which takes the argument."""

    def __init__(self, screen: ChatScreen) -> None:
        self.screen = screen

    # -- screens of their own ----------------------------------------------------------------------------------------

    def do_help(self, _: str) -> None:
        from kvchat.tui.keys import HelpScreen

        self.screen.app.push_screen(HelpScreen(self.screen.keys(), COMMANDS))

    def do_sessions(self, _: str) -> None:
        self._pick()

    def do_search(self, words: str) -> None:
        self._pick(f"/{words}")

    def _pick(self, query: str = "") -> None:
        from kvchat.tui.picker import SessionPicker

        screen = self.screen

        async def pick() -> None:
            engine = await to_thread(screen.connected)
            picker = SessionPicker(engine, screen.session_name, engine.preview, screen.sessions.infos, query)
            picked = await screen.app.push_screen_wait(picker)
            await screen.show_sessions()
            if picked and picked.action == "open":
                screen.attempt(screen.commands.resume, picked.name, picked.turn)
            elif picked:
                screen.attempt(screen.commands.run, f"/new {picked.name}".strip())

        screen.jobs.beside(pick())

    def do_branches(self, _: str) -> None:
        from kvchat.tui.branch_tree import BranchTree

        screen, chat = self.screen, self.screen.session()

        async def choose() -> None:
            engine = await to_thread(screen.connected)
            tree = BranchTree(await to_thread(chat.tree), engine.said)
            chosen = await screen.app.push_screen_wait(tree)
            if chosen is not None:
                screen.attempt(screen.switch, chosen)

        screen.jobs.beside(choose())

    def do_inspect(self, argument: str) -> None:
        from kvchat.tui.inspector import Inspector

        screen, chat, turn = self.screen, self.screen.session(), number("inspect", argument, 0)

        async def look() -> None:
            turns = (await to_thread(chat.stats))["num_turns"]
            if not turns or turn > turns:
                raise InputError(f"there is no turn {turn or 1}; this session has {turns} turns")
            await screen.app.push_screen_wait(Inspector(chat.inspect, turn or turns, turns))

        screen.jobs.beside(look())

    def do_attach(self, path: str, text: str = "") -> None:
        from kvchat.tui.attach import AttachScreen

        screen, chat = self.screen, self.screen.session()

        async def ask() -> None:
            asked = AttachScreen(chat.count, path, text, screen.room, chat.context_window)
            attachment = await screen.app.push_screen_wait(asked)
            if attachment:
                screen.attempt(screen.attach, attachment.title, attachment.text)

        screen.jobs.beside(ask())

    def do_settings(self, _: str) -> None:
        from kvchat.tui.settings import SettingsScreen

        screen = self.screen

        async def ask() -> None:
            own = (await screen.info()).settings if screen.chat else None
            changed = await screen.app.push_screen_wait(SettingsScreen(screen.config, own))
            if changed:
                await screen.take_over(changed.for_file, changed.for_session)

        screen.jobs.beside(ask())

    def do_theme(self, name: str) -> None:
        app = self.screen.app
        if not name:
            app.search_themes()
        elif name in app.available_themes:
            app.theme = name
        else:
            raise InputError(f"there is no theme {name!r}; themes: {', '.join(sorted(app.available_themes))}")

    # -- in the transcript -------------------------------------------------------------------------------------------

    def do_stats(self, _: str) -> None:
        chat = self.screen.session()

        async def show() -> None:
            self.screen.note(stats_table(await to_thread(chat.stats)))

        self.screen.jobs.begin("measuring", show())

    def do_map(self, _: str) -> None:
        screen = self.screen
        if screen.segment_map.toggle() and screen.chat:
            screen.jobs.beside(screen.turns.measure(screen.chat))

    def do_clear(self, _: str) -> None:
        if self.screen.jobs.answering:
            raise InputError("/clear has to wait until the answer is there; Escape stops it")
        self.screen.transcript.remove_children()

    # -- to take away ------------------------------------------------------------------------------------------------

    def do_copy(self, what: str) -> None:
        if what not in ("", "code"):
            raise usage("copy", f"got {what!r}")
        lines = len(self.screen.transcript.copy("code" if what else "answer").splitlines())
        self.screen.status.tell(f"copied {lines} line{'' if lines == 1 else 's'}")

    def do_export(self, argument: str) -> None:
        chat, path = self.screen.session(), Path(argument).expanduser()
        if path.suffix.lower() not in FORMATS:
            raise usage("export", f"the name ends in {', '.join(FORMATS)}, got {path.name!r}")

        async def export() -> None:
            await to_thread(_write, path, await to_thread(chat.messages), chat.name)
            self.screen.note(f"written to {path}")

        self.screen.jobs.begin("writing", export())

    def do_quit(self, _: str) -> None:
        self.screen.call_later(self.screen.app.action_quit)


def _write(path: Path, messages: Sequence[Message], name: str) -> None:
    from kvchat.files import written
    from kvchat.transcript_page import text_of

    if path.exists():
        raise InputError(f"{path} is there already; give another name")
    # A system message without text is the template's own opening.
    spoken: list[dict[str, str]] = [
        {"role": one.role, "content": one.content} for one in messages if one.content or one.role != "system"
    ]
    with written(path) as stream:
        stream.write(text_of(spoken, FORMATS[path.suffix.lower()], name).encode())
