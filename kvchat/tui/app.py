"""The program on the screen: themes, keys, the command palette, and the chat screen."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, ClassVar

from textual import on
from textual.app import App, SystemCommand
from textual.binding import Binding, BindingType
from textual.screen import Screen

from kvchat.events import Listener
from kvchat.tui.chat import ChatScreen
from kvchat.tui.keymap import checked
from kvchat.tui.palette import commands
from kvchat.tui.prompt import Prompt
from kvchat.tui.themes import DARK, THEMES

if TYPE_CHECKING:
    from kvchat.config import Config
    from kvchat.worker import Worker


class ChatApp(App[None]):
    """The program; arguments as for `ChatScreen`.

    Raises:
        ConfigError: `tui.keys` names a binding or a key that is not there.
    """

    TITLE = "kvchat"
    CSS_PATH = "kvchat.tcss"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("ctrl+p", "command_palette", "Commands", id="palette", priority=True),
        Binding("ctrl+q", "quit", "Quit", id="quit", priority=True),
    ]

    def __init__(
        self, connect: Callable[[Listener], Worker], config: Config, session: str | None = None, **how: Any
    ) -> None:
        super().__init__()
        self.chat = ChatScreen(connect, config, session, **how)
        for theme in THEMES:
            self.register_theme(theme)
        self.dress(config)

    def get_default_screen(self) -> Screen[Any]:
        return self.chat

    def dress(self, config: Config) -> None:
        """Take over theme and keys; a theme that is not there counts as the default."""
        own = [*Prompt.BINDINGS, *ChatScreen.BINDINGS, *self.BINDINGS]
        self.set_keymap(checked(config.tui.keys, own))
        self.theme = config.tui.theme if config.tui.theme in self.available_themes else DARK.name

    @on(ChatScreen.Changed)
    def _changed(self, event: ChatScreen.Changed) -> None:
        self.dress(event.config)

    def get_system_commands(self, screen: Screen[Any]) -> Iterable[SystemCommand]:
        if screen is self.chat:
            yield from commands(self.chat.action_command, self.chat.ask_for)

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        return action != "command_palette" or self.screen_stack[-1:] == [self.chat]

    async def action_quit(self) -> None:
        """Leave at once; what is under way is ended and saved after the window is closed."""
        self.chat.drafts.latest = self.chat.drafts.text
        if self.chat.jobs.answering and self.chat.chat:
            self.chat.chat.stop()
        self.exit()

    def leave(self, close: bool) -> None:
        """Save what was left unsent, and `close` the worker; once the window is closed."""
        try:
            self.chat.drafts.write()
        finally:
            if close and self.chat.engine:
                self.chat.engine.close()
