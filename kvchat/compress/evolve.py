"""Search for the layers' shares of the budget (EvolKV, arXiv 2509.08315). Pure: who drives it says how good a try is.

A share is a layer's kept fraction over the mean one. Groups of layers are searched one after another from the input
side by CMA-ES, those before at their best, those after still equal.

The paper multiplies a try's worth by a term that rewards spending less and punishes spending more. Here every try is
completed to the budget before it is judged, so that all are compared at equal bytes and there is nothing to reward: the
term would add its two constants and decide nothing. What is judged is then also exactly what is stored.

Letters: L layers.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from importlib.util import find_spec

from kvchat.errors import InputError

Shares = tuple[float, ...]
"""L numbers of mean 1, each whole in millionths."""

UNIT = 1_000_000
LEAST = 0.1
"""No layer has less than this part of the mean: a layer without any pairs is never looked at again."""
SIGMA = 0.3
"""CMA-ES begins with steps of this size."""

Search = Generator[list[Shares], Sequence[float], Shares]
"""Gives tries, takes how good each is (higher is better), and returns the best of all."""


def require_cmaes() -> None:
    """Raises InputError if cmaes is not installed."""
    if find_spec("cmaes") is None:
        raise InputError("searching layer budgets needs cmaes; pip install 'kvchat[tune]'")


def equal(layers: int) -> Shares:
    """Every layer has the same."""
    return (1.0,) * layers


def complete(shares: Sequence[float], most: float) -> Shares:
    """Shares (L,), all above 0, in proportion as they are but between LEAST and `most`, with mean 1 to the last bit.

    Millionths that rounding leaves go to those that it cut most (largest remainder).
    """
    total, low, high = len(shares) * UNIT, math.ceil(LEAST * UNIT), math.floor(most * UNIT)
    assert min(shares) > 0 and low <= UNIT <= high
    exact = _scaled(shares, total, low, high)
    units = [math.floor(share) for share in exact]
    by_remainder = sorted(range(len(units)), key=lambda layer: (units[layer] - exact[layer], layer))
    while left := total - sum(units):
        for layer in [layer for layer in by_remainder if units[layer] < high][:left]:
            units[layer] += 1
    return tuple(unit / UNIT for unit in units)


def _scaled(shares: Sequence[float], total: int, low: int, high: int) -> list[float]:
    """All times one factor, held between `low` and `high`: the largest factor with which they are at most `total`."""
    least, most = 0.0, high / min(shares)
    scaled = [float(low)] * len(shares)
    for _ in range(200):
        factor = (least + most) / 2
        tried = [min(max(share * factor, low), high) for share in shares]
        if math.fsum(tried) <= total:
            least, scaled = factor, tried
        else:
            most = factor
    return scaled


def groups(layers: int, size: int) -> list[slice]:
    """Neighbouring layers that are searched together."""
    return [slice(first, min(first + size, layers)) for first in range(0, layers, size)]


def population(dimensions: int) -> int:
    """Tries of one generation."""
    return 4 + math.floor(3 * math.log(dimensions))


def num_tries(layers: int, size: int, generations: int) -> int:
    """How many tries `search` gives."""
    return 1 + generations * sum(population(group.stop - group.start) for group in groups(layers, size))


def search(layers: int, size: int, generations: int, most: float, seed: int) -> Search:
    """Give equal shares first, alone, then one generation after another.

    The same arguments and answers give the same tries, so a search is taken up again by answering what is known.

    Args:
        layers: L.
        size: layers of a group.
        generations: of each group.
        most: the largest share of a layer, 1 / keep.
        seed: what is drawn depends on it.
    """
    best = equal(layers)
    (worth,) = yield [best]
    for number, group in enumerate(groups(layers, size)):
        best, worth = yield from _search_group(best, worth, group, generations, most, seed + number)
    return best


def _search_group(
    best: Shares, worth: float, group: slice, generations: int, most: float, seed: int
) -> Generator[list[Shares], Sequence[float], tuple[Shares, float]]:
    """The best shares, of which those of other layers change only as `complete` has it, and how good they are."""
    import numpy as np
    from cmaes import CMA

    base, size = best, group.stop - group.start
    sampler = CMA(
        mean=np.array(base[group]),
        sigma=SIGMA,
        bounds=np.array([[LEAST, most]] * size),
        seed=seed,
        population_size=population(size),
    )
    for _ in range(generations):
        drawn = [sampler.ask() for _ in range(sampler.population_size)]
        tries = [complete([*base[: group.start], *row.tolist(), *base[group.stop :]], most) for row in drawn]
        worths = yield tries
        sampler.tell([(row, -value) for row, value in zip(drawn, worths, strict=True)])
        for tried, value in zip(tries, worths, strict=True):
            if value > worth:
                best, worth = tried, value
    return best, worth
