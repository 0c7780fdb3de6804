"""How much each KV pair of a segment matters. A method is one file and one line of `SCORERS`.

A scorer that needs extra forward passes does not import the engine: it returns the token ids it wants run, and the
session has the engine run them on a scratch tail, with the scorer as tap. Scorers ask, the engine runs.
"""

from __future__ import annotations

from collections.abc import Callable

from kvchat.compress.scorers.base import Scorer, Subject
from kvchat.compress.scorers.kvzip import KVzip
from kvchat.compress.scorers.random import Random

SCORERS: dict[str, Callable[[Subject, int], Scorer]] = {"kvzip": KVzip, "random": Random}
"""Name to a constructor from the segment and the most tokens that one pass may take in."""

__all__ = ["SCORERS", "KVzip", "Random", "Scorer", "Subject"]
