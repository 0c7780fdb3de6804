"""Which keys do what: every binding has an id, and the setting `tui.keys` gives an id other keys."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from importlib import import_module

from textual.binding import Binding, BindingType
from textual.keys import Keys

from kvchat.errors import ConfigError

MODIFIERS = {"ctrl", "shift", "alt", "super", "hyper", "meta"}
SCREENS = ("picker", "branch_tree", "keys", "settings", "first_run", "inspector", "attach", "prompt", "widgets")
"""Parts with bindings of their own, beside the chat screen."""


def named(bindings: Iterable[BindingType]) -> dict[str, Binding]:
    """Those bindings that have an id, by it."""
    return {one.id: one for one in bindings if isinstance(one, Binding) and one.id}


def checked(keys: Mapping[str, str], own: Iterable[BindingType]) -> dict[str, str]:
    """`keys`, if every id in it is known and every key can be pressed; `own`: the bindings of the chat screen.

    Raises:
        ConfigError: there is no such id, or no such key.
    """
    known = named(own)
    if not known.keys() >= keys.keys():  # reading the other screens takes time
        known |= _of_screens()
    for name, pressed in keys.items():
        if name not in known:
            raise ConfigError(f"setting tui.keys: there is no key binding {name!r}; known: {', '.join(sorted(known))}")
        for key in pressed.split(","):
            _check(name, key.strip())
    return {name: ",".join(key.strip() for key in pressed.split(",")) for name, pressed in keys.items()}


def _check(name: str, key: str) -> None:
    *modifiers, last = key.split("+") if len(key) > 1 else [key]
    known = len(last) == 1 or last in {one.value for one in Keys} or re.fullmatch(r"[a-z]+(_[a-z]+)+", last)
    if not known or not MODIFIERS.issuperset(modifiers):
        raise ConfigError(f"setting tui.keys.{name}: there is no key {key!r}; write keys as in ctrl+e or f5")


def _of_screens() -> dict[str, Binding]:
    found: dict[str, Binding] = {}
    for part in SCREENS:
        for one in vars(import_module(f"kvchat.tui.{part}")).values():
            found |= named(vars(one).get("BINDINGS", ())) if isinstance(one, type) else {}
    return found
