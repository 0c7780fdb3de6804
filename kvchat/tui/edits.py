"""Changes of settings in the making: what is shown for each, where it is to go, and whether it can be."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from kvchat.config import OF_SESSIONS, Config
from kvchat.errors import ConfigError
from kvchat.values import as_text, from_text, kept, value_of

Place = Literal["session", "file"]


@dataclass(frozen=True, slots=True)
class Changed:
    """Values by dotted key: for config.toml, and for the session alone. None = the value below it again."""

    for_file: dict[str, Any]
    for_session: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Edit:
    """What was typed for a setting, and where it is to go."""

    place: Place
    text: str | None
    """None: the value is taken away there."""


class Edits:
    """Settings as they are and as they are to be.

    Args:
        config: of the program. own: of the session by dotted key; None = no session is open.
        check: raises ConfigError for settings of the program that it cannot use, whatever they are in themselves.
    """

    def __init__(
        self, config: Config, own: Mapping[str, Any] | None, check: Callable[[Config], object] = lambda _: None
    ) -> None:
        self.config = config
        self._check_use = check
        self.own = own or {}
        self._has_session = own is not None
        try:
            self._with_own = config.for_session(self.own)
        except ConfigError:  # kept by another version: what cannot be is not shown
            self._with_own = config
        self._places: dict[str, Place] = {}
        self._edits: dict[str, Edit] = {}
        self._problems: dict[str, str] = {}

    # -- what is shown -----------------------------------------------------------------------------------------------

    def places(self, key: str) -> tuple[Place, ...]:
        """Where a value of this setting can go, the nearest first."""
        is_own = self._has_session and key.partition(".")[0] in OF_SESSIONS
        return ("session", "file") if is_own else ("file",)

    def place(self, key: str) -> Place:
        """Where it is to go now."""
        return self._places.get(key, self.places(key)[0])

    def text(self, key: str) -> str:
        """What was typed, or else the present value there."""
        edit = self._edits.get(key)
        if edit is None:
            return self._present(key)
        return self._below(key) if edit.text is None else edit.text

    def origin(self, key: str) -> str:
        """Where the present value comes from."""
        return self._layer(key).origins()[key]

    def problem(self, key: str) -> str:
        """Why what was typed cannot be, in one line; empty if it can."""
        return self._problems.get(key, "")

    def remark(self, key: str) -> str:
        """What else there is to know about the change or the value; empty if nothing."""
        edit, origin = self._edits.get(key), self.config.origins()[key]
        if self.place(key) == "file":
            if key in self.own:
                return f"this session has its own value, {as_text(value_of(self._with_own, key))}, and keeps it"
            if origin == "this run":
                return "set for this run, which goes before config.toml"
            if origin.startswith("KVCHAT_"):
                return f"the variable {origin} goes before config.toml"
        if edit is None:
            return ""
        if edit.text is None:
            return "goes back to what config.toml says" if edit.place == "session" else "goes back to the default"
        return "counts from the next start on" if edit.place == "file" and not key.startswith("tui.") else ""

    def is_changed(self, key: str) -> bool:
        """Whether something else than the present value is to be kept."""
        return key in self._edits

    def _layer(self, key: str) -> Config:
        return self._with_own if self.place(key) == "session" else self.config

    def _present(self, key: str) -> str:
        return as_text(value_of(self._layer(key), key))

    def _below(self, key: str) -> str:
        return as_text(value_of(self.config if self.place(key) == "session" else Config(), key))

    # -- changes -----------------------------------------------------------------------------------------------------

    def put(self, key: str, text: str) -> None:
        """Take what was typed; what equals the present value is no change."""
        if text == self.text(key) and key in self._edits:
            return  # an editor that shows what is taken away
        if text.strip() == self._present(key):
            self._edits.pop(key, None)
        else:
            self._edits[key] = Edit(self.place(key), text)
        self._check(key)

    def turn(self, key: str) -> None:
        """Let it go to the other place, what was typed too."""
        places = self.places(key)
        self._places[key] = places[(places.index(self.place(key)) + 1) % len(places)]
        if edit := self._edits.get(key):
            self._edits[key] = replace(edit, place=self.place(key))
            if edit.text is None or edit.text.strip() == self._present(key):
                del self._edits[key]
        self._check(key)

    def reset(self, key: str) -> None:
        """Undo the change; where there is none, take the value away that is set there."""
        place, is_undone = self.place(key), self._edits.pop(key, None) is not None
        is_of_file = self.config.origins()[key] == "config.toml" and self._below(key) != self._present(key)
        if not is_undone and (key in self.own if place == "session" else is_of_file):
            self._edits[key] = Edit(place, None)
        self._check(key)

    def _check(self, last: str) -> None:
        """Find what cannot be; where only all together cannot, it is the last change's problem."""
        self._problems = {}
        for place in ("session", "file"):
            keys = [key for key, edit in self._edits.items() if edit.place == place]
            together = self._refusal(keys)
            alone = {key: self._refusal([key]) for key in keys} if together else {}
            self._problems |= {key: problem for key, problem in alone.items() if problem}
            if together and not any(alone.values()):
                self._problems[last if last in keys else keys[-1]] = together

    def _refusal(self, keys: list[str]) -> str:
        try:
            self._applied(keys)
        except ConfigError as error:
            return str(error)
        return ""

    def _applied(self, keys: list[str]) -> tuple[Config, dict[str, Any]]:
        """The settings with these edits, which are all of one place, and the values typed. Raises ConfigError."""
        values = {key: None if (text := self._edits[key].text) is None else from_text(key, text) for key in keys}
        if keys and self._edits[keys[0]].place == "session":
            own = {key: value for key, value in {**self.own, **values}.items() if value is not None}
            return self.config.for_session(own, keys), values
        new = {key: value_of(Config(), key) if self._edits[key].text is None else values[key] for key in keys}
        config = self.config.replaced(new, "config.toml")
        self._check_use(config)
        return config, values

    # -- what comes of it --------------------------------------------------------------------------------------------

    @property
    def problems(self) -> list[str]:
        """Settings that cannot be as they were typed."""
        return list(self._problems)

    def count(self, place: Place) -> int:
        """Changes that are to go there."""
        return sum(edit.place == place for edit in self._edits.values())

    def result(self) -> Changed:
        """All changes, in the types of their settings. Raises ConfigError while there are problems."""
        found: dict[Place, dict[str, Any]] = {"file": {}, "session": {}}
        for place, values in found.items():
            config, given = self._applied([key for key, edit in self._edits.items() if edit.place == place])
            values |= {key: None if value is None else kept(config, key, value) for key, value in given.items()}
        return Changed(found["file"], found["session"])
