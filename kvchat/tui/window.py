"""A window onto a long list of messages: only what is near the place that is read is mounted."""

from __future__ import annotations

from asyncio import Lock, to_thread
from collections.abc import Coroutine, Iterable, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar

from textual.widget import AwaitMount, Widget

from kvchat.tui.items import Item, MoreBelow, Question, item_of, items_of
from kvchat.tui.scroll import SteadyScroll

if TYPE_CHECKING:
    from kvchat.store.store import Message


class Window(SteadyScroll):
    """Messages and lines of the program, the newest at the bottom; it follows the end until the user scrolls away.

    `show` and `add` are for whoever tells it what there is. What is mounted or removed directly is taken over too.
    """

    WINDOW: ClassVar[int] = 12
    """Messages that are mounted, more where they are less than a page above and below what is seen: all that is mounted
    is laid out anew whenever one of them comes, and a key waits for that."""
    STEP: ClassVar[int] = 4
    """Messages that are mounted more, and fewer at the other end, when the user comes near to the end of them."""

    DEFAULT_CSS = "Window { layers: text hint; }"

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self._items: list[Item] = []
        self._first = self._last = 0
        self._waiting: set[Widget] = set()  # of items outside the window, mounted and not shown
        self._leaving: set[Widget] = set()  # being unmounted
        self._aside: set[Widget] = set()  # not shown, in the window or not
        self._newest: set[Widget] = set()  # what was added last, and since: whoever did may change or remove it
        self._changing = Lock()
        self._is_shifting = False
        self._more: MoreBelow | None = None

    def on_mount(self) -> None:
        # What draws messages is read once the window is there, and before the first of them comes.
        self.call_after_refresh(self.run_worker, to_thread(import_module, "kvchat.tui.prose"), exit_on_error=False)

    # -- what there is -----------------------------------------------------------------------------------------------

    async def show(self, messages: Sequence[Message]) -> None:
        """Replace everything with `messages`, and go to their end."""
        async with self._changing:
            await self.remove_children()
            self._items = list(items_of(messages))
            self._first = self._last = len(self._items)
            self.follow()
            await self._mount_above(self.STEP)
        self.call_after_refresh(self.moved)

    async def add(self, *widgets: Widget) -> None:
        """Mount `widgets` at the end and go there."""
        await self.to_end()
        async with self._changing:
            self._newest.clear()
            await self.mount_all(widgets)
            self._sync()
            if self._last - self._first > self.WINDOW + self.STEP:
                await self._drop_above()

    def set_aside(self, widgets: Iterable[Widget], aside: bool = True) -> None:
        """Show these no more, wherever the user goes, until they are removed or set aside no longer."""
        for widget in widgets:
            (self._aside.add if aside else self._aside.discard)(widget)
            widget.display = not aside and widget not in self._waiting

    def remove_children(self, selector: Any = "*") -> Any:
        if selector == "*":
            self._items, self._more = [], None
            for some in (self._waiting, self._aside, self._newest):
                some.clear()
            self._first = self._last = 0
        return super().remove_children(selector)

    def mount(
        self, *widgets: Widget, before: int | str | Widget | None = None, after: int | str | Widget | None = None
    ) -> AwaitMount:
        if before is None and after is None:
            self._newest.update(widgets)
            # While the end is not mounted what comes to it waits there.
            for widget in widgets if not self.is_whole else ():
                self._hide(widget)
                self._items.append(item_of(widget, self._items[-1].turn))
        return super().mount(*widgets, before=before, after=after)

    @property
    def is_whole(self) -> bool:
        """The end is mounted."""
        return self._last >= len(self._items)

    @property
    def shows_all(self) -> bool:
        last = self._items[self._last - 1].widget if self._first < self._last else None
        # What was just mounted has no place yet: nobody scrolled past it.
        return self.is_whole and (last is None or not last.display or last in self._laid_out)

    def _sync(self) -> None:
        """Learn what others mounted and removed."""
        if removed := {widget for widget in self._waiting if widget.parent is not self}:
            above = sum(item.widget in removed for item in self._items[: self._first])
            self._first, self._last = self._first - above, self._last - above
            self._items = [item for item in self._items if item.widget not in removed]
            self._waiting -= removed
        self._aside = {widget for widget in self._aside if widget.parent is self}
        known = {item.widget: item for item in self._items[self._first : self._last] if item.widget is not None}
        turn = self._items[self._first - 1].turn if self._first else 0
        window = []
        for child in self.children:
            if child in self._waiting or child in self._leaving or isinstance(child, MoreBelow):
                continue
            turn += isinstance(child, Question)
            item = known.get(child) or item_of(child, turn)
            item.turn = turn
            item.refresh()
            window.append(item)
        self._items[self._first : self._last] = window
        self._last = self._first + len(window)

    # -- the window --------------------------------------------------------------------------------------------------

    async def to_end(self) -> None:
        """Show the end, and follow it."""
        async with self._changing:
            self._sync()
            if not self.is_whole:
                await self._leave_for(len(self._items))
                self.follow()
                await self._mount_above(self.STEP)
            # The last question and what stands below it: whoever goes on with that turn looks for its answer here.
            turn = next((n for n, item in enumerate(reversed(self._items), 1) if item.kind is Question), 0)
            await self._mount_above(turn - (self._last - self._first))
            self.follow()
        self.call_after_refresh(self.moved)

    async def to_beginning(self) -> None:
        """Show the first message."""
        async with self._changing:
            self._sync()
            if self._first:
                await self._leave_for(0)
                await self._mount_below(self.STEP)
            self.stay_at(0)
        self.call_after_refresh(self.moved)

    async def go_to(self, turn: int | None) -> None:
        """Show the question of a turn at the top; where there is no such turn, stay."""
        async with self._changing:
            self._sync()
            asked = (n for n, item in enumerate(self._items) if item.turn == turn and item.kind is Question)
            place = next(asked, None)
            if place is None:
                return
            if not self._first <= place < self._last:
                await self._leave_for(place)
                self.following = False
                await self._mount_below(self.STEP)
            for widget in self.query(".-found"):
                widget.remove_class("-found")
            self.hold(self._items[place].mounted().add_class("-found"))
        self.call_after_refresh(self.moved)

    def action_scroll_home(self) -> None:
        self._begin(self.to_beginning())

    def action_scroll_end(self) -> None:
        self._begin(self.to_end())

    async def _leave_for(self, place: int) -> None:
        """Unmount the window, and begin an empty one before this item."""
        leaving = self._items[self._first : self._last]
        self._first = self._last = place  # at once: what is mounted at the end meanwhile waits there
        await self._unmount(leaving)

    async def _mount_above(self, number: int) -> None:
        """Mount so many messages more above, the newest first."""
        stop = max(0, self._first - number)
        while self._first > stop:
            top = self._items[self._first].widget if self._first < self._last else None
            self._first -= 1
            await self._bring(self._items[self._first], **({"before": top} if top is not None else self._end()))

    def _end(self) -> dict[str, Any]:
        """Where the last message is mounted: below those that wait."""
        waiting = [child for child in self.children if child in self._waiting]
        return {"after": waiting[-1]} if waiting else {"before": 0}

    async def _mount_below(self, number: int) -> None:
        """Mount so many messages more below."""
        stop = min(len(self._items), self._last + number)
        while self._last < stop:
            above = self._items[self._last - 1].widget if self._last > self._first else None
            self._last += 1
            item = self._items[self._last - 1]
            await (self._bring(item, before=0) if above is None else self._bring(item, after=above))

    async def _bring(self, item: Item, **place: Any) -> None:
        """Mount an item at a place, or show it if it waited there. Keys are served between one and the next."""
        if item.widget is not None:
            item.widget.display = item.widget not in self._aside
            self._waiting.discard(item.widget)
        else:
            await super().mount(item.mounted(), **(place if self.children else {}))

    async def _unmount(self, items: Iterable[Item]) -> None:
        leaving, staying = [], self._aside | self._newest
        for item in items:
            if item.widget is not None and item.can_leave and item.widget not in staying:
                leaving.append(item.widget)
                item.widget = None
            elif item.widget is not None:
                self._hide(item.widget)
        self._leaving.update(leaving)
        await super().remove_children(leaving)
        self._leaving.difference_update(leaving)

    def _hide(self, widget: Widget) -> None:
        widget.display = False
        self._waiting.add(widget)

    async def _drop_above(self) -> None:
        """Unmount what the window has too much at its beginning, as far as it is far from what is seen."""
        far = {widget for widget, _, bottom in self._places if bottom < self.scroll_y - self.page}
        number = 0
        while self._last - self._first - number > self.WINDOW and self._items[self._first + number].widget in far:
            number += 1
        leaving = self._items[self._first : self._first + number]
        self._first += number
        await self._unmount(leaving)

    async def _drop_below(self) -> None:
        """The same at its end."""
        far = {widget for widget, top, _ in self._places if top > self.scroll_y + 2 * self.page}
        last = self._last
        while last - self._first > self.WINDOW and self._items[last - 1].widget in far:
            last -= 1
        leaving = self._items[last : self._last]
        self._last = last
        await self._unmount(leaving)

    async def _shift(self, direction: int) -> None:
        """Move the window by a step: up (-1) or down (1)."""
        async with self._changing:
            self._sync()
            if direction < 0:
                await self._mount_above(self.STEP)
                await self._drop_below()
            else:
                await self._mount_below(self.STEP)
                await self._drop_above()

    def moved(self) -> None:
        if not self.is_attached or not self.page:
            return
        self._show_more()
        if self._is_shifting or self._changing.locked():
            return
        above = self.max_scroll_y if self.following else self.scroll_y
        if above < self.page and self._first > 0:
            self._begin(self._shift(-1))
        elif self.max_scroll_y - self.scroll_y < self.page and not self.is_whole:
            self._begin(self._shift(1))

    def _begin(self, change: Coroutine[Any, Any, None]) -> None:
        """Do it beside: keys are served meanwhile."""
        self._is_shifting = True

        async def run() -> None:
            try:
                await change
            finally:
                if self.is_attached and self.screen.is_active:
                    # Before it is laid out nobody knows whether it is enough.
                    self.call_after_refresh(self._changed)
                else:  # the screen on top would be told to call it, and may go away before it does
                    self._is_shifting = False

        self.run_worker(run(), exit_on_error=False)

    def _changed(self) -> None:
        self._is_shifting = False
        self.moved()

    def _show_more(self) -> None:
        is_more = not self.following and (not self.is_whole or self.scroll_y < self.max_scroll_y)
        if self._more is None and is_more:
            self._more = MoreBelow()
            super().mount(self._more)
        elif self._more is not None:
            self._more.display = is_more
