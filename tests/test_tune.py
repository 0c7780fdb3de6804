"""Layer budgets: completed exactly, found by search, taken up where a search was stopped, and read by `evolved`."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kvchat.cli import app as cli
from kvchat.compress.compressor import rank
from kvchat.compress.evolve import LEAST, UNIT, Shares, complete, equal, groups, num_tries, search
from kvchat.compress.order import by_shares, ordered
from kvchat.config import Config
from kvchat.engine import Engine
from kvchat.errors import InputError
from kvchat.evals import tuning
from kvchat.evals.choice import Choice, cells
from kvchat.evals.tuning import Plan, Tuned, tune
from kvchat.learned import load_shares
from kvchat.model import Model
from kvchat.residence.sealing import way
from tests.test_choice import asked
from tests.test_eval import SETTINGS
from tests.tiny import make_model

PLAN = Plan(generations=2, group=2, seed=3, step=2)
Tune = Callable[..., Tuned]

# -- the search alone ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("most", [1.0, 1.3, 10 / 3, 10.0])
def test_shares_are_completed_exactly(most: float) -> None:
    torch.manual_seed(0)
    for layers in (2, 7, 30):
        for given in ([1.0] * layers, torch.rand(layers).clamp_min(1e-6).tolist(), [1e-6] * (layers - 1) + [1e6]):
            shares = complete(given, most)
            assert sum(round(share * UNIT) for share in shares) == layers * UNIT
            assert all(round(share, 6) == share and LEAST <= share <= most for share in shares)
            assert complete(shares, most) == shares
    assert complete([1.0, 2.0, 3.0], 10.0) == (0.5, 1.0, 1.5)
    assert complete([1.0, 1.0, 1.0, 100.0], 2.0) == (0.666667, 0.666667, 0.666666, 2.0)


def played(
    layers: int, worth: Callable[[Shares], float], known: Sequence[list[float]] = ()
) -> tuple[Shares, list[Any]]:
    """A search to its end, of which the first answers are `known`, and what it tried."""
    searching, tried, answers = search(layers, 8, 20, 5.0, 1), [], [*known]
    tries = next(searching)
    while True:
        tried.append(tries)
        try:
            tries = searching.send(answers.pop(0) if answers else [worth(shares) for shares in tries])
        except StopIteration as finished:
            return finished.value, tried


def test_a_search_finds_what_is_planted() -> None:
    planted = complete([0.3, 2.0, 0.5, 1.5, 0.8, 3.0, 0.4, 0.4, 2.5, 0.3, 1.0, 0.6], 5.0)

    def distance(shares: Shares) -> float:
        return math.dist(shares, planted)

    found, tried = played(12, lambda shares: math.exp(-distance(shares)))
    assert distance(found) < 0.5 * distance(equal(12))
    assert sum(map(len, tried)) == num_tries(12, 8, 20) and tried[0] == [equal(12)]
    assert all(sum(round(share * UNIT) for share in shares) == 12 * UNIT for tries in tried for shares in tries)
    again, same = played(12, lambda shares: math.exp(-distance(shares)))
    assert (found, tried) == (again, same)
    half = [[math.exp(-distance(shares)) for shares in tries] for tries in tried[: len(tried) // 2]]
    assert played(12, lambda shares: math.exp(-distance(shares)), half) == (found, tried)


def test_what_finds_nothing_better_stays_equal() -> None:
    assert played(9, lambda _: 0.5)[0] == equal(9)
    assert groups(9, 8) == [slice(0, 8), slice(8, 9)]


def test_budgets_of_shares_are_exact_and_nested() -> None:
    torch.manual_seed(1)
    shares, scores = complete([0.2, 1.7, 3.0], 5.0), torch.rand(3, 2, 200)
    numbers = ordered(scores, [True] * 4 + [False] * 196, lambda given: by_shares(given, shares))
    before = torch.zeros(scores.shape, dtype=torch.bool)
    for keep in (0.1, 0.2, 0.5, 0.9):
        kept = torch.from_numpy(rank(numbers, [True] * 4 + [False] * 196, [keep, 1.0], 0).chunk_of == 0)
        assert int(kept.sum()) == round(keep * scores.numel()) and not (before & ~kept).any()
        before = kept
    counts = torch.from_numpy(rank(numbers, [False] * 200, [0.2, 1.0], 0).chunk_of == 0).sum((1, 2)) / (0.2 * 400)
    assert counts.tolist() == pytest.approx(shares, abs=0.03)


# -- on conversations ------------------------------------------------------------------------------------------------


@pytest.fixture
def settings(tmp_path: Path) -> Config:
    given = {"compress.scorer": "snapkv", "compress.learned": str(tmp_path / "learned"), "compress.keep_ratio": 0.25}
    return Config.load(overrides=SETTINGS | given)


@pytest.fixture
def run(settings: Config, tiny_model: Model) -> Tune:
    def search(names: Sequence[str] = ("trip", "other"), plan: Plan = PLAN, fresh: bool = False, **how: Any) -> Tuned:
        config = settings.replaced({key.replace("__", "."): value for key, value in how.items()})
        return tune(Engine(tiny_model, 64), config, [asked(name=name) for name in names], plan, lambda _: None, fresh)

    return search


def test_what_is_found_is_what_evolved_reads(run: Tune, settings: Config, tiny_model: Model, tmp_path: Path) -> None:
    tuned = run()
    evolved = settings.replaced({"compress.allocate": "evolved", "compress.budget": "segment"})
    assert load_shares(tiny_model, evolved.compress) == [*tuned.shares]
    assert sum(round(share * UNIT) for share in tuned.shares) == tiny_model.num_hidden_layers * UNIT
    assert [row["allocate"] for row in tuned.rows] == ["evolved", "uniform", "pyramid", "layer", "global"]
    assert tuned.rows[0]["KL learned from"] <= tuned.rows[1]["KL learned from"]
    assert len({row["pairs"] for row in tuned.rows}) == 1
    scores = torch.rand(3, 2, 40)
    assert torch.equal(way(tiny_model, evolved.compress)(scores), by_shares(scores, tuned.shares))
    # The same conversation, measured by `kvchat eval choice`.
    runner = Choice("choice", Engine(tiny_model, 64), evolved, tmp_path / "x.jsonl", lambda _: None, step=PLAN.step)
    line = runner.run([asked(name="other")], cells(["snapkv"], ["evolved"], [0.25], [], evolved))[0]
    measured = sum(q["kl"] for q in line["questions"]) / sum(q["tokens"] for q in line["questions"])
    assert measured == pytest.approx(tuned.rows[0]["KL held out"], rel=1e-4)


def test_a_stopped_search_goes_on(run: Tune, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, figures, tries = run(), tuning._figures, []
    log = next(whole.file.parent.glob("*-tune-*.json"))
    told = log.read_bytes()

    def counted(*given: Any) -> Any:
        tries.append(1)
        if len(tries) == 12:
            raise KeyboardInterrupt
        return figures(*given)

    monkeypatch.setattr(tuning, "_figures", counted)
    with pytest.raises(KeyboardInterrupt):
        run(fresh=True)
    assert 0 < len(json.loads(log.read_bytes())["known"]) < len(json.loads(told)["known"])
    assert run() == whole and log.read_bytes() == told
    before = len(tries)
    assert run() == whole and len(tries) - before == 10  # the table alone
    other = run(plan=replace(PLAN, seed=4))  # another search begins anew
    assert other.shares != whole.shares


def test_a_single_conversation_is_split(run: Tune) -> None:
    tuned = run(["trip"])
    assert tuned.rows[1]["KL learned from"] != tuned.rows[1]["KL held out"]


def test_what_cannot_be_tuned_is_said(run: Tune, monkeypatch: pytest.MonkeyPatch, settings: Config) -> None:
    with pytest.raises(InputError, match="--keep 1 every layer keeps all"):
        run(compress__keep_ratio=1.0)
    with pytest.raises(InputError, match="one codec for all ranks"):
        run(codec__name=("k8v8", "k4v4"))
    with pytest.raises(InputError, match="same name"):
        run(["trip", "trip"])
    with pytest.raises(InputError, match="recent_tokens"):
        run(compress__recent_tokens=4000)
    single = Engine(make_model(layers=1), 64)
    with pytest.raises(InputError, match="one layer"):
        tune(single, settings, [asked()], PLAN, lambda _: None)
    log = next(run().file.parent.glob("*-tune-*.json"))
    told = json.loads(log.read_bytes())
    told["known"][1]["tries"][0][0] += 0.5
    log.write_text(json.dumps(told))
    with pytest.raises(InputError, match="went otherwise; add --fresh"):
        run()
    log.write_text("{")
    with pytest.raises(InputError, match=r"cannot be read .* add --fresh"):
        run()
    monkeypatch.setattr("kvchat.compress.evolve.find_spec", lambda _: None)
    with pytest.raises(InputError, match="needs cmaes; pip install"):
        run()


def test_the_command(
    tiny_model: Model, settings: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr("kvchat.model.load", lambda *_: tiny_model)
    said = [message for turn in asked().turns for message in turn]
    file = tmp_path / "talk.json"
    file.write_text(json.dumps(said))
    given = [f"--set={key}={value}" for key, value in SETTINGS.items() if key != "compress.keep_ratio"]
    given += [f"--set=compress.learned={tmp_path}", "--scorer", "snapkv.mean", "--keep", "0.4", "--generations", "1"]
    assert cli.main(["tune", str(file), "--questions", "4", *given, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert len(told["shares"]) == 3 and "snapkv" in Path(told["file"]).read_text()
    assert cli.main(["tune", str(file), "--questions", "4", *given]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[1].startswith("evolved") and "compress.allocate=evolved" in err
    assert cli.main(["tune", str(file), "--keep", "1"]) == 1
    assert capsys.readouterr().err == (
        "kvchat: with --keep 1 every layer keeps all it has; choose less, as in --keep 0.3\n"
    )
