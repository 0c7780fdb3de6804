"""Keeps the garbage collector from holding up the window: torch and transformers leave a million objects behind.

Python looks at all of them now and then, which takes a third of a second, and no key is served meanwhile.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

Result = TypeVar("Result")
What = TypeVar("What")


SELDOM = (2000, 10, 1000)
"""What the collector waits for: it looks at the young objects, some milliseconds each time, and hardly ever at all."""


@contextmanager
def calm() -> Iterator[None]:
    """Collect seldom inside. Afterwards all is as it was, or libraries would report what was set aside as leaked."""
    before = gc.get_threshold()
    gc.set_threshold(*SELDOM)
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()


def set_aside(make: Callable[[What], Result]) -> Callable[[What], Result]:
    """`make`, whose modules and all that is there with them are left alone by the collector from then on."""

    def made(what: What) -> Result:
        gc.disable()
        try:
            return make(what)
        finally:
            gc.freeze()
            gc.enable()

    return made
