"""Functions that find no memory, as often as a test says."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

import pytest
import torch

WORDS = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.18 GiB."
ALWAYS = 1 << 30


class Scarcity:
    """Called with a function's owner and name, lets `times` calls of it find no memory, from the `first` on."""

    def __init__(self) -> None:
        self._patch = pytest.MonkeyPatch()

    def __call__(self, owner: Any, name: str, first: int = 1, times: int = 1) -> list[int]:
        """The list that is given grows by the number of every call."""
        original, calls = getattr(owner, name), list[int]()

        def call(*args: Any, **named: Any) -> Any:
            calls.append(len(calls) + 1)
            if first <= calls[-1] < first + times:
                raise torch.OutOfMemoryError(WORDS)
            return original(*args, **named)

        self._patch.setattr(owner, name, call)
        return calls

    def end(self) -> None:
        """From now on there is memory."""
        self._patch.undo()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.end()
