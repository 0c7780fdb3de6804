"""The trace of many sessions: its figures on made-up sizes, and one short run with a tiny model."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest

from kvchat.bench.tiers import tiers
from kvchat.bench.trace import Recent, by_recency, by_utility, zipf
from kvchat.config import Config
from kvchat.engine import Engine
from kvchat.model import Model
from kvchat.utility import MEMORY, Chunk, Context, Costs, Place

COSTS = Costs(disk=1e9, decode=2e8, fixed_s=0.0005, prefill=500.0)


def test_the_most_popular_of_a_trace_is_used_as_often_as_zipf_says() -> None:
    trace = zipf(20, 20_000, seed=3)
    counts = [count for _, count in Counter(trace).most_common()]
    assert trace == zipf(20, 20_000, seed=3) != zipf(20, 20_000, seed=4)
    assert counts[0] / 20_000 == pytest.approx(1 / sum(1 / n for n in range(1, 21)), abs=0.02)
    assert all(more >= less for more, less in pairwise(counts))


def test_the_least_recently_used_goes_whole() -> None:
    recent = Recent(100)
    assert [recent.use(index, 40) for index in (0, 1, 0, 2, 0, 1)] == [
        *((False, []), (False, []), (True, []), (False, [1]), (True, []), (False, [2])),
    ]
    assert recent.use(3, 500) == (False, [0, 1]) and recent.use(3, 500) == (True, [])


def test_what_is_simulated_waits_for_nothing_where_all_fits_and_less_by_utility_than_by_recency() -> None:
    chunks = tuple(Chunk(part, 2_000_000, 1_000_000) for part in (0.25, 0.05, 0.03, 0.01))
    sessions = [[(Context(f"s{n}", 500, 1.0, chunks), Place(0, 0, 4)) for _ in range(3)] for n in range(10)]
    sizes, trace = [24_000_000] * 10, zipf(10, 200, seed=1)
    roomy = by_utility(trace, sessions, {MEMORY: 1e9}, COSTS, 0.1)
    assert (
        roomy.hits == pytest.approx(1 - 10 / 200) and by_recency(trace, sizes, [3.0] * 10, 1e9, 0.1).hits == roomy.hits
    )
    tight = by_utility(trace, sessions, {MEMORY: 60e6}, COSTS, 0.1)
    assert roomy.ttft_s < tight.ttft_s < by_recency(trace, sizes, [3.0] * 10, 60e6, 0.1).ttft_s


@pytest.mark.parametrize("budget", [0, 700_000])
def test_a_run_tells_what_every_policy_waited_for_within_the_cap(tiny_model: Model, budget: int) -> None:
    config = Config.load(overrides={"compress.scorer": "knorm", "store.disk_budget": budget})
    figures = tiers(config, Engine(tiny_model, 1024), None, 200, (), sessions=3, steps=4)
    for name in ("tiers", "lru", "evict", "lru_on_disk", "evict_on_disk"):
        assert figures[name]["ttft_s"] > 0 and figures[name]["kl"] >= 0 and figures["simulated"].get(name)
    assert figures["tiers"]["most_bytes_in_memory"] <= figures["cap_bytes"] * 0.9 + 1_000_000
    assert figures["lru"]["keep_ratio"] <= figures["evict"]["keep_ratio"] == 1.0
    assert figures["ratios"].keys() == figures["simulated_ratios"].keys()
    assert sum(count for name, count in figures["tiers"]["hits"].items() if not name.startswith("frames")) == 4
