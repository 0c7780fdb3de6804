"""What the model said: Markdown, code and reasoning, drawn while it comes."""

from __future__ import annotations

from asyncio import Lock
from collections.abc import Callable
from time import monotonic
from typing import TYPE_CHECKING, ClassVar

from textual.containers import Vertical
from textual.timer import Timer
from textual.widget import Widget

from kvchat.terminal import neutralise
from kvchat.tui.code import CodeBlock
from kvchat.tui.splitting import Clipper, Piece, Splitter, pieces
from kvchat.tui.thought import Thought

if TYPE_CHECKING:
    from kvchat.tui.prose import Prose

    Part = Prose | CodeBlock | Thought


class Answer(Vertical):
    """One answer; `text` is the whole of it, as the model gave it out.

    What comes by `grow` is drawn together, at most ten times a second, and less often the longer drawing takes. Lines
    of code in the making are only appended; they get their colours when their block is complete.

    Args:
        text: an answer that is complete; None = it is still to come.
        turn: which turn of the session it belongs to, from 1.
    """

    DEFAULT_CSS = """
    Answer { height: auto; padding: 0 1; margin: 0 0 1 0; }
    Answer > .-below { margin-top: 1; }
    Answer > Lines { height: auto; }
    CodeBlock { padding: 0 1; border: round $panel; border-title-color: $text-muted;
        border-subtitle-color: $text-muted; }
    Thought { height: auto; color: $text-muted; }
    Thought > Heading { height: 1; }
    Thought > Heading:hover { text-style: underline; }
    Thought > Lines { height: auto; padding: 0 2; }
    """
    SHORTEST: ClassVar[float] = 0.1
    LONGEST: ClassVar[float] = 2.0
    """Seconds from one drawing to the next."""
    SHARE: ClassVar[int] = 10
    """How many times as long as a drawing takes nothing is drawn after it."""

    def __init__(self, text: str | None = None, *, turn: int = 0, clock: Callable[[], float] = monotonic) -> None:
        super().__init__()
        self.text = text or ""
        self.turn = turn
        self.is_growing = text is None
        self._clock = clock
        self._waiting = [self.text]
        self._drawing = Lock()
        self._timer: Timer | None = None
        self._earliest = 0.0
        self._begin()

    def _begin(self) -> None:
        self._clipper, self._splitter = Clipper(), Splitter()
        self._drawn: list[str] = []
        self._prose: list[str] = []  # until something else came: it may have been reasoning
        self._num_blocks = 0
        self._part: Part | None = None

    @property
    def source(self) -> str:
        """The text as it is drawn: neutralised, and without what a screen cannot hold."""
        return "".join(self._drawn)

    async def on_mount(self) -> None:
        async with self._drawing:
            await self._draw(final=not self.is_growing)

    async def grow(self, text: str) -> None:
        """Add what came next; it is drawn soon, and nobody waits for it."""
        self.text += text
        self._waiting.append(text)
        if self._timer is None and self.is_attached:
            self._timer = self.set_timer(max(0.001, self._earliest - self._clock()), self._due)

    async def finish(self, text: str) -> None:
        """The answer is complete, and this is the whole of it; on return it is drawn."""
        if self._timer is not None:
            self._timer.stop()
        async with self._drawing:
            self._timer, self.is_growing = None, False
            if text != self.text:
                self.text, self._waiting = text, [text]
                self._begin()
                await self.remove_children()
            await self._draw(final=True)

    def toggle_thoughts(self) -> None:
        """Open its reasoning, or close it."""
        for thought in self.query(Thought):
            thought.toggle()

    async def _due(self) -> None:
        begun = self._clock()
        async with self._drawing:
            self._timer = None
            await self._draw(final=False)
        self._earliest = begun + self.SHORTEST
        self.call_after_refresh(self._rest, begun)

    def _rest(self, begun: float) -> None:
        # Called once it is on the screen: laying out and painting count too.
        now = self._clock()
        self._earliest = max(begun + self.SHORTEST, now + min(self.LONGEST, self.SHARE * (now - begun)))

    async def _draw(self, *, final: bool) -> None:
        """Draw what waits."""
        text = self._clipper.feed(neutralise("".join(self._waiting)))
        self._waiting.clear()
        if final:
            text += self._clipper.end()
        self._drawn.append(text)
        for piece in pieces(self._splitter.feed(text, final=final)):
            if self.is_attached:
                await self._put(piece)

    async def _put(self, piece: Piece) -> None:
        if piece.is_fold:
            await self._fold(piece.text)
            return
        if piece.kind == "prose":
            self._prose.append(piece.text)
        if piece.info is not None:
            await self._open(piece)
        part = self._part
        if not self.is_attached:
            return  # it is being taken off the screen
        if isinstance(part, CodeBlock | Thought):
            part.add(piece.text)
            if piece.is_last:
                part.finish()
        elif part is not None:
            await part.add(piece.text)
            if piece.is_last:
                await part.finish()

    async def _fold(self, text: str) -> None:
        thought = Thought("".join(self._prose) + text, clock=None)
        await self.remove_children()
        await self.mount(thought)

    async def _open(self, piece: Piece) -> None:
        if piece.kind == "code":
            self._num_blocks += 1
            self._part = CodeBlock(piece.info or "", self._num_blocks)
        elif piece.kind == "thought":
            self._part = Thought(clock=self._clock if self.is_growing else None)
        else:
            from kvchat.tui.prose import Prose  # it reads Markdown, which the first paint need not wait for

            self._part = Prose(self._add)
            return
        await self._add(self._part)

    async def _add(self, part: Widget) -> None:
        # A class in place of `:last-child`, for which Textual styles the whole transcript anew whenever it grows.
        part.set_class(bool(self.children), "-below", update=False)
        await self.mount(part)
