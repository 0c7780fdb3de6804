"""Learned scorers equal slow restatements; what fits them has the right gradients, goes on where it was, and helps."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kvchat.anatomy import Anatomy
from kvchat.cli.app import main
from kvchat.compress.gates import LEAST, Gate
from kvchat.compress.policies import Policies, features
from kvchat.compress.scorers import SCORERS
from kvchat.config import Config
from kvchat.engine import Engine
from kvchat.errors import InputError
from kvchat.evals.cases import Case
from kvchat.events import Notice, Progress
from kvchat.fitting import collecting, orders, policies
from kvchat.fitting.checkpoint import Checkpoint
from kvchat.fitting.collecting import Segment, attention_paid, ends, path_of
from kvchat.fitting.figures import KEEPS, correlations, retained, spearman
from kvchat.fitting.fit import Fitted, Fitting
from kvchat.fitting.policies import Plan
from kvchat.fitting.small import Shape
from kvchat.learned import SHIPPED, load_weights
from kvchat.model import Model
from kvchat.store.store import Store
from tests.test_eval import case
from tests.test_scorers import kv, subject

PLAN = Plan(steps=12, hidden=8)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def small_weights(layers: int = 2, heads: int = 2, groups: int = 3, rank: int = 4, sinks: int = 5, n: int = 6) -> Any:
    shapes = {
        "query": (layers, heads, groups, rank, n),
        "query_bias": (layers, heads, groups, rank),
        "key": (layers, heads, rank, n),
        "query_norm": (layers, rank),
        "key_norm": (layers, rank),
        "sinks": (layers, heads, sinks, rank),
        "sink_bias": (layers, heads, groups),
    }
    return {name: random(*shape, seed=seed) for seed, (name, shape) in enumerate(shapes.items())}


# -- the gate ----------------------------------------------------------------------------------------------------------


def test_the_log_of_a_ridge_gate_is_linear_in_the_states() -> None:
    weights, states = {"weight": random(2, 3, 6), "bias": random(2, 3, seed=1)}, random(7, 6, seed=2)
    found = Gate(weights)(1, states)
    assert found.shape == (3, 7) and found.dtype == torch.float32
    for head in range(3):
        for token in range(7):
            told = sum(float(a) * float(b) for a, b in zip(weights["weight"][1, head], states[token], strict=True))
            log = told + float(weights["bias"][1, head])
            assert found[head, token].log().item() == pytest.approx(log, abs=1e-5)


def test_the_small_gate_is_the_weight_of_a_token_against_its_sinks_with_the_bias_once() -> None:
    weights, states = small_weights(), random(7, 6, seed=20)
    found = Gate(weights)(1, states.bfloat16())
    own = {name: part[1].double() for name, part in weights.items()}
    wide = states.bfloat16().double()
    for head in range(2):
        for token in range(7):
            shares = []
            key = own["key"][head] @ wide[token]
            key = key / (key.square().mean() + 1e-6).sqrt() * own["key_norm"]
            for group in range(3):
                query = own["query"][head, group] @ wide[token] + own["query_bias"][head, group]
                query = query / (query.square().mean() + 1e-6).sqrt() * own["query_norm"]
                level = key @ query / 2 + own["sink_bias"][head, group]
                against = sum((sink @ query / 2 - level).exp() for sink in own["sinks"][head])
                shares.append(1 / (1 + float(against)))
            assert found[head, token].item() == pytest.approx(sum(shares) / 3, abs=1e-5)


def test_other_tensors_are_no_gate_and_no_policies() -> None:
    with pytest.raises(InputError, match="fit gate"):
        Gate({"weight": random(1, 1, 1)})
    with pytest.raises(InputError, match="fit kvp"):
        Policies({"weight": random(1, 1, 1)})


# -- policies ----------------------------------------------------------------------------------------------------------


def policy_weights(layers: int = 3, heads: int = 2, dim: int = 16, hidden: int = 4) -> dict[str, Tensor]:
    width = 2 * dim + 8
    shapes = {"hidden": (width, hidden), "hidden_bias": (hidden,), "out": (hidden,), "out_bias": ()}
    return {name: random(layers, heads, *shape, seed=seed) for seed, (name, shape) in enumerate(shapes.items())}


def test_policies_see_keys_without_rope_values_and_the_place_in_the_segment(tiny_model: Model) -> None:
    weights, network, keys, values = policy_weights(), Anatomy(tiny_model), kv(9)[0], kv(9, seed=1)[0]
    found = Policies(weights)(1, keys, values, 40, network.rotate)
    for head in range(2):
        for token in range(9):
            plain = network.rotate(keys[head : head + 1, token : token + 1], torch.tensor([-40 - token]))[0, 0]
            share, log = torch.tensor((token + 0.5) / 9), torch.tensor([token + 1.0, 9.0 - token, 9.0]).log() / 8
            turns = [wave(2 * torch.pi * n * share) for n in (1, 2) for wave in (torch.sin, torch.cos)]
            inputs = torch.cat([plain, values[head, token], share[None], log, torch.stack(turns)])
            hidden = (inputs @ weights["hidden"][1, head] + weights["hidden_bias"][1, head]).clamp_min(0)
            told = hidden @ weights["out"][1, head] + weights["out_bias"][1, head]
            assert found[head, token].item() == pytest.approx(told.item(), abs=1e-4)


def test_a_segment_is_judged_alike_wherever_it_stands(tiny_model: Model) -> None:
    network, plain, values = Anatomy(tiny_model), kv(9)[0], kv(9, seed=1)[0]
    seen = [
        features(network.rotate(plain, torch.arange(start, start + 9)), values, start, network.rotate)
        for start in (0, 700)
    ]
    assert torch.allclose(*seen, atol=1e-4)


def test_kvp_scores_every_layer_by_its_own_weights(tiny_model: Model) -> None:
    weights, network = policy_weights(), Anatomy(tiny_model)
    given = replace(subject(kv(9), kv(9, seed=1)), start=40, learned=weights, network=network)
    found = SCORERS["kvp"](given, 2000).scores()
    for layer in range(3):
        told = Policies(weights)(layer, given.keys[layer], given.values[layer], 40, network.rotate)
        assert torch.equal(found[layer], told.exp())


# -- orders ------------------------------------------------------------------------------------------------------------


def test_the_cost_is_what_all_budgets_lose_together() -> None:
    importance = random(2, 6).abs()
    for order in ([3, 1, 0, 5, 2, 4], [0, 1, 2, 3, 4, 5]):
        for head in range(2):
            lost = sum(float(importance[head][order[budget:]].sum()) for budget in range(1, 6))
            found = orders.cost(torch.tensor([order, order]), importance)[head]
            assert found.item() == pytest.approx(lost, rel=1e-5)
    least = [min(float(orders.cost(torch.tensor([p]), importance[h : h + 1])) for p in permutations(range(6)))
             for h in range(2)]  # fmt: skip
    assert orders.best_cost(importance).tolist() == pytest.approx(least, rel=1e-5)


def test_the_likelihoods_of_all_orders_are_products_of_choices_and_sum_to_one() -> None:
    scores = random(1, 4)
    every = torch.tensor([[list(p) for p in permutations(range(4))]])
    found = orders.log_likelihood(scores, every)
    assert found.exp().sum().item() == pytest.approx(1, abs=1e-5)
    weights = scores[0].exp()
    for order, log in zip(every[0].tolist(), found[0].tolist(), strict=True):
        product = 1.0
        for place in range(4):
            product *= float(weights[order[place]] / weights[order[place:]].sum())
        assert log == pytest.approx(torch.tensor(product).log().item(), abs=1e-5)


def test_orders_are_drawn_as_likely_as_they_are() -> None:
    scores, every = random(1, 3), torch.tensor([[list(p) for p in permutations(range(3))]])
    found = orders.drawn(scores, torch.Generator().manual_seed(0), 20000)[0]
    for order, log in zip(every[0], orders.log_likelihood(scores, every)[0], strict=True):
        assert (found == order).all(1).float().mean().item() == pytest.approx(log.exp().item(), abs=0.015)


def test_the_expected_cost_and_its_gradient_are_those_over_all_orders() -> None:
    importance = random(2, 4, seed=1).abs()
    scores = random(2, 4).requires_grad_()
    every = torch.tensor([[list(p) for p in permutations(range(4))]] * 2)
    plain = (orders.log_likelihood(scores, every).exp() * orders.cost(every, importance)).sum(1)
    (slow,) = torch.autograd.grad(plain.sum(), scores)
    found = orders.expected_cost(scores, importance)
    (fast,) = torch.autograd.grad(found.sum(), scores)
    assert torch.allclose(found, plain, atol=1e-5) and torch.allclose(fast, slow, atol=1e-5)


def test_leaving_one_out_compares_each_reward_with_the_others() -> None:
    rewards = random(2, 5)
    found = orders.advantages(rewards)
    for head in range(2):
        for one in range(5):
            others = [float(rewards[head, k]) for k in range(5) if k != one]
            plain = (float(rewards[head, one]) - sum(others) / 4) / float(rewards[head].std())
            assert found[head, one].item() == pytest.approx(plain, abs=1e-5)


@pytest.mark.parametrize("loss", [orders.drawn_loss, lambda s, i, _: orders.expected_loss(s, i)])
def test_either_gradient_leads_to_the_best_order(loss: Any) -> None:
    importance, source = torch.tensor([[0.1, 3.0, 0.5, 1.0, 0.2, 2.0]]), torch.Generator().manual_seed(0)
    scores = torch.zeros(1, 6, requires_grad=True)
    before = orders.expected_loss(scores, importance).item()
    optimizer = torch.optim.Adam([scores], lr=0.1)
    for _ in range(200):
        optimizer.zero_grad()
        loss(scores, importance, source).sum().backward()
        optimizer.step()
    after = orders.expected_loss(scores, importance).item()
    assert before > 1.6 and 1 <= after < 1.15
    assert scores[0].argsort(descending=True).tolist()[:2] == [1, 5]


# -- what is collected -------------------------------------------------------------------------------------------------


@pytest.fixture
def config(tmp_path: Path) -> Config:
    given = {"compress.segment_min": 150, "compress.learned": str(tmp_path / "learned"), "model.prefill_chunk_size": 64}
    return Config.load(overrides=given)


def segments(model: Model, config: Config, kind: Any, work: Path, told: Case | None = None) -> list[Segment]:
    steps = collecting.collected(Engine(model, 64), told or case(10), config, kind, work)
    while True:
        try:
            next(steps)
        except StopIteration as finished:
            return list(finished.value)


def test_segments_end_with_turns(tiny_model: Model) -> None:
    path = path_of(tiny_model, case(10))
    cuts = ends(path, 150)
    assert len(cuts) > 2
    for first, last in zip([0, *cuts], cuts, strict=False):
        assert last == len(path) or path[last].role == "user"
        assert sum(len(message.token_ids) for message in path[first:last]) >= 150


def test_later_attention_is_that_of_dense_attention_over_everything(
    tiny_model: Model, config: Config, tmp_path: Path
) -> None:
    found, path = segments(tiny_model, config, "kvp", tmp_path), path_of(tiny_model, case(10))
    ids = [token for message in path for token in message.token_ids]
    network = make_eager(tiny_model)
    with torch.inference_mode():
        weights = network(torch.tensor([ids]), output_attentions=True).attentions
    for segment in found:
        end = segment.start + len(segment.candidates)
        assert segment.num_later == len(ids) - end
        for layer, dense in enumerate(weights):
            best = dense[0].unflatten(0, (2, 2)).amax(1)[:, end:, segment.start : end]
            assert torch.allclose(segment.later()[layer], best.sum(1), atol=1e-4)
    assert found[0].later().sum() > 0 and found[0].tensor("protected").any()


def make_eager(model: Model) -> Any:
    from tests.tiny import tiny_network

    network = tiny_network(attn_implementation="eager")
    network.load_state_dict(model.network.state_dict())
    return network


def test_attention_paid_is_the_largest_of_the_group_summed_over_queries() -> None:
    query, past, tail = random(4, 3, 8), random(2, 5, 8, seed=1), random(2, 6, 8, seed=2)
    found = attention_paid(query, past, tail, 0.3)
    for head in range(2):
        total = torch.zeros(5)
        for row in range(3):
            seen = torch.cat([past[head], tail[head, : 4 + row]])
            shares = [(query[2 * head + g, row] @ seen.T * 0.3).softmax(0)[:5] for g in range(2)]
            total += torch.maximum(*shares)
        assert torch.allclose(found[head], total, atol=1e-5)


def test_what_was_collected_is_not_collected_again(tiny_model: Model, config: Config, tmp_path: Path) -> None:
    before = segments(tiny_model, config, "gate", tmp_path)
    stamp = before[0].file.stat().st_mtime_ns
    assert [one.file for one in segments(tiny_model, config, "gate", tmp_path)] == [one.file for one in before]
    assert before[0].file.stat().st_mtime_ns == stamp
    (before[0].file.parent / collecting.LATER).unlink()
    segments(tiny_model, config, "gate", tmp_path)
    assert before[0].file.stat().st_mtime_ns > stamp


def test_states_are_what_the_gate_is_told_while_a_session_runs(
    tiny_model: Model, config: Config, tmp_path: Path
) -> None:
    segment = segments(tiny_model, config, "gate", tmp_path)[0]
    told: list[Tensor] = []

    with Anatomy(tiny_model).watched(lambda layer, states: told.append(states.clone())), torch.inference_mode():
        ids = segment.tensor("ids")[None]
        tiny_model.network(input_ids=ids, position_ids=torch.arange(ids.shape[1])[None])
    assert torch.allclose(segment.tensor("states"), torch.stack(told), atol=1e-4)


# -- figures -----------------------------------------------------------------------------------------------------------


def test_rank_correlation_gives_equal_values_their_mean_rank() -> None:
    assert spearman(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([10.0, 20.0, 90.0])) == pytest.approx(1)
    assert spearman(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([3.0, 2.0, 1.0])) == pytest.approx(-1)
    # Ranks 1, 2.5, 2.5, 4 and 1, 2, 3, 4.
    assert spearman(torch.tensor([1.0, 2.0, 2.0, 9.0]), torch.arange(4.0)) == pytest.approx(4.5 / (4.5 * 5) ** 0.5)
    assert spearman(torch.ones(3), torch.arange(3.0)) == 0


def test_the_oracle_retains_most_and_all_scorers_what_they_keep() -> None:
    later = random(2, 2, 20).abs()
    best = retained(later, later, "global")
    assert best == sorted(best) and all(a >= b for a, b in zip(best, KEEPS, strict=True))
    top = later.flatten().sort(descending=True).values
    assert best[2] == pytest.approx(float(top[:24].sum() / top.sum()), rel=1e-5)
    assert all(a <= b + 1e-9 for a, b in zip(retained(-later, later, "global"), best, strict=True))


# -- the whole ---------------------------------------------------------------------------------------------------------


def fitting(model: Model, config: Config, work: Path, stop_at: int | None = None) -> Fitting:
    def listen(event: Progress | Notice) -> None:
        if stop_at is not None and event.phase == "fit" and event.done == stop_at:  # type: ignore[union-attr]
            raise KeyboardInterrupt

    return Fitting(Engine(model, 64), config, listen, work)


def cases() -> list[Case]:
    return [case(10, "one"), replace(case(10, "two"), turns=case(13).turns[3:])]


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(policies, "SAVED", 3)
    yield


def test_policies_are_fitted_written_and_score(tiny_model: Model, config: Config, tmp_path: Path) -> None:
    found = fitting(tiny_model, config, tmp_path).kvp(cases(), 1, PLAN)
    weights = load_weights(tiny_model, "kvp", config.compress)
    assert found.file.exists() and weights.keys() == found.weights.keys()
    given = replace(subject(kv(9), kv(9, seed=1)), learned=weights, network=Anatomy(tiny_model))
    assert SCORERS["kvp"](given, 2000).scores().isfinite().all()
    rows = {(row["heads"], row["scorer"]): row for row in found.rows}
    for heads in ("uniform", "layer", "global"):
        oracle, own = rows[heads, "oracle"], rows[heads, "kvp"]
        assert all(0 < own[f"{keep:g}"] <= 1 for keep in KEEPS)
        if heads == "global":
            assert all(oracle[f"{keep:g}"] >= own[f"{keep:g}"] for keep in KEEPS)


def test_scores_of_heads_are_brought_to_one_scale_in_the_same_order(
    tiny_model: Model, config: Config, tmp_path: Path
) -> None:
    found = segments(tiny_model, config, "kvp", tmp_path)[:2]
    samples = [policies.Sample(one, Anatomy(tiny_model).rotate, torch.device("cpu")) for one in found]
    fit = policies.Fit(samples, PLAN, Checkpoint(tmp_path / "point", "x"))
    plain = fit._plain()
    scaled = policies._comparable(plain, samples)
    before, after = (torch.cat([policies.policy_scores(w, s.inputs()) for s in samples], 1) for w in (plain, scaled))
    assert all(spearman(*pair) > 0.9999 for pair in zip(before, after, strict=True))
    paid = torch.cat([sample.importance() for sample in samples], 1)
    assert torch.allclose(after.exp().sum(1), paid.sum(1), rtol=1e-3)


@pytest.mark.parametrize("drawn", [False, True])
def test_a_stopped_fit_goes_on_to_the_same_weights(
    drawn: bool, tiny_model: Model, config: Config, tmp_path: Path, often: None
) -> None:
    plan = replace(PLAN, drawn=drawn)
    whole = fitting(tiny_model, config, tmp_path / "a").kvp(cases(), 1, plan)
    with pytest.raises(KeyboardInterrupt):
        fitting(tiny_model, config, tmp_path / "b", stop_at=7).kvp(cases(), 1, plan)
    resumed = fitting(tiny_model, config, tmp_path / "b").kvp(cases(), 1, plan)
    assert all(torch.equal(part, resumed.weights[name]) for name, part in whole.weights.items())
    other = fitting(tiny_model, config, tmp_path / "b").kvp(cases(), 1, replace(plan, seed=1))
    assert not torch.equal(whole.weights["hidden"], other.weights["hidden"])


def test_a_stopped_small_gate_goes_on_to_the_same_weights(tiny_model: Model, config: Config, tmp_path: Path) -> None:
    whole = fitting(tiny_model, config, tmp_path / "a").gate(cases(), 1, "small", 5, 0)
    with pytest.raises(KeyboardInterrupt):
        fitting(tiny_model, config, tmp_path / "b", stop_at=2).gate(cases(), 1, "small", 5, 0)
    resumed = fitting(tiny_model, config, tmp_path / "b").gate(cases(), 1, "small", 5, 0)
    assert all(torch.equal(part, resumed.weights[name]) for name, part in whole.weights.items())
    assert Gate(whole.weights)(0, random(4, 64)).shape == (2, 4)


def test_a_ridge_gate_is_the_plain_regression(tiny_model: Model, config: Config, tmp_path: Path) -> None:
    found = segments(tiny_model, config, "gate", tmp_path)[:1]
    from kvchat.fitting.ridge import Sums

    sums, free = Sums.of(found, 1, torch.device("cpu")), found[0].candidates
    states = found[0].tensor("states", 1)[free].double()
    target = found[0].tensor("kvzip", 1)[:, free].double().log().clamp_min(LEAST).T
    mean, scale = states.mean(0), states.std(0, correction=0)
    plain = (states - mean) / scale
    gram = plain.T @ plain / len(plain) + 0.1 * torch.eye(len(mean), dtype=torch.float64)
    slope = torch.linalg.solve(gram, plain.T @ (target - target.mean(0)) / len(plain))
    (weights,) = sums.solved([0.1])
    told = plain @ slope + target.mean(0)
    assert torch.allclose(states @ weights[:-1] + weights[-1], told, atol=1e-6)
    assert sums.error(weights) == pytest.approx(float((told - target).square().sum()), rel=1e-6)


def test_a_gate_is_fitted_written_and_foretells_kvzip(tiny_model: Model, config: Config, tmp_path: Path) -> None:
    found: Fitted = fitting(tiny_model, config, tmp_path).gate([case(16)], 1, "best", 60, 0)
    rows = {row["gate"]: row for row in found.rows}
    assert rows.keys() == {"ridge", "small"} and rows["ridge"]["all pairs"] > 0.3
    best = max(rows.values(), key=lambda row: row["all pairs"])
    assert (Gate(found.weights)(0, random(4, 64)) < 0).any() == (best["gate"] == "ridge")
    assert load_weights(tiny_model, "gate", config.compress).keys() == found.weights.keys()
    tested = segments(tiny_model, config, "gate", tmp_path / "kvchat-fitting", case(16))[-1:]
    assert correlations(tested, found.weights)["all pairs"] == pytest.approx(best["all pairs"], abs=0.2)


def test_shape_is_what_the_model_has() -> None:
    assert Shape(3, 2, 2).groups == 2


def test_what_was_collected_is_removed_unless_a_folder_was_named(
    tiny_model: Model, config: Config, tmp_path: Path
) -> None:
    Fitting(Engine(tiny_model, 64), config, lambda _: None).gate([case(10)], 1, "ridge", 1, 0)
    assert [file.suffix for file in (tmp_path / "learned").iterdir()] == [".safetensors"]
    fit = fitting(tiny_model, config, tmp_path / "work")
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "mine.txt").write_text("x")
    fit.gate([case(10)], 1, "ridge", 1, 0)
    assert len(list((tmp_path / "work").iterdir())) == 2
    fit.forget()
    assert [file.name for file in (tmp_path / "work").iterdir()] == ["mine.txt"]


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(tiny_model: Model, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr("kvchat.model.load", lambda *_: tiny_model)

    def run(*argv: str, code: int = 0) -> tuple[str, str]:
        sets = [f"compress.learned={tmp_path / 'learned'}", "compress.segment_min=150"]
        given = [part for one in sets for part in ("--set", one)]
        assert main(["fit", argv[0], *given, "--store", str(tmp_path / "none.db"), *argv[1:]]) == code
        return capsys.readouterr()

    return run


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "talk.json"
    path.write_text(json.dumps([message for turn in case(16).turns for message in turn]))
    return path


def test_the_command_fits_says_figures_and_where_weights_are(run: Any, file: Path, tmp_path: Path) -> None:
    out, err = run("kvp", str(file), "--steps", "3", "--hidden", "4", "--json")
    told = json.loads(out)
    assert {row["scorer"] for row in told["figures"]} >= {"kvp", "keydiff", "knorm", "streaming", "random", "oracle"}
    assert Path(told["file"]).exists() and told["file"] in err
    out, _ = run("gate", str(file))
    assert "all pairs" in out and "ridge" in out


def test_what_is_held_out_can_be_drawn(run: Any, file: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    run("kvp", str(file), "--steps", "1", "--hidden", "4", "--plot", str(tmp_path / "kvp.png"))
    assert (tmp_path / "kvp.png").exists()


def test_sessions_of_the_store_are_learned_from(run: Any, tiny_model: Model, tmp_path: Path) -> None:
    said = collecting.path_of(tiny_model, case(16))
    with closing(Store(tmp_path / "none.db")) as store:
        info = store.create_session("trip", tiny_model.name, tiny_model.fingerprint)
        store.add_messages(info.id, said, None)
    out, err = run("gate", "--session", "trip", "--tokens", "1000")
    assert "ridge" in out and "written to" in err


def test_mistakes_are_one_line(run: Any, file: Path) -> None:
    def line(*argv: str) -> str:
        out, err = run(*argv, code=1)
        assert out == "" and err.count("\n") == 1
        return str(err)

    assert "nothing to learn from" in line("gate")
    assert "too short" in line("gate", str(file), "--tokens", "200")
    assert "cannot be held out" in line("kvp", str(file), str(file), "--held-out", "2")
    assert "no store" in line("kvp", "--session", "trip")
    assert "No such file" in line("kvp", "nowhere.json")


@pytest.mark.weights
def test_weights_for_the_builtin_model_come_with_the_package(builtin_model: Model, config: Config) -> None:
    model, width = builtin_model, builtin_model.network.config.hidden_size
    shape = (model.num_key_value_heads, 9, model.head_dim)
    gate, own = (load_weights(model, kind, config.compress) for kind in ("gate", "kvp"))
    network = Anatomy(model)
    for layer in (0, model.num_hidden_layers - 1):
        assert Gate(gate)(layer, random(9, width)).shape == shape[:2]
        assert Policies(own)(layer, random(*shape), random(*shape, seed=1), 50, network.rotate).isfinite().all()
    assert all(file.stat().st_size < 2e6 for file in SHIPPED.iterdir())
