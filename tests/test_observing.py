"""Scorers that look at a pass: each equals a slow restatement of its formula on a real network, and leaves no trace."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from kvchat.anatomy import Anatomy
from kvchat.cache.ragged import SegmentedCache
from kvchat.compress.aggregate import AGGREGATORS, COVERAGE
from kvchat.compress.compressor import rank
from kvchat.compress.order import ORDERS, coverage_cut, ordered
from kvchat.compress.scorers import SCORERS, Subject
from kvchat.compress.scorers.expected_attention import AHEAD
from kvchat.compress.scorers.rkv import ALIKE, IMPORTANCE, OBSERVING
from kvchat.compress.scorers.snapkv import WINDOW
from kvchat.engine import Engine
from kvchat.residence.sealing import Ranker, score
from kvchat.sections import OBSERVING as JOINING
from kvchat.sections import CompressConfig
from tests.test_scorers import subject
from tests.tiny import make_model

Numbers = npt.NDArray[np.float64]
TOKENS = 70
PASSING = ["kvzip", "kvzip+", "snapkv", "expected_attention", "rkv"]


class Seen:
    """All that a forward pass over the whole text computes: what restatements begin from."""

    def __init__(self, engine: Engine, ids: list[int]) -> None:
        self.queries: list[Numbers] = []
        self.keys: list[Numbers] = []
        self.values: list[Numbers] = []
        self.states: list[Numbers] = []
        cache = engine.new_cache()
        cache.tap = self
        with Anatomy(engine.model).watched(lambda layer, states: self.states.append(states.double().numpy())):
            engine.forward(cache, ids)

    def observe(self, layer: int, query: Tensor, keys: Tensor, values: Tensor, scale: float) -> None:
        self.queries.append(query.double().numpy())
        self.keys.append(keys.double().numpy().copy())
        self.values.append(values.double().numpy().copy())
        self.scale = scale


class Text:
    """A tail of random tokens, and what is known of it."""

    def __init__(self, tokens: int = TOKENS, family: str = "llama", prefix: int = 0) -> None:
        self.engine = Engine(make_model(family), 1024)
        ids = torch.randint(0, 255, (prefix + tokens,), generator=torch.Generator().manual_seed(1)).tolist()
        self.cache = self.engine.new_cache()
        self.engine.forward(self.cache, ids)
        self.seen = Seen(self.engine, ids)
        keys, values = self.cache.tail(0, tokens)
        self.subject = replace(subject(keys, values), token_ids=tuple(ids), ask=lambda content: (1, *content, 2))

    def scores(self, name: str, aggregate: str = "own", **about: Any) -> Tensor:
        config = CompressConfig(scorer=name, aggregate=aggregate)
        running = score(self.engine, self.cache, replace(self.subject, **about), Ranker(self.engine.model, config))
        return finish(running)


def finish(running: Iterator[Any]) -> Any:
    while True:
        try:
            next(running)
        except StopIteration as done:
            return done.value


@pytest.fixture(scope="module")
def text() -> Text:
    return Text()


def softmax(logits: Numbers) -> Numbers:
    power = np.exp(logits - logits.max(-1, keepdims=True))
    return power / power.sum(-1, keepdims=True)


def output_weight(text: Text, layer: int, head: int) -> Numbers:
    dim = text.seen.queries[0].shape[-1]
    weight = text.engine.model.network.model.layers[layer].self_attn.o_proj.weight.double().numpy()
    return weight[:, head * dim : (head + 1) * dim].T


# -- restatements ------------------------------------------------------------------------------------------------------


def window_rows(text: Text, layer: int, head: int, window: int) -> Numbers:
    """Probabilities of a query head's last rows for the tokens before them, (window, T - window)."""
    seen, tokens = text.seen, len(text.subject.token_ids)
    rows = []
    for at in range(tokens - window, tokens):
        logits = seen.keys[layer][head // 2, : at + 1] @ seen.queries[layer][head, at] * seen.scale
        rows.append(softmax(logits)[: tokens - window])
    return np.array(rows)


def smoothed(row: Numbers) -> Numbers:
    padded = np.pad(row, 2)
    mean = np.array([padded[at : at + 5].mean() for at in range(len(row))])
    return mean * row.sum() / mean.sum()


@pytest.mark.parametrize("aggregate", ["own", "max", "lifted", "defensive"])
def test_snapkv_is_the_smoothed_attention_of_the_last_tokens(text: Text, aggregate: str) -> None:
    found, window = text.scores("snapkv", aggregate), TOKENS // 8
    for layer in range(3):
        rows = [np.array([smoothed(row) for row in window_rows(text, layer, head, window)]) for head in range(4)]
        groups = [np.concatenate(rows[:2]), np.concatenate(rows[2:])]
        values = text.seen.values[layer][:, : TOKENS - window]
        norms = [np.abs(values[head // 2] @ output_weight(text, layer, head)).sum(-1) for head in range(4)]
        added = [(norms[0] + norms[1]) / 2, (norms[2] + norms[3]) / 2]
        lifted = [
            np.maximum(group.max(0), group.max(0).mean()) * own / sum(added)
            for group, own in zip(groups, added, strict=True)
        ]
        for head, group in enumerate(groups):
            ours = found[layer, head, : TOKENS - window].double().numpy()
            if aggregate == "own":
                expected = group.mean(0)
            elif aggregate == "max":
                expected = group.max(0)
            elif aggregate == "lifted":
                expected = lifted[head]
            else:
                expected = guaranteed(group.mean(0), lifted[head])
            assert np.allclose(ours, expected, atol=1e-5)
        assert (found[layer, :, TOKENS - window :] > found[layer, :, : TOKENS - window].max()).all()


def guaranteed(average: Numbers, lifted: Numbers) -> Numbers:
    """The pairs that bring the head to its coverage come first, by their mean; the rest by the worst case."""
    scores = lifted / (1 + lifted)
    covered = 1 - average.sum()
    for place, at in enumerate(np.argsort(-average, kind="stable")):
        if covered >= COVERAGE:
            break
        scores[at] = 2 - place / len(average)
        covered += average[at]
    return scores


def test_what_is_kept_anyway_counts_as_covered() -> None:
    weights = torch.full((1, 1, 1, 10), 0.01)  # nine tenths lie on the window and the prefix
    share = torch.ones(1, 10)
    assert (AGGREGATORS["defensive"](weights, share) < 1).all()
    assert (AGGREGATORS["defensive"](weights * 10, share) > 1).sum() == 9


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3"])
def test_expected_attention_is_the_mean_exponential_of_queries_ahead(family: str) -> None:
    text = Text(family=family)
    found, seen = text.scores("expected_attention"), text.seen
    dim, rope = seen.keys[0].shape[-1], text.engine.model.network.model.rotary_emb
    frequencies = rope.inv_freq.double().numpy()

    def turn(position: int) -> Numbers:
        angles = position * frequencies
        cos, sin = np.diag(np.cos(angles)), np.diag(np.sin(angles))
        return np.block([[cos, -sin], [sin, cos]])

    ahead = np.mean([turn(position) for position in range(TOKENS, TOKENS + AHEAD)], axis=0)
    for layer, head in np.ndindex(3, 4):
        plain = np.array([turn(at).T @ seen.queries[layer][head, at] for at in range(TOKENS)])
        mean, spread = ahead @ plain.mean(0), ahead @ np.cov(plain.T, bias=True) @ ahead.T
        keys = seen.keys[layer][head // 2]
        logits = keys @ mean * seen.scale + [key @ spread @ key * seen.scale**2 / 2 for key in keys]
        seen.states.append(softmax(np.array(logits)))
    expected = seen.states[-12:]
    for layer, head in np.ndindex(3, 2):
        both = (expected[layer * 4 + 2 * head] + expected[layer * 4 + 2 * head + 1]) / 2
        both = both * np.linalg.norm(seen.values[layer][head], axis=-1)
        assert np.allclose(found[layer, head].numpy(), both, atol=1e-4, rtol=1e-3)
    assert dim == 16


def test_expected_attention_in_several_passes_is_that_in_one(text: Text) -> None:
    whole = text.scores("expected_attention")
    ranker = Ranker(text.engine.model, CompressConfig(scorer="expected_attention", score_chunk=16))
    parts = finish(score(text.engine, text.cache, text.subject, ranker))
    assert torch.allclose(whole, parts, atol=1e-6)


def test_kvzip_plus_weighs_by_what_values_add_and_by_the_rows_state() -> None:
    text = Text(tokens=9)
    found = text.scores("kvzip+")
    ids = [*text.subject.token_ids]
    request = [1, *text.subject.encode(""), 2]
    seen = Seen(text.engine, ids + request + ids)
    for layer, head in np.ndindex(3, 2):
        best = np.zeros(9)
        for query in (2 * head, 2 * head + 1):
            adds = np.linalg.norm(seen.values[layer][head, :9] @ output_weight(text, layer, query), axis=-1)
            for row in range(9, len(ids + request + ids)):
                logits = seen.keys[layer][head, : row + 1] @ seen.queries[layer][query, row] * seen.scale
                weights = softmax(logits)[:9] * adds / np.linalg.norm(seen.states[layer][row])
                best = np.maximum(best, weights)
        assert np.allclose(found[layer, head].numpy(), best, atol=1e-5)


@pytest.mark.parametrize("aggregate", ["mean", "max"])
def test_kvzip_joins_rows_as_it_is_asked_to(aggregate: str) -> None:
    text = Text(tokens=9)
    found = text.scores("kvzip", aggregate)
    if aggregate == "max":
        assert torch.allclose(found, text.scores("kvzip"), atol=1e-6)
    else:
        assert (found <= text.scores("kvzip") + 1e-6).all()


def test_rkv_is_attention_less_what_other_keys_repeat(text: Text) -> None:
    found, seen = text.scores("rkv"), text.seen
    for layer, head in np.ndindex(3, 2):
        keys = seen.keys[layer][head]
        rows = []
        for at in range(TOKENS - OBSERVING, TOKENS):
            logits = [keys @ seen.queries[layer][query, at] * seen.scale for query in (2 * head, 2 * head + 1)]
            rows.append(softmax(np.maximum(*logits)[: TOKENS - OBSERVING]))
        mean = np.pad(np.mean(rows, axis=0), 3)
        importance = [mean[at : at + 7].max() for at in range(TOKENS - OBSERVING)]
        units = keys / np.linalg.norm(keys, axis=-1, keepdims=True)
        cosine = units @ units.T
        for row in range(TOKENS):
            cosine[row, row] = 0
            alike = [at for at in range(TOKENS) if cosine[row, at] > ALIKE]
            if alike:
                cosine[row, alike[-1]] = 0
        repeated = softmax(cosine.mean(0))[: TOKENS - OBSERVING]
        expected = IMPORTANCE * np.array(importance) - (1 - IMPORTANCE) * repeated
        assert np.allclose(found[layer, head, : TOKENS - OBSERVING].numpy(), expected, atol=1e-6)


def sound(scores: Tensor) -> bool:
    """Whether all are numbers, and what is infinite is so to be kept."""
    return bool((scores > -torch.inf).all())


# -- what all of them keep to ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PASSING)
def test_scoring_leaves_the_tail_as_it_was(text: Text, name: str) -> None:
    def state(cache: SegmentedCache) -> list[Tensor]:
        return [part.clone() for layer in cache.layers for part in layer.tail()]

    before = state(text.cache)
    text.scores(name)
    assert all(torch.equal(one, other) for one, other in zip(before, state(text.cache), strict=True))
    assert text.cache.tap is None and text.cache.num_seen == TOKENS


@pytest.mark.parametrize("allocate", ORDERS)
@pytest.mark.parametrize("aggregate", ["own", *AGGREGATORS])
@pytest.mark.parametrize("name", PASSING)
def test_every_combination_is_exact_nested_and_keeps_what_is_protected(
    text: Text, name: str, aggregate: str, allocate: str
) -> None:
    if aggregate != "own" and name not in JOINING:
        return
    protected = [at in (0, 1, 33) for at in range(TOKENS)]
    order = ordered(text.scores(name, aggregate), protected, ORDERS[allocate])
    assert order.isfinite().all()
    chunks = {}
    for cuts in ((0.1, 0.3, 1.0), (0.2, 0.5, 1.0)):
        ranking = rank(order, protected, cuts, 0)
        assert np.cumsum(ranking.sizes).tolist() == [int(cut * 6 * TOKENS + 1e-6) for cut in cuts]
        assert (ranking.chunk_of[:, :, [0, 1, 33]] == 0).all()
        chunks |= {cut: ranking.chunk_of <= at for at, cut in enumerate(cuts)}
    assert all((chunks[low] <= chunks[high]).all() for low, high in ((0.1, 0.2), (0.2, 0.3), (0.3, 0.5)))


@pytest.mark.parametrize("tokens", [1, 2, 7, 40])
@pytest.mark.parametrize("name", PASSING)
def test_short_segments_have_scores(name: str, tokens: int) -> None:
    found = Text(tokens=tokens).scores(name)
    assert found.shape == (3, 2, tokens) and sound(found)


@pytest.mark.parametrize("fill", [0.0, 1.0, 3e38, -3e38])
@pytest.mark.parametrize("aggregate", [None, *AGGREGATORS])
@pytest.mark.parametrize("name", PASSING)
def test_scores_are_finite_whatever_is_observed(name: str, aggregate: str | None, fill: float) -> None:
    if aggregate and name not in JOINING:
        return
    tokens, scorer = 40, SCORERS[name]

    class Parts:
        def output_weight(self, layer: int) -> Tensor:
            return torch.full((4, 16, 8), 3e38 if fill else 0.0)

        def rotate(self, states: Tensor, positions: Tensor) -> Tensor:
            return states.float()

    given: Subject = subject([torch.full((2, tokens, 16), fill, dtype=torch.bfloat16)])
    one = scorer(replace(given, aggregate=aggregate and AGGREGATORS[aggregate], network=Parts()), 2000)
    for tokens_run in one.passes():
        rows = len(tokens_run)
        length = tokens_run.stop if isinstance(tokens_run, range) else tokens + rows
        query = torch.full((4, rows, 16), fill or 1.0, dtype=torch.bfloat16)
        kv = torch.full((2, length, 16), fill, dtype=torch.bfloat16)
        if hasattr(one, "enter"):
            one.enter(0, torch.full((rows, 8), fill, dtype=torch.bfloat16))
        one.observe(0, query, kv, kv, 0.25)
    assert sound(one.scores())


@pytest.mark.parametrize("name", ["snapkv", "rkv"])
def test_what_a_scorer_keeps_in_any_case_brings_no_mass(text: Text, name: str) -> None:
    scores = text.scores(name)
    window = int(scores[0, 0].isinf().sum())
    assert 0 < window < TOKENS
    order = ordered(scores, [False] * TOKENS, ORDERS["coverage"])
    alone = coverage_cut(ORDERS["coverage"](scores[:, :, :-window]), 0.9)
    expected = alone * (TOKENS - window) / TOKENS + window / TOKENS
    assert coverage_cut(order, 0.9) == pytest.approx(expected, abs=1e-6)
    for way in ORDERS.values():
        kept = rank(ordered(scores, [False] * TOKENS, way), [False] * TOKENS, (window / TOKENS, 1.0), 0)
        if way is not ORDERS["pyramid"]:
            assert (kept.chunk_of[:, :, -window:] == 0).all()


def test_a_window_is_no_more_than_an_eighth() -> None:
    for tokens in (8, 100, 256, 1000):
        keys = [torch.zeros(1, tokens, 4)]
        (window,) = SCORERS["snapkv"](subject(keys), 2000).passes()
        assert len(window) == min(WINDOW, tokens // 8)


def test_parts_of_the_network_are_found(text: Text) -> None:
    parts = Anatomy(text.engine.model)
    assert parts.output_weight(1).shape == (4, 16, 64)
    states = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))
    there = parts.rotate(states, torch.arange(5) + 3)
    assert torch.allclose(parts.rotate(there, -torch.arange(5) - 3), states, atol=1e-5)
