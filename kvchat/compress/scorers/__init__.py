"""How much each KV pair of a segment matters. A method is one file and one line of `SCORERS`.

A scorer that needs extra forward passes does not import the engine: it returns the token ids it wants run, and the
session has the engine run them on a scratch tail, with the scorer as tap. Scorers ask, the engine runs.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

from kvchat.compress.scorers.base import Alone, Network, Pass, Scorer, Subject
from kvchat.compress.scorers.expected_attention import ExpectedAttention
from kvchat.compress.scorers.gate import Gated
from kvchat.compress.scorers.keydiff import KeyDiff
from kvchat.compress.scorers.knorm import KNorm
from kvchat.compress.scorers.kvp import KVP
from kvchat.compress.scorers.kvzip import KVzip
from kvchat.compress.scorers.kvzip_plus import KVzipPlus
from kvchat.compress.scorers.lagkv import LagKV
from kvchat.compress.scorers.random import Random
from kvchat.compress.scorers.rkv import RKV
from kvchat.compress.scorers.snapkv import SnapKV
from kvchat.compress.scorers.streaming import Streaming
from kvchat.errors import ConfigError

Make = Callable[[Subject, int], Scorer]
"""A constructor from the segment and the most tokens that one pass may take in."""

SCORERS: dict[str, Make] = {
    "kvzip": KVzip,
    "kvzip+": KVzipPlus,
    "snapkv": SnapKV,
    "expected_attention": ExpectedAttention,
    "rkv": RKV,
    "gate": Gated,
    "kvp": KVP,
    "keydiff": KeyDiff,
    "knorm": KNorm,
    "lagkv": LagKV,
    "streaming": Streaming,
    "random": Random,
}
"""Those of this package by name, as `compress.scorer` says it."""


def find_scorer(name: str) -> Make:
    """The scorer of that name, or of another package, as "module:name". Raises ConfigError."""
    if name in SCORERS:
        return SCORERS[name]
    module, _, attribute = name.partition(":")
    try:
        found: Make = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError, TypeError, SyntaxError) as error:
        raise ConfigError(f"compress.scorer {name!r} cannot be loaded: {error}") from None
    if not callable(found):
        raise ConfigError(f"compress.scorer {name!r} is not a scorer: it cannot be called with a segment")
    return found


__all__ = ["SCORERS", "Alone", "Make", "Network", "Pass", "Scorer", "Subject", "find_scorer"]
