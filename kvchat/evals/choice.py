"""Ways to choose what is kept, compared at equal bytes on one prefill of each conversation: see `scored.py`.

Unlike a session, which computes later turns from what it holds, everything is held until the questions come. So this
tells scorers, aggregates and allocations apart in a fraction of the time; what they cost in use, `fidelity` tells.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from typing import Any

from kvchat.config import Config
from kvchat.errors import InputError
from kvchat.evals.cases import Case
from kvchat.evals.grid import Grid, Line, Setting
from kvchat.evals.scored import Prefill, named, prefilled


def cells(
    scorers: Sequence[str],
    allocations: Sequence[str],
    keeps: Sequence[float],
    coverages: Sequence[float],
    config: Config,
) -> list[Setting]:
    """Every scorer (NAME or NAME.AGGREGATE) with every allocation, at each keep or, with "coverage", each coverage.

    Raises:
        ConfigError: a value that its setting cannot have.
        InputError: the codec differs by rank, which a mask knows nothing of.
    """
    if not isinstance(config.codec.name, str):
        raise InputError("choices are compared in one codec for all ranks, as in --set codec.name=raw")
    found: dict[Setting, None] = {}
    for scorer, allocation in product(scorers, allocations):
        name, aggregate = named(scorer)
        how = {"compress.scorer": name, "compress.aggregate": aggregate, "compress.allocate": allocation}
        key, amounts = ("coverage", coverages) if allocation == "coverage" else ("keep_ratio", keeps)
        for amount in amounts:
            values: dict[str, Any] = {**how, f"compress.{key}": amount}
            config.replaced(values)
            found[Setting("choice", tuple(values.items()))] = None
    return list(found)


class Choice(Grid):
    """Runs choices over cases; each case is fed once, and every cell selects anew.

    In its lines `scorer` is NAME or NAME.AGGREGATE, and of an allocation by coverage `keep` is the coverage asked for.
    """

    def _describe(self, case: Case, setting: Setting) -> Line:
        compress = self._settled(setting)[0].compress
        keep = compress.coverage if compress.allocate == "coverage" else compress.keep_ratio
        return super()._describe(case, setting) | {"scorer": compress.scored_by, "keep": keep}

    @contextmanager
    def _measuring(self, case: Case, settings: Sequence[Setting]) -> Iterator[Callable[[Setting], Line]]:
        ways = [self._settled(setting)[0].compress for setting in settings]
        with prefilled(self.engine, self.config, case, ways, self.step) as prefill:
            yield lambda setting: self._selected(prefill, setting)

    def _selected(self, prefill: Prefill, setting: Setting) -> Line:
        begun = time.perf_counter()
        figures = prefill.measure(prefill.choose(self._settled(setting)[0].compress))
        return {"questions": figures, "notices": [], "seconds": round(time.perf_counter() - begun, 2)}
