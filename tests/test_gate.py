"""A gate is asked while tokens are computed; what it did not see runs once more, and gives the same."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kvchat import learned
from kvchat.cache.marks import Marks
from kvchat.cache.ragged import Tap
from kvchat.engine import Engine
from kvchat.residence.sealing import Ranker, score
from kvchat.sections import CompressConfig
from tests.test_observing import finish
from tests.test_scorers import subject
from tests.tiny import make_model

TOKENS = 60


class Counting(Engine):
    """Counts passes that only look."""

    passes = 0

    def observe(self, cache: Any, ids: Any, tap: Tap, start: int | None = None) -> None:
        self.passes += len(ids)
        super().observe(cache, ids, tap, start)


@pytest.fixture
def config(tmp_path: Path) -> Iterator[CompressConfig]:
    config, source = CompressConfig(scorer="gate", learned=str(tmp_path)), torch.Generator().manual_seed(5)
    weights = {"weight": torch.randn(3, 2, 64, generator=source) / 9, "bias": torch.randn(3, 2, generator=source)}
    learned.save_weights(make_model(), "gate", config, weights)
    yield config


def ids(tokens: int = TOKENS) -> list[int]:
    return torch.randint(0, 255, (tokens,), generator=torch.Generator().manual_seed(1)).tolist()


def scored(engine: Engine, cache: Any, config: CompressConfig) -> Tensor:
    keys, values = cache.tail(0, TOKENS)
    given = subject(keys, values)
    object.__setattr__(given, "token_ids", tuple(ids()))
    return finish(score(engine, cache, given, Ranker(engine.model, config)))


def test_marks_made_on_the_way_equal_those_of_a_pass(config: CompressConfig) -> None:
    engine = Counting(make_model(), 1024)
    asked, not_asked = engine.new_cache(), engine.new_cache()
    asked.marks = Ranker(engine.model, config).marks()
    for cache in (asked, not_asked):
        engine.forward(cache, ids()[:40])
        for token in ids()[40:]:
            engine.forward(cache, [token])
    found = scored(engine, asked, config)
    assert engine.passes == 0
    again = scored(engine, not_asked, config)
    assert engine.passes == TOKENS
    assert torch.allclose(found.log(), again.log(), atol=1e-4) and found.log().std() > 0.1


def test_only_tokens_that_it_did_not_see_run_again(config: CompressConfig) -> None:
    engine = Counting(make_model(), 1024)
    cache, whole = engine.new_cache(), engine.new_cache()
    engine.forward(cache, ids()[:20])  # as if these came from the store
    cache.marks = Ranker(engine.model, config).marks()
    engine.forward(cache, ids()[20:])
    engine.forward(whole, ids())
    found = scored(engine, cache, config)
    assert engine.passes == 20
    assert torch.allclose(found.log(), scored(engine, whole, config).log(), atol=1e-4)


def test_taken_back_tokens_leave_no_marks(config: CompressConfig) -> None:
    engine = Counting(make_model(), 1024)
    cache = engine.new_cache()
    cache.marks = Ranker(engine.model, config).marks()
    engine.forward(cache, [7] * 50)
    cache.crop(10)
    cache.marks.crop(0)
    with cache.scratch():
        engine.forward(cache, [9] * 60)
    cache.crop(0)
    engine.forward(cache, ids())
    assert torch.allclose(scored(engine, cache, config), scored(engine, cache, config))
    assert engine.passes == 0


def test_a_pass_that_failed_half_way_leaves_none() -> None:
    marks = Marks(lambda layer, states: states.T)
    marks.enter(0, torch.ones(3, 2))
    for layer in range(2):
        marks.enter(layer, torch.full((4, 2), 5.0))
    marks.add(10)
    taken = marks.take(8, 20, torch.full((2, 2, 12), torch.nan))
    assert (taken[:, :, 2:6] == 5).all() and taken.isnan().sum() == 2 * 2 * 8


def test_marks_before_a_segment_are_forgotten() -> None:
    marks = Marks(lambda layer, states: states.T)
    for start in (0, 4, 8):
        marks.enter(0, torch.full((4, 1), float(start)))
        marks.add(start)
    assert marks.take(4, 8, torch.zeros(1, 1, 4)).eq(4).all()
    assert marks.take(0, 4, torch.full((1, 1, 4), torch.nan)).isnan().all()
