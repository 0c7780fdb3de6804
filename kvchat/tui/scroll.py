"""Scrolling that keeps its place: at the end while it is followed, else at the child that is seen at the top."""

from __future__ import annotations

from typing import Any

from textual.containers import VerticalScroll
from textual.geometry import Size
from textual.layout import DockArrangeResult
from textual.scrollbar import ScrollBar
from textual.widget import Widget


class SteadyScroll(VerticalScroll):
    """What is mounted, removed or changes its height above the place that the user reads does not move that place.

    Textual's own anchor knows the end only, and also follows the end of what was not all mounted.
    """

    def __init__(self, *, id: str | None = None, can_focus: bool = True) -> None:
        super().__init__(id=id, can_focus=can_focus)
        self.following = True
        """The end stays in sight, whatever is added."""
        self.page = 0
        """Rows that are seen at once."""
        self._places: list[tuple[Widget, int, int]] = []
        self._laid_out: set[Widget] = set()
        self._held: tuple[Widget, int] | None = None

    @property
    def shows_all(self) -> bool:
        """The end of what is laid out is the end."""
        return True

    def follow(self) -> None:
        """Go to the end of what is mounted and stay there."""
        self.following, self._held = True, None
        self.refresh(layout=True)

    def stay_at(self, y: int) -> None:
        """Go to a place and stay there."""
        self.following = False
        self._held = None
        self._scroll_to(y=y, force=True)

    def hold(self, child: Widget) -> None:
        """Go to a child, so that it is the first that is seen, and stay there."""
        self.following, self._held = False, (child, 0)
        self.refresh(layout=True)

    def moved(self) -> None:
        """The place changed, or what is around it."""

    def arrange(self, size: Size, optimal: bool = False) -> DockArrangeResult:
        result = super().arrange(size, optimal)
        if not optimal and size.height:
            self._keep(result, size.height)
        return result

    def _keep(self, result: DockArrangeResult, height: int) -> None:
        self._places = [
            (placement.widget, placement.region.y, placement.region.bottom)
            for placement in result.placements
            if not placement.fixed and placement.region.height
        ]
        self._laid_out = {placement.widget for placement in result.placements}
        self.page = height
        end = max(0, result.total_region.bottom - height)
        place = self.scroll_y
        if self.following:
            place = end
        elif self._held:
            held, above = self._held
            place = next((top - above for widget, top, _ in self._places if widget is held), place)
        place = max(0, min(place, end))
        if place != self.scroll_y:
            # As Textual's own anchor does it: the layout that is being made is drawn at the new place already.
            self.set_reactive(Widget.scroll_y, place)
            self.set_reactive(Widget.scroll_target_y, place)
            self.vertical_scrollbar.set_reactive(ScrollBar.position, place)
        self.call_later(self.moved)

    def watch_scroll_y(self, old_value: float, new_value: float) -> None:
        super().watch_scroll_y(old_value, new_value)
        if not self.following:
            self._hold()
        self.moved()

    def _hold(self) -> None:
        top = self.scroll_y
        seen = ((widget, int(y - top)) for widget, y, bottom in self._places if bottom > top and widget.is_attached)
        self._held = next(seen, None)

    def scroll_to(self, x: float | None = None, y: float | None = None, **how: Any) -> None:
        """As of Widget, at once: after the next layout the place may be another."""
        super().scroll_to(x, y, **(how | {"immediate": True}))

    def _scroll_to(self, x: float | None = None, y: float | None = None, **how: Any) -> bool:
        """Every way to scroll ends here. Nothing moves slowly: the place would change meanwhile."""
        if y is not None:
            self.following = self.shows_all and y >= self.max_scroll_y
            if not self.following:
                self._hold()
        return super()._scroll_to(x, y, **(how | {"animate": False, "release_anchor": False}))
