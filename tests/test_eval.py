"""The instrument itself: what is equal measures equal, what is broken is seen, a seed gives the same lines."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import kvchat
from kvchat.config import Config
from kvchat.engine import Engine
from kvchat.errors import InputError
from kvchat.evals import grid as grids
from kvchat.evals.baselines import Masked
from kvchat.evals.cases import Case, Question, Turn, read, spread
from kvchat.evals.grid import Grid, Setting, fitted, lengths, mend, read_lines, settings_of, shortened
from kvchat.evals.planted import plant
from kvchat.evals.report import Group, difference, grouped, interval, markdown, mean, values
from kvchat.evals.rescoring import snapkv
from kvchat.model import Model
from kvchat.residence.sealing import rank_turns
from kvchat.store.store import Message
from tests.test_template import SEPARATED
from tests.tiny import make_model

WORDS = ["the boat left", "we swam far", "rain all day", "old stone house", "bread and figs", "a red door", "two cats"]
SETTINGS = {
    "compress.segment_min": 80,
    "compress.recent_tokens": 0,
    "compress.keep_ratio": 0.3,
    "codec.name": "raw",
    "model.prefill_chunk_size": 64,
}


def case(turns: int = 8, name: str = "trip") -> Case:
    """Short turns of which each says something else, and a question after every third."""
    said = [
        (f"Day {n}: {WORDS[n % 7]}, {WORDS[(n * 3 + 1) % 7]}.", f"On day {n}, {WORDS[(n * 5 + 2) % 7]}.")
        for n in range(turns)
    ]
    fed = tuple(({"role": "user", "content": u}, {"role": "assistant", "content": a}) for u, a in said)
    asked = [
        Question(f"q{n}", f"What was on day {n}?", said[n][1], "", "plain", n + 1, n + 1) for n in range(2, turns, 3)
    ]
    return Case(name, None, fed, tuple(asked))


Run = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def run(tmp_path: Path, tiny_model: Model) -> Run:
    def measure(
        task: str,
        methods: Sequence[str],
        cases: Sequence[Case] = (),
        vary: Mapping[str, Sequence[Any]] | None = None,
        engine: Engine | None = None,
        out: str = "lines.jsonl",
        **settings: Any,
    ) -> list[dict[str, Any]]:
        given = {**SETTINGS, **{key.replace("__", "."): value for key, value in settings.items()}}
        runner = Grid(
            task, engine or Engine(tiny_model, 64), Config.load(overrides=given), tmp_path / out, lambda _: None
        )
        return runner.run(cases or [case()], settings_of(methods, vary or {}, runner.config))

    return measure


def kl(line: Mapping[str, Any]) -> float:
    return sum(q["kl"] for q in line["questions"]) / sum(q["tokens"] for q in line["questions"])


# -- what is equal ---------------------------------------------------------------------------------------------------


def test_what_evicts_nothing_has_no_divergence(run: Run) -> None:
    for line in run("fidelity", ["full", "session"], compress__keep_ratio=1.0):
        assert abs(kl(line)) < 1e-6
        assert all(q["agree"] == q["tokens"] and q["bytes"] == q["pairs"] == 1.0 for q in line["questions"])
        assert all(q["logprob"] == pytest.approx(q["full_logprob"], abs=1e-4) for q in line["questions"])


class Isolated(Masked):
    """kvchat's own method, plainly: each block scored once when it is complete, and never again."""

    def _seal(self, path: Sequence[Message], last: int) -> Any:
        first = self.bounds(path).index(self.cache.tail_start)
        ranking, _ = yield from rank_turns(self.engine, self.cache, path, first, last, self.ranker)
        yield from super()._seal(path, last)
        kept = torch.from_numpy(ranking.chunk_of < self.budgets([(ranking, self.blocks[-1].end)], path)[0])
        self.show(torch.cat([self.mask[:, :, : -kept.shape[2]], kept], dim=2))

    def hold(self, path: Sequence[Message]) -> None:
        """Nothing changes: no turn is recent."""


def test_the_session_does_what_its_method_says(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(grids.METHODS, "isolated", Isolated)
    ours, plain = run("fidelity", ["session", "isolated"], compress__budget="segment")
    assert kl(ours) > 1e-3
    assert kl(ours) == pytest.approx(kl(plain), rel=1e-4)
    assert [q["bytes"] for q in ours["questions"]] == [q["bytes"] for q in plain["questions"]]


def test_a_history_of_one_segment_is_scored_the_same_by_all_that_use_kvzip(run: Run, tiny_model: Model) -> None:
    whole = case(3)
    tokens = sum(lengths(Engine(tiny_model, 64), whole))
    lines = run("fidelity", ["session", "one-shot", "recompress"], [whole], compress__segment_min=tokens)
    assert lines[0]["questions"][0]["pairs"] < 0.5
    assert [kl(line) for line in lines] == pytest.approx([kl(lines[0])] * 3, rel=1e-4)


def test_cuts_that_are_not_used_change_nothing(run: Run) -> None:
    fine, coarse = run("fidelity", ["session"], vary={"compress.rank_chunks": [(0.1, 0.3, 1.0), (0.3, 1.0)]})
    assert fine["key"] != coarse["key"]
    assert kl(fine) == pytest.approx(kl(coarse), rel=1e-5)


@pytest.mark.parametrize("recent", [0, 60])
@pytest.mark.parametrize("codec", ["raw", "k8v8"])
def test_baselines_hold_as_many_bytes_as_the_session(run: Run, recent: int, codec: str) -> None:
    methods = ["session", "window", "recompress", "recompress-snapkv", "one-shot"]
    ours, *others = run("fidelity", methods, compress__recent_tokens=recent, codec__name=codec)
    for other in others:
        for mine, theirs in zip(ours["questions"], other["questions"], strict=True):
            # But for a chunk of one segment, at which the budget ends: which, depends on scores.
            assert theirs["pairs"] == pytest.approx(mine["pairs"], abs=0.01)
            assert theirs["bytes"] == pytest.approx(mine["bytes"], abs=0.01)


# -- what is broken --------------------------------------------------------------------------------------------------


def test_positions_that_are_off_by_one_are_seen(run: Run, tiny_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    good = run("fidelity", ["session"], compress__keep_ratio=1.0)[0]
    inputs = Engine._inputs

    def shifted(self: Engine, cache: Any, ids: Sequence[int]) -> dict[str, Any]:
        given: dict[str, Any] = inputs(self, cache, ids)
        if cache.num_sealed_rows:  # only behind sealed rows, so that the full cache is right
            given["position_ids"] = given["position_ids"] + 1
        return given

    monkeypatch.setattr(Engine, "_inputs", shifted)
    bad = run("fidelity", ["session"], compress__keep_ratio=1.0, out="bad.jsonl")[0]
    assert kl(good) < 1e-6 and kl(bad) > 1e-4


def test_less_kept_is_further_away(run: Run) -> None:
    lines = run("fidelity", ["session"], vary={"compress.keep_ratio": [1.0, 0.5, 0.2]})
    assert kl(lines[0]) < kl(lines[1]) < kl(lines[2])


@pytest.mark.weights
def test_facts_are_recalled_from_the_full_cache_and_lost_with_it(run: Run, builtin_model: Model) -> None:
    example = read(Path(kvchat.__file__).parents[1] / "sessions" / "example.json")
    short = [tuple({**message, "content": message["content"][:160]} for message in turn) for turn in example.turns]
    told = [plant(replace(example, turns=tuple(short * 3), questions=()), [3], facts=6, seed=seed) for seed in (0, 2)]
    named = [replace(filled, name=str(number)) for number, filled in enumerate(told)]
    engine, little = Engine(builtin_model, 512), {"compress__segment_min": 100, "compress__keep_ratio": 0.1}
    lines = run("recall", ["full", "window"], named, engine=engine, **little)
    matches = {
        method: [q["match"] for x in lines if x["method"] == method for q in x["questions"]]
        for method in ("full", "window")
    }
    assert len(matches["full"]) == 12 and sum(matches["full"]) >= 5 and sum(matches["window"]) <= 1


# -- runs ------------------------------------------------------------------------------------------------------------


def plain(lines: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


@pytest.mark.parametrize("task", ["fidelity", "recall", "locomo"])
def test_the_same_run_gives_the_same_lines(run: Run, task: str) -> None:
    how = {"vary": {"compress.scorer": ["kvzip", "random"]}}
    first, again = (run(task, ["full", "session"], out=name, **how) for name in ("a", "b"))
    assert plain(first) == plain(again)
    assert len({line["key"] for line in first}) == 3


def test_a_stopped_run_goes_on(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vary = {"compress.keep_ratio": [1.0, 0.5]}
    whole = run("fidelity", ["full", "session"], vary=vary)
    file = tmp_path / "lines.jsonl"
    lines = file.read_text().splitlines()
    file.write_text("\n".join(lines[:2]) + "\n")
    again = run("fidelity", ["full", "session"], vary=vary)
    assert plain(again) == plain(whole) and len(file.read_text().splitlines()) == 3
    assert again[0]["seconds"] == whole[0]["seconds"]  # found, not computed again
    monkeypatch.setattr(Grid, "_measure", lambda *_: pytest.fail("nothing is left to do"))
    assert run("fidelity", ["full", "session"], vary=vary) == again


def test_turns_can_be_fed_several_at_once(run: Run, tiny_model: Model, tmp_path: Path) -> None:
    runner = Grid(
        "fidelity", Engine(tiny_model, 64), Config.load(overrides=SETTINGS), tmp_path / "x", lambda _: None, step=2
    )
    line = runner.run([case()], [Setting("session")])[0]
    assert [q["after"] for q in line["questions"]] == [3, 6]


def test_a_grid_leaves_out_what_cannot_differ() -> None:
    vary = {"compress.keep_ratio": [1.0, 0.3], "codec.name": ["raw", ("k8v8", "raw")], "compress.scorer": ["kvzip"]}
    found = settings_of(["full", "session", "window"], vary, Config())
    assert [setting.method for setting in found] == ["full", *["session"] * 4, "window"]
    assert found[-1].values == (("compress.keep_ratio", 0.3), ("codec.name", "raw"))
    with pytest.raises(InputError, match="no method 'best'; known: session, full"):
        settings_of(["best"], vary, Config())
    with pytest.raises(InputError, match="dtype cannot be varied"):
        settings_of(["session"], {"model.dtype": ["float32"]}, Config())
    with pytest.raises(InputError, match="nothing is left to measure"):
        settings_of(["window"], {"compress.keep_ratio": [1.0]}, Config())


def test_a_conversation_that_is_too_long_is_refused_and_can_be_shortened(tiny_model: Model) -> None:
    engine, long = Engine(tiny_model, 64), case(70)
    assert sum(lengths(engine, long)) > 4096
    with pytest.raises(InputError, match=r"trip has \d+ tokens, and the window .* --tokens 3500"):
        fitted(engine, long)
    short = shortened(engine, long, 3500)
    assert 3300 < sum(lengths(engine, fitted(engine, short))) <= 3500
    with pytest.raises(InputError, match="not even the first turn"):
        shortened(engine, long, 3)


@pytest.mark.parametrize("opening", [(), (({"role": "assistant", "content": "Hello."},),)], ids=["user", "assistant"])
def test_lengths_are_those_of_the_session(run: Run, opening: tuple[Turn, ...]) -> None:
    told, engine = case(), Engine(make_model(chat_template=SEPARATED), 64)
    told = replace(told, turns=opening + told.turns)
    line = run("fidelity", ["full"], [told], engine=engine)[0]
    counted = np.cumsum(lengths(engine, told))
    assert [q["history"] for q in line["questions"]] == [counted[q["after"] - 1] for q in line["questions"]]


# -- baselines -------------------------------------------------------------------------------------------------------


def test_snapkv_is_mean_attention_of_the_window() -> None:
    torch.manual_seed(0)
    query, keys, mask = torch.randn(4, 5, 8), torch.randn(2, 12, 8), torch.rand(2, 12) > 0.3
    scores = snapkv(query, keys, mask, 0.3)
    for head in range(2):
        rows = [
            (query[head * 2 + g, w] @ keys[head].T * 0.3).masked_fill(~mask[head], -torch.inf).softmax(-1)
            for g in range(2)
            for w in range(5)
        ]
        mass = [float(sum(row[t] for row in rows)) / len(rows) for t in range(12)]
        pooled = [sum(mass[max(0, t - 2) : t + 3]) / 5 for t in range(12)]
        assert scores[head].tolist() == pytest.approx(pooled, abs=1e-5)


def test_what_recompression_loses_stays_lost_and_one_shot_forgets_nothing(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    masks: dict[str, list[Tensor]] = {}
    show = Masked.show

    def watched(self: Masked, mask: Tensor) -> None:
        masks.setdefault(type(self).__name__, []).append(mask.clone())
        show(self, mask)

    monkeypatch.setattr(Masked, "show", watched)
    run("fidelity", ["recompress", "recompress-snapkv", "one-shot"])
    for name in ("Recompress", "SnapRecompress"):
        for before, after in zip(masks[name], masks[name][1:], strict=False):
            assert not (after[:, :, : before.shape[2]] & ~before).any()
    assert masks["OneShot"][-1].all() and not masks["OneShot"][-2].all()


# -- reports ---------------------------------------------------------------------------------------------------------


def line(name: str, keep: float, figures: Sequence[float], method: str = "session") -> dict[str, Any]:
    questions = [
        {"id": f"q{i}", "kl": x * 2, "tokens": 2, "agree": 1, "logprob": -3.0, "bytes": keep, "pairs": keep}
        for i, x in enumerate(figures)
    ]
    told = {
        "key": f"{name}{keep}{method}",
        "task": "fidelity",
        "model": "m",
        "dtype": "bfloat16",
        "case": name,
        "method": method,
        "keep": keep,
    }
    return {
        **told,
        "settings": {"compress.keep_ratio": keep},
        "scorer": "kvzip",
        "codec": "raw",
        "questions": questions,
    }


def test_means_weigh_tokens_and_intervals_hold_the_mean() -> None:
    source = np.random.default_rng(1)
    lines = [line(name, 0.3, source.exponential(size=40)) for name in "abc"]
    tables = values(lines, "kl", "tokens")
    low, high = interval(tables)
    assert low < mean(tables) < high and interval(tables) == (low, high)
    assert mean(tables) == pytest.approx(np.mean([q["kl"] / 2 for row in lines for q in row["questions"]]))
    same = values([line("a", 0.3, [0.5] * 5)], "kl", "tokens")
    assert interval(same) == (0.5, 0.5)


def test_methods_are_compared_question_by_question() -> None:
    ours, theirs = [line("a", 0.3, [1.0, 2.0])], [line("a", 0.3, [1.5, 2.5], "window"), line("b", 0.3, [9.0], "window")]
    assert mean(difference(ours, theirs, "kl", "tokens")) == pytest.approx(0.5)
    table = markdown([*ours, *theirs])
    assert "| window | 0.3 | raw | 0.300 | 0.300 | 4.33 [" in table and "| 0.500 [0.500, 0.500] |" in table
    assert [group.method for group in grouped([*ours, *theirs])] == ["kvzip per turn", "window"]
    assert Group.of(ours[0], ["codec.bits"]).other == ()


def test_a_file_of_other_lines_is_refused(tmp_path: Path) -> None:
    file, good = tmp_path / "x.jsonl", json.dumps(line("a", 0.3, [1.0]))
    for bad in ("nonsense", '{"key": "k"}', "[]", "3", "\udc80"):
        file.write_bytes(f"{good}\n{bad}\n".encode(errors="surrogateescape"))
        with pytest.raises(InputError, match="line 2 is no result"):
            read_lines([file])


def test_a_line_that_a_killed_run_left_unfinished_is_dropped(run: Run, tmp_path: Path) -> None:
    whole = run("fidelity", ["full", "session"])
    file = tmp_path / "lines.jsonl"
    file.write_bytes(file.read_bytes()[:-40])
    mend(file)
    assert len(read_lines([file])) == 1 and plain(run("fidelity", ["full", "session"])) == plain(whole)


def test_cases_are_told_apart(run: Run) -> None:
    other = replace(case(), questions=tuple(replace(q, answer="nothing") for q in case().questions))
    assert run("locomo", ["full"])[0]["key"] != run("locomo", ["full"], [other])[0]["key"]
    with pytest.raises(InputError, match="the same name"):
        run("fidelity", ["full"], [case(), case()])
    with pytest.raises(InputError, match="trip has no question"):
        run("fidelity", ["full"], [replace(case(), questions=())])


def test_a_table_tells_distances_and_settings_apart(run: Run) -> None:
    told = plant(Case("filler", None, case(20).turns, ()), [3, 6], facts=4, seed=0)
    table = markdown(run("recall", ["full", "session"], [told], vary={"compress.segment_min": [60, 120]}))
    assert "recall, 3 turns later | recall, 6 turns later" in table
    assert "| kvzip per turn, segment_min 60 |" in table and "| full | 1 | raw | 1.00 | 1.00 |" in table


def test_lines_of_a_version_with_other_settings_are_told_apart(run: Run) -> None:
    line = run("fidelity", ["session"])[0]
    settings = {key: value for key, value in line["settings"].items() if key != "compress.recent_tokens"}
    old = {**line, "key": "old", "settings": {**settings, "compress.recent_turns": 2}}
    assert len(grouped([line, line])) == 1
    assert len(grouped([line, old])) == 2


def test_probes_keep_their_questions() -> None:
    probed = spread(case(), [0.5, 1.0], 2, seed=0)
    assert [q.asked_after for q in probed.questions] == [4, 8, 8]
