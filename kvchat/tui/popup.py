"""The list of completions over the input. The focus stays in the input, which hands the keys on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

from textual import on
from textual.content import Content
from textual.geometry import Offset, Region
from textual.widgets import OptionList
from textual.widgets.option_list import Option

from kvchat.terminal import neutralise
from kvchat.tui.completion import Candidate


class Popup(OptionList, can_focus=False):
    """Candidates above a place on the screen; `take` is called with the one that is clicked."""

    MOST_ROWS: ClassVar[int] = 8

    DEFAULT_CSS = """
    Popup {
        overlay: screen;
        constrain: inside;
        display: none;
        width: 76;
        max-width: 100%;
        height: auto;
        max-height: 10;
        border: round $accent;
        background: $surface;
        padding: 0 1;
        scrollbar-size-vertical: 1;

        & > .option-list--option { text-wrap: nowrap; text-overflow: ellipsis; }
    }
    """

    def __init__(self, take: Callable[[Candidate], None]) -> None:
        super().__init__(markup=False)
        self._take_clicked = take
        self.candidates: Sequence[Candidate] = ()
        self.is_chosen = False
        """The user moved to the candidate that is marked."""

    def show(self, candidates: Sequence[Candidate], below: Region) -> None:
        """List candidates, the first one marked, right above a region of the screen."""
        self.candidates, self.is_chosen = candidates, False
        self.clear_options()
        wide = min(30, max((len(one.label) for one in candidates), default=0))
        self.add_options([Option(_entry(one, wide)) for one in candidates])
        self.highlighted = 0
        self.display = True
        height = min(len(candidates), self.MOST_ROWS) + 2
        self.styles.height = height
        self.absolute_offset = Offset(below.x, max(0, below.y - height))

    def hide(self) -> None:
        """Take it away."""
        self.display = False
        self.candidates = ()

    def move(self, step: int) -> None:
        """Mark the next candidate in a direction."""
        self.is_chosen = True
        self.highlighted = ((self.highlighted or 0) + step) % max(1, len(self.candidates))

    @on(OptionList.OptionSelected)
    def _clicked(self, event: OptionList.OptionSelected) -> None:
        event.stop()
        self._take_clicked(self.candidates[event.option_index])

    @on(OptionList.OptionHighlighted)
    def _moved(self, event: OptionList.OptionHighlighted) -> None:
        event.stop()

    @property
    def marked(self) -> Candidate:
        """The candidate that a key takes."""
        return self.candidates[self.highlighted or 0]


def _entry(one: Candidate, wide: int) -> Content:
    label = neutralise(one.label)
    return Content.assemble((label.ljust(wide), "bold"), ("  " + one.hint if one.hint else "", "$text-muted"))
