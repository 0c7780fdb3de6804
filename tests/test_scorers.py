"""Every scorer equals a slow restatement of its formula; however heads compare, budgets are exact and nested."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from kvchat.compress.allocate import chunks_covering
from kvchat.compress.compressor import rank
from kvchat.compress.order import ORDERS, SAFEGUARD, by_shares, coverage_cut, ordered
from kvchat.compress.scorers import SCORERS, Subject
from kvchat.compress.scorers.lagkv import LAG

CUTS = (0.1, 0.3, 0.5, 1.0)
ALONE = ["keydiff", "knorm", "lagkv", "streaming", "random"]


def subject(keys: list[Tensor], values: list[Tensor] | None = None, protected: tuple[int, ...] = ()) -> Subject:
    tokens = keys[0].shape[1]
    return Subject(
        token_ids=tuple(range(tokens)),
        template=(False,) * tokens,
        protected=tuple(i in protected for i in range(tokens)),
        before=(),
        prefix_keys=[keys[0][:, :0]] * len(keys),
        encode=lambda text: (1,),
        ask=lambda content: content,
        keys=keys,
        values=values or keys,
    )


def kv(tokens: int, layers: int = 3, heads: int = 2, dim: int = 16, seed: int = 0) -> list[Tensor]:
    source = torch.Generator().manual_seed(seed)
    return [torch.randn(heads, tokens, dim, generator=source) for _ in range(layers)]


def scores(name: str, given: Subject) -> Tensor:
    return SCORERS[name](given, 2000).scores()


# -- scorers -----------------------------------------------------------------------------------------------------------


def test_knorm_is_minus_the_norm_of_each_key() -> None:
    keys = kv(9)
    found = scores("knorm", subject(keys))
    for layer, head, token in np.ndindex(3, 2, 9):
        norm = sum(float(x) ** 2 for x in keys[layer][head, token]) ** 0.5
        assert found[layer, head, token].item() == pytest.approx(-norm, rel=1e-5)


def test_keydiff_is_minus_the_cosine_with_the_mean_direction() -> None:
    keys = kv(9)
    found = scores("keydiff", subject(keys))
    for layer, head, token in np.ndindex(3, 2, 9):
        units = [key / key.norm() for key in keys[layer][head]]
        anchor = sum(units) / 9
        cosine = float(units[token] @ anchor / anchor.norm())
        assert found[layer, head, token].item() == pytest.approx(-cosine, abs=1e-5)


def test_lagkv_ranks_a_part_by_how_it_varies_in_the_range_of_the_next() -> None:
    keys, values = kv(3 * LAG + 5, layers=1), kv(3 * LAG + 5, layers=1, seed=1)
    found = scores("lagkv", subject(keys, values))[0]
    for head in range(2):
        for part in range(2):
            shares = np.zeros(LAG)
            for side in (keys[0][head].double().numpy(), values[0][head].double().numpy()):
                own, following = side[part * LAG : (part + 1) * LAG], side[(part + 1) * LAG : (part + 2) * LAG]
                scaled = (own - following.min(0)) / (following.max(0) - following.min(0))
                power = np.exp(scaled.std(1, ddof=1))
                shares += power / power.sum()
            ranks = np.argsort(np.argsort(shares)) / LAG
            assert np.allclose(found[head, part * LAG : (part + 1) * LAG], ranks)
        rest = found[head, 2 * LAG :]
        assert (rest.diff() > 0).all() and rest.min() > found[head, : 2 * LAG].max()


def test_lagkv_of_a_short_segment_and_streaming_go_by_recency() -> None:
    for name in ("lagkv", "streaming"):
        assert (scores(name, subject(kv(2 * LAG - 1))).diff() > 0).all()


@pytest.mark.parametrize("name", ALONE)
@pytest.mark.parametrize("tokens", [1, 2, 300])
@pytest.mark.parametrize("fill", [0.0, 1.0, 3e38, -3e38])
def test_scores_are_finite_whatever_the_keys(name: str, tokens: int, fill: float) -> None:
    constant = torch.full((2, tokens, 16), fill, dtype=torch.bfloat16)
    mixed = constant.clone()
    mixed[:, ::2] = -mixed[:, ::2]
    for keys in (constant, mixed):
        found = scores(name, subject([keys] * 2))
        assert (
            found.shape == (2, 2, tokens) and found.isfinite().all() and found.dtype in (torch.float32, torch.float64)
        )


# -- scorers with every way to compare ---------------------------------------------------------------------------------


@pytest.mark.parametrize("allocate", ORDERS)
@pytest.mark.parametrize("name", ALONE)
def test_budgets_are_exact_nested_and_hold_what_is_protected(name: str, allocate: str) -> None:
    given = subject(kv(301, layers=4), protected=(0, 1, 2, 150))
    order = ORDERS[allocate](scores(name, given))
    assert order.shape == (4, 2, 301) and order.isfinite().all()
    ranking = rank(order, given.protected, CUTS, 7)
    assert np.cumsum(ranking.sizes).tolist() == [int(cut * 4 * 2 * 301 + 1e-6) for cut in CUTS]
    assert (ranking.chunk_of[:, :, [0, 1, 2, 150]] == 0).all()
    assert ranking.scores is not None and list(ranking.scores) == sorted(ranking.scores, reverse=True)
    for more in ((0.1, 1.0), (0.2, 0.5, 1.0)):  # other cuts move no pair before another
        other = rank(order, given.protected, more, 7)
        assert ((other.chunk_of == 0) <= (ranking.chunk_of <= 1)).all()


def test_uniform_gives_every_head_its_best() -> None:
    given = torch.randn(4, 3, 200, generator=torch.Generator().manual_seed(0))
    kept = rank(ORDERS["uniform"](given), [False] * 200, (0.3, 1.0), 0).chunk_of == 0
    assert (kept.sum(2) == 60).all()
    assert all(
        (given[at][torch.from_numpy(kept[at])].min() >= given[at].topk(60).values.min()) for at in np.ndindex(4, 3)
    )


def test_pyramid_takes_from_later_layers_in_equal_steps() -> None:
    given = torch.randn(5, 2, 4000, generator=torch.Generator().manual_seed(0))
    kept = (rank(ORDERS["pyramid"](given), [False] * 4000, (0.2, 1.0), 0).chunk_of == 0).sum(2)
    assert (kept[:, 0] == kept[:, 1]).all() and int(kept.sum()) == 8000
    steps = -np.diff(kept[:, 0])
    assert steps.max() - steps.min() <= 2
    assert kept[0, 0] == pytest.approx(1.95 * 800, abs=2) and kept[-1, 0] == pytest.approx(0.05 * 800, abs=2)


@pytest.mark.parametrize("cut", [0.1, 0.3, 0.7])
def test_heads_of_a_layer_compete_and_each_keeps_a_part_of_its_own(cut: float) -> None:
    given = torch.randn(3, 4, 500, generator=torch.Generator().manual_seed(0))
    given[:, 0] -= 100  # a head that would lose everything
    given[1] += 1000  # a layer that would win everything
    kept = rank(ORDERS["layer"](given), [False] * 500, (cut, 1.0), 0).chunk_of == 0
    assert max(kept[layer].sum() for layer in range(3)) - min(kept[layer].sum() for layer in range(3)) <= 12
    for layer in range(3):
        own = kept[layer, 0].sum()
        assert SAFEGUARD * cut * 500 * 0.8 <= own <= SAFEGUARD * cut * 500 + 1
        best = given[layer, 0].topk(int(own)).indices
        assert kept[layer, 0][best].all()


@pytest.mark.parametrize("coverage", [0.5, 0.9, 0.95])
def test_coverage_holds_the_fewest_pairs_with_so_much_of_the_mass(coverage: float) -> None:
    given = torch.rand(3, 2, 200, generator=torch.Generator().manual_seed(0)) ** 6
    order = ORDERS["coverage"](given)
    cut = coverage_cut(order, coverage)
    kept = rank(order, [False] * 200, (cut, 1.0), 0)
    held = given[torch.from_numpy(kept.chunk_of == 0)]
    assert held.sum() >= coverage * given.sum() > held.sum() - held.min()
    assert chunks_covering(kept.scores or (), coverage) == 1
    finer = rank(order, [False] * 200, sorted({0.01, 0.05, cut, 0.6, 1.0}), 0)
    count = chunks_covering(finer.scores or (), coverage)
    assert finer.sizes[:count].sum() == kept.sizes[0]


def test_a_sink_does_not_stand_for_what_else_is_worth_keeping() -> None:
    given = torch.rand(3, 2, 200, generator=torch.Generator().manual_seed(0))
    without = coverage_cut(ORDERS["coverage"](given), 0.9)
    planted = given.clone()
    planted[:, :, 17] = 0.95 / 0.05 * given.sum(-1)  # of its head's mass
    order = ORDERS["coverage"](planted)
    assert coverage_cut(order, 0.9) == pytest.approx(without, abs=0.02)
    assert (rank(order, [False] * 200, (0.01, 1.0), 0).chunk_of[:, :, 17] == 0).all()
    planted[:, :, 18] = 100 * planted[:, :, 17]  # one behind another
    assert coverage_cut(ORDERS["coverage"](planted), 0.9) == pytest.approx(without, abs=0.03)


def test_protected_pairs_bring_no_mass() -> None:
    given = torch.rand(2, 2, 100, generator=torch.Generator().manual_seed(0))
    protected = [at < 10 for at in range(100)]
    order = ordered(given, protected, ORDERS["coverage"])
    alone = coverage_cut(ORDERS["coverage"](given[:, :, 10:]), 0.9)
    assert coverage_cut(order, 0.9) == pytest.approx(alone * 0.9 + 0.1, abs=0.01)


@pytest.mark.parametrize("keep", [0.1, 0.3, 0.7, 0.9])
def test_shares_of_layers_are_exact_and_what_one_cannot_hold_goes_to_others(keep: float) -> None:
    given, shares = torch.randn(4, 2, 500, generator=torch.Generator().manual_seed(0)), [2.0, 1.0, 0.7, 0.3]
    kept = (rank(by_shares(given, shares), [False] * 500, (keep, 1.0), 0).chunk_of == 0).sum(2)
    assert int(kept.sum()) == int(keep * 4000 + 1e-6) and np.ptp(kept, axis=1).max() <= 1
    if keep * 2 <= 1:
        assert np.allclose(kept.mean(1), [share * keep * 500 for share in shares], atol=1.5)
    else:
        assert kept.max() == 500


def test_heads_in_another_order_keep_the_same_pairs() -> None:
    turned = [2, 0, 1]
    keys, values = kv(300, heads=3), kv(300, heads=3, seed=1)
    other = ([part[turned] for part in keys], [part[turned] for part in values])
    for name in ("keydiff", "knorm", "lagkv"):
        first, second = scores(name, subject(keys, values)), scores(name, subject(*other))
        for allocate, way in ORDERS.items():
            kept, same = (rank(way(found), [False] * 300, CUTS, 0).chunk_of for found in (first, second))
            different = (kept[:, turned] != same).mean()
            # Equal places of two heads go to the lower one.
            assert different == 0 if allocate in ("global", "coverage") else different < 0.01


def test_equal_scores_go_to_the_earlier_token_in_every_head() -> None:
    for name in ("uniform", "layer", "pyramid"):
        order = ORDERS[name](torch.zeros(1, 2, 10))
        assert (order.diff() <= 0).all(), name


def test_what_a_scorer_sees_is_not_changed_by_it() -> None:
    keys = kv(300)
    before = [part.clone() for part in keys]
    for name in ALONE:
        scores(name, replace(subject(keys)))
    assert all(torch.equal(one, other) for one, other in zip(keys, before, strict=True))
