"""How much each KV pair of a segment matters. A method is one file and one line of `SCORERS`.

A scorer that needs extra forward passes does not import the engine: it returns the token ids it wants run, and the
session has the engine run them on a scratch tail, with the scorer as tap. Scorers ask, the engine runs.
"""

from __future__ import annotations

from collections.abc import Callable

from kvchat.compress.scorers.base import Alone, Scorer, Subject
from kvchat.compress.scorers.keydiff import KeyDiff
from kvchat.compress.scorers.knorm import KNorm
from kvchat.compress.scorers.kvzip import KVzip
from kvchat.compress.scorers.lagkv import LagKV
from kvchat.compress.scorers.random import Random
from kvchat.compress.scorers.streaming import Streaming

SCORERS: dict[str, Callable[[Subject, int], Scorer]] = {
    "kvzip": KVzip,
    "keydiff": KeyDiff,
    "knorm": KNorm,
    "lagkv": LagKV,
    "streaming": Streaming,
    "random": Random,
}
"""Name to a constructor from the segment and the most tokens that one pass may take in."""

__all__ = ["SCORERS", "Alone", "KNorm", "KVzip", "KeyDiff", "LagKV", "Random", "Scorer", "Streaming", "Subject"]
