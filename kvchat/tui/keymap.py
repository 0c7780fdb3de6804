"""Which keys do what: every binding has an id, and the setting `tui.keys` gives an id other keys."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib import import_module

from textual.binding import Binding, BindingType

from kvchat.errors import ConfigError

SCREENS = ("picker", "branch_tree", "keys", "settings", "first_run", "inspector", "attach", "transcript", "map")
"""Parts with bindings of their own, beside the chat screen."""


def named(bindings: Iterable[BindingType]) -> dict[str, Binding]:
    """Those bindings that have an id, by it."""
    return {one.id: one for one in bindings if isinstance(one, Binding) and one.id}


def checked(keys: Mapping[str, str], own: Iterable[BindingType]) -> dict[str, str]:
    """`keys`, if every id in it is known; `own`: the bindings of the chat screen.

    Raises:
        ConfigError: there is no binding of that name.
    """
    known = named(own)
    if not known.keys() >= keys.keys():  # reading the other screens takes time
        known |= _of_screens()
    if unknown := sorted(keys.keys() - known.keys()):
        raise ConfigError(f"setting tui.keys: there is no binding {unknown[0]!r}; known: {', '.join(sorted(known))}")
    return dict(keys)


def _of_screens() -> dict[str, Binding]:
    found: dict[str, Binding] = {}
    for part in SCREENS:
        for one in vars(import_module(f"kvchat.tui.{part}")).values():
            found |= named(vars(one).get("BINDINGS", ())) if isinstance(one, type) else {}
    return found
