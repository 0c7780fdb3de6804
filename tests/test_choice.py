"""Choices on one prefill: they hold what a session would, measure what is there, and go on where they were stopped."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from kvchat.config import Config
from kvchat.engine import Engine
from kvchat.errors import ConfigError, InputError
from kvchat.evals.cases import Case, spread
from kvchat.evals.choice import Choice, cells
from kvchat.evals.feeding import feed, new_conversation
from kvchat.evals.report import markdown
from kvchat.evals.scored import Prefill, Scored, prefilled
from kvchat.model import Model
from kvchat.residence.residence import Residence
from tests.test_eval import SETTINGS, case, kl

Run = Callable[..., list[dict[str, Any]]]


def asked(turns: int = 12, name: str = "trip") -> Case:
    return spread(case(turns, name), [1.0], 3, seed=0)


@pytest.fixture
def run(tmp_path: Path, tiny_model: Model) -> Run:
    def measure(
        scorers: Sequence[str],
        allocations: Sequence[str],
        keeps: Sequence[float] = (0.3,),
        coverages: Sequence[float] = (0.9,),
        cases: Sequence[Case] = (),
        **settings: Any,
    ) -> list[dict[str, Any]]:
        config = Config.load(
            overrides={**SETTINGS, **{key.replace("__", "."): value for key, value in settings.items()}}
        )
        runner = Choice("choice", Engine(tiny_model, 64), config, tmp_path / "lines.jsonl", lambda _: None)
        return runner.run(cases or [asked()], cells(scorers, allocations, keeps, coverages, config))

    return measure


def held(residence: Residence) -> set[tuple[int, int, int]]:
    """(layer, head, position) of every sealed pair in memory."""
    found = set()
    for index, layer in enumerate(residence.cache.layers):
        rows = layer.sealed_before(residence.cache.tail_start)
        for head, (low, high) in enumerate(zip(rows.bounds, rows.bounds[1:], strict=False)):
            found |= {(index, head, position) for position in rows.positions[low:high].tolist()}
    return found


@pytest.mark.parametrize(
    "how",
    [
        {"compress.scorer": "kvzip"},
        {"compress.scorer": "kvzip", "compress.budget": "segment"},
        {"compress.scorer": "snapkv", "compress.aggregate": "defensive", "compress.allocate": "layer"},
        {"compress.scorer": "keydiff", "compress.allocate": "pyramid", "compress.recent_tokens": 150},
        {"compress.scorer": "snapkv", "compress.allocate": "coverage", "compress.coverage": 0.9},
    ],
    ids=lambda how: "-".join(str(value) for value in how.values()),
)
def test_a_choice_holds_what_a_session_would(tiny_model: Model, how: dict[str, Any]) -> None:
    engine, told, base = Engine(tiny_model, 64), asked(), Config.load(overrides=SETTINGS | how)
    # What decides where a ranking is cut must be known when it is made; what is held of it, only at the end.
    whole = base.replaced({"compress.rank_chunks": (0.1, 0.2, 0.3, 1.0), "compress.recent_tokens": 10**6})
    aimed = base.replaced({"compress.rank_chunks": (0.1, 0.2, 0.3, 1.0)})
    with (
        new_conversation(engine, whole, Residence) as conversation,
        prefilled(engine, aimed, told, [aimed.compress]) as prefill,
    ):
        list(feed(conversation, told, lambda _: None, 1))
        residence, ours = conversation.residence, prefill.residence
        assert len(held(residence)) == residence.cache.tail_start * tiny_model.pairs_per_token
        residence.config = aimed
        residence.hold(conversation.path)
        mask = prefill.choose(aimed.compress)
        assert 0.05 < mask.float().mean() < 0.95
        assert {tuple(place) for place in mask.nonzero().tolist()} == held(residence)
        prefill.measure(mask)
        assert held(ours) == held(residence) and ours.cache.tail_start == residence.cache.tail_start


def test_what_evicts_nothing_has_no_divergence(run: Run) -> None:
    line = run(["kvzip"], ["global"], [1.0])[0]
    assert kl(line) == 0 and all(q["pairs"] == q["bytes"] == 1 for q in line["questions"])
    coded = run(["kvzip"], ["global"], [1.0], codec__name="k4v4")[0]
    assert kl(coded) > 1e-4 and all(q["pairs"] == 1 and q["bytes"] < 0.5 for q in coded["questions"])


def test_choices_are_compared_at_equal_bytes(run: Run) -> None:
    lines = run(
        ["kvzip", "snapkv", "snapkv.lifted", "random"], ["global", "layer", "uniform"], compress__budget="segment"
    )
    assert len({line["questions"][0]["bytes"] for line in lines}) == 1
    assert len({kl(line) for line in lines}) == 12 and all(kl(line) > 0 for line in lines)
    table = markdown(lines)
    assert "| snapkv.lifted, layer | 0.3 | raw |" in table and "| kvzip, global | 0.3 | raw |" in table
    assert [line["settings"]["compress.aggregate"] for line in lines[6:9]] == ["lifted"] * 3


def test_coverage_is_a_target_of_its_own(run: Run) -> None:
    lines = run(["kvzip"], ["coverage", "global"], [0.3], [0.5, 0.9])
    less, more = (line["questions"][0]["pairs"] for line in lines[:2])
    assert less < more and [line["keep"] for line in lines] == [0.5, 0.9, 0.3]
    assert "| kvzip, coverage | 0.9 | raw |" in markdown(lines)


def test_a_stopped_run_goes_on(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    how = (["kvzip", "random"], ["global", "uniform"])
    both = [asked(), asked(name="other")]
    whole = run(*how, cases=both)
    file = tmp_path / "lines.jsonl"
    file.write_text("".join(f"{json.dumps(line)}\n" for line in whole[:3]))
    wanted = []
    begin = Scored.__init__

    def watched(self: Scored, *given: Any, ways: Sequence[Any]) -> None:
        wanted.append({way.scorer for way in ways})
        begin(self, *given, ways=ways)

    monkeypatch.setattr(Scored, "__init__", watched)
    again = run(*how, cases=both)
    assert [kl(line) for line in again] == [kl(line) for line in whole]
    assert wanted == [{"random"}, {"kvzip", "random"}]  # nothing is scored for cells that are there
    monkeypatch.setattr(Choice, "_measuring", lambda *_: pytest.fail("nothing is left to do"))
    assert run(*how, cases=both) == again


def test_equal_masks_are_measured_once(tiny_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    config = Config.load(overrides=SETTINGS)
    with prefilled(Engine(tiny_model, 64), config, asked(), [config.compress]) as prefill:
        shown = []
        monkeypatch.setattr(Prefill, "_show", lambda *_: shown.append(1))
        mask = prefill.choose(config.compress)
        first = prefill.measure(mask, frozenset([prefill.truths[0][0].id]))
        assert len(first) == len(shown) == 1
        assert prefill.measure(mask.clone())[0] == first[0] and len(shown) == len(prefill.truths)
        other = prefill.measure(torch.ones_like(mask))
        assert len(shown) == 2 * len(prefill.truths) and len(other) == len(prefill.truths)


def test_what_cannot_be_chosen_is_said(run: Run) -> None:
    with pytest.raises(ConfigError, match=r"allocate: .*'global'"):
        run(["kvzip"], ["best"])
    with pytest.raises(ConfigError, match="observes no attention"):
        run(["keydiff.max"], ["global"])
    with pytest.raises(InputError, match="one codec"):
        run(["kvzip"], ["global"], codec__name=("k8v8", "k4v4"))
    with pytest.raises(InputError, match="trip: no segment is complete"):
        run(["kvzip"], ["global"], compress__segment_min=5000)
    with pytest.raises(InputError, match="no layer budgets were searched"):
        run(["kvzip"], ["evolved"], compress__learned="/nonexistent")
