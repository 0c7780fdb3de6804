"""Facts asked for from far back: planted where they should be, asked on one feeding, and told as they are."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvchat.cli.app import main
from kvchat.config import Config
from kvchat.engine import Engine
from kvchat.errors import InputError
from kvchat.evals import far_facts
from kvchat.evals.baselines import Full, Masked, rows_a_head
from kvchat.evals.cases import Case
from kvchat.evals.epicache import EpiCache
from kvchat.evals.far import Far, Plan, joined, plant
from kvchat.evals.far_report import by_distance, markdown
from kvchat.evals.feeding import fed, new_conversation
from kvchat.evals.grid import METHODS, Grid, Setting, lengths, read_lines, settings_of
from kvchat.evals.rebasing import costs
from kvchat.evals.recalling import answer_with_recall, asking, held, recalled, start_of
from kvchat.evals.report import markdown as plainly
from kvchat.evals.steady import Span, can_be_had, is_found, record, resident_bytes, stored_whole
from kvchat.evals.work import added, counting
from kvchat.model import Model
from kvchat.residence.residence import Residence
from kvchat.session import Conversation
from tests.test_eval import SETTINGS, case
from tests.tiny import make_model


@pytest.fixture
def engine(tiny_model: Model) -> Engine:
    return Engine(tiny_model, 64)


@pytest.fixture(scope="module")
def small() -> Engine:
    """Of two layers, for what depends on no number that a network computes."""
    return Engine(make_model(layers=2), 64)


def long(turns: int = 24) -> Case:
    return replace(case(turns), questions=())


def planted(engine: Engine, facts: int = 3, distances: Sequence[int] = (300, 1200)) -> Case:
    return plant(engine, long(), distances, facts, 0)


# -- the facts -------------------------------------------------------------------------------------------------------


def test_there_are_sorts_enough_and_none_asks_what_another_does() -> None:
    assert len(far_facts.ALL) >= 48
    assert len({sort.id for sort in far_facts.ALL}) == len({sort.subject for sort in far_facts.ALL})
    for sort in far_facts.ALL:
        assert len(set(sort.values)) == len(sort.values) >= 20
        assert sort.subject.startswith("my ") and all(form.count("{}") == 1 for form in sort.others)


def test_facts_lie_about_so_many_tokens_before_the_end_each_in_a_turn_of_its_own(engine: Engine) -> None:
    told = planted(engine)
    sizes = lengths(engine, told)
    ends = np.cumsum(sizes)
    assert Counter(one.id.partition("@")[2] for one in told.questions) == {"300": 3, "1200": 3}
    assert len({one.evidence for one in told.questions}) == len({one.answer for one in told.questions}) == 6
    for question in told.questions:
        distance = int(question.id.partition("@")[2])
        assert abs(ends[-1] - ends[question.evidence - 1] - distance) < 400  # turns have 80 tokens here, and more now
        assert question.asked_after == len(told.turns)
        tellings = [n for n, turn in enumerate(told.turns, 1) if question.answer in turn[0]["content"]]
        assert tellings == [question.evidence]
    assert planted(engine) == told


def test_what_cannot_be_planted_is_said(engine: Engine) -> None:
    with pytest.raises(InputError, match=r"trip has \d+ tokens, too few for 3 facts about 90000 tokens"):
        planted(engine, distances=[90_000])
    with pytest.raises(InputError, match="at most 50 facts"):
        planted(engine, facts=30)


def test_conversations_are_joined_and_every_turn_but_the_first_begins_with_its_user() -> None:
    opened = replace(long(2), name="other", turns=(({"role": "assistant", "content": "Hello."},), *long(2).turns))
    whole = joined([opened, long(2), opened])
    assert whole.name == "other+trip+other" and len(whole.turns) == 3 + 2 + 2
    assert [turn[0]["role"] for turn in whole.turns] == ["assistant"] + ["user"] * 6
    assert whole.turns[4][-1]["content"] == "Hello."


# -- the run ---------------------------------------------------------------------------------------------------------


def measure(engine: Engine, folder: Path, settings: Sequence[Setting], **given: Any) -> tuple[list[Any], list[Span]]:
    spans: list[Span] = []
    config = Config.load(overrides={**SETTINGS, **given})
    runner = Far(
        *("far", engine, config, folder / "far.jsonl", lambda _: None), step=2, plan=Plan(every=500), tell=spans.append
    )
    return runner.run([planted(engine)], settings), spans


def test_a_history_is_fed_once_for_all_that_counts_only_when_a_question_is_asked(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[str] = []
    begin = Conversation.begin
    monkeypatch.setattr(Conversation, "begin", lambda self, system: (begun.append(""), begin(self, system))[1])
    settings = settings_of(["session"], {"compress.keep_ratio": [1.0, 0.3], "recall.by": ["off", "text"]}, Config())
    lines, spans = measure(engine, tmp_path, settings)
    assert len(begun) == 6 + 2  # fresh ones, and one for each amount
    assert [line["keep"] for line in lines] == [1.0, 1.0, 0.3, 0.3]
    assert all(one["match"] in (0, 1) and one["alone_match"] in (0, 1) for one in lines[0]["questions"])
    assert {one["distance"] for one in lines[0]["questions"]} == {300, 1200}
    for one in lines[0]["questions"]:
        assert one["right"] == 1.0 and one["brought"] == 0
        assert abs(one["back"] - one["distance"]) < 400
    some, back = (sum(one["right"] for one in line["questions"]) for line in lines[2:])
    assert some < back and any(one["brought"] for one in lines[3]["questions"])
    assert all(not one["brought"] and not one["came"] for one in lines[2]["questions"])
    assert sum(one["came"] for one in lines[3]["questions"]) >= 3
    tokens = [span.tokens for span in spans[: len(spans) // 2]]
    assert len(tokens) >= 4 and tokens == sorted(tokens)
    assert [span["tokens"] for span in lines[0]["spans"]] == tokens


def test_the_order_of_settings_does_not_matter(small: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[str] = []
    begin = Conversation.begin
    monkeypatch.setattr(Conversation, "begin", lambda self, system: (begun.append(""), begin(self, system))[1])
    settings = settings_of(["session"], {"recall.by": ["text", "off"], "compress.keep_ratio": [0.3, 0.5]}, Config())
    lines, _ = measure(small, tmp_path, settings)
    assert len(begun) == 6 + 2
    told = [(line["keep"], line["settings"]["recall.by"]) for line in lines]
    assert told == [(0.3, "text"), (0.3, "off"), (0.5, "text"), (0.5, "off")]


def test_other_tasks_recall_only_where_that_is_asked_for(small: Engine, tmp_path: Path) -> None:
    history = planted(small)
    settings = settings_of(["session"], {"recall.by": ["off", "text"]}, Config())
    for given, wanted in (({}, "off"), ({"recall.by": "text"}, "text")):
        config = Config.load(overrides={**SETTINGS, **given})
        runner = Grid("recall", small, config, tmp_path / f"{wanted}.jsonl", lambda _: None, step=24)
        plain, *_ = runner.run([history], [Setting("session")])
        assert plain["settings"]["recall.by"] == wanted
        some, more = runner.run([history], settings)
        assert sum(one["pairs"] for one in some["questions"]) < sum(one["pairs"] for one in more["questions"])


def test_settings_of_recall_do_not_ask_for_another_feeding() -> None:
    from kvchat.evals.far import fed_by

    one, two = (Setting("session", (("compress.keep_ratio", 0.3), ("recall.by", by))) for by in ("off", "text"))
    assert fed_by(one) == fed_by(two) != fed_by(Setting("session", (("compress.keep_ratio", 0.5),)))


def test_lines_are_those_that_reports_read(engine: Engine, tmp_path: Path) -> None:
    lines, _ = measure(engine, tmp_path, [Setting("session")])
    assert read_lines([tmp_path / "far.jsonl"]) == json.loads(json.dumps(lines))
    rows = [*by_distance(lines)]
    assert [row["asked at"] for row in rows] == [300, 1200] and [row["questions"] for row in rows] == [3, 3]
    table = markdown(lines)
    assert "| right turn alone |" in table and "along the feeding" in table and "| resident_mib |" in table
    assert "recall, 1200 tokens later" in plainly(lines)
    again, spans = measure(engine, tmp_path, [Setting("session")])
    assert again == json.loads(json.dumps(lines)) and not spans  # found, not fed again


def test_nothing_is_lost_of_what_was_fed(engine: Engine, tmp_path: Path) -> None:
    lines, _ = measure(engine, tmp_path, [Setting("session")])
    told = lines[0]["record"]
    assert told["fed"] == told["kept"] == 48 and told["equal"]
    assert told["searched"] == told["found"] == 48
    assert told["turns"] == told["recallable"] == 24
    assert told["tried"] == told["came"] > 10


def test_what_is_lost_is_seen(engine: Engine) -> None:
    history = long(8)
    with new_conversation(engine, Config.load(overrides=SETTINGS), Residence) as conversation:
        assert [*fed(conversation, history, [8], lambda _: None)] == [8]
        conversation.save()
        said = conversation.path[-1]
        assert is_found(conversation, conversation.path, len(conversation.path) - 1)
        odd = replace(said, content="words that nobody said")
        assert not is_found(conversation, [*conversation.path[:-1], odd], len(conversation.path) - 1)
        assert not record(conversation, replace(history, turns=history.turns[:-1]), 3, 0)["equal"]
        whole, bounds = stored_whole(conversation.residence), conversation.residence.bounds(conversation.path)
        assert can_be_had(conversation, whole, bounds[1], bounds[3])
        assert not can_be_had(conversation, whole[1:], bounds[1], bounds[3])


def test_memory_is_told_where_the_system_tells_it() -> None:
    if Path("/proc/self/statm").is_file():
        assert resident_bytes() > 50 << 20


# -- recall ----------------------------------------------------------------------------------------------------------


def test_what_a_question_brings_back_is_told_and_leaves_again(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def recall(self: Residence, path: Any) -> Any:
        asked.append(path)
        self.tiers.hold({one.id: one.header.ranking.num_chunks for one in self.tiers.residents})
        yield from ()

    monkeypatch.setattr(Residence, "recall", recall)
    history = planted(engine)
    with new_conversation(engine, Config.load(overrides=SETTINGS), Residence) as conversation:
        for _ in fed(conversation, history, [len(history.turns)], lambda _: None):
            conversation.save()
            pairs, cache = conversation.residence.cache.num_sealed_rows, conversation.residence.cache
            shares = held(conversation.residence)
            with recalled(conversation, "What?") as brought:
                assert cache.num_sealed_rows > pairs
                assert set(brought.held.values()) == {1.0} and brought.seconds > 0
                assert {*brought.starts} == {start for start, share in shares.items() if share < 1.0}
                assert brought.share(0) == brought.share(cache.tail_start) == 1.0 and brought.share(1) == 0.0
                starts = [entry.start for entry in conversation.residence.known]
                assert start_of(conversation.residence, starts[1] - 1) == starts[0]
                assert start_of(conversation.residence, cache.num_seen) == cache.tail_start
            assert cache.num_sealed_rows == pairs and held(conversation.residence) == shares
            told = answer_with_recall(conversation, history.questions[0])
            assert cache.num_sealed_rows == pairs and told.brought.starts and told.first_s > 0
            assert "match" in told.figures
    assert [message.content for message in asked[0][-1:]] == ["What?"] and asked[0][:-1] == conversation.path


def test_a_baseline_recalls_nothing(engine: Engine) -> None:
    with new_conversation(engine, Config.load(overrides=SETTINGS), Full) as conversation:
        conversation.begin(None)
        assert asking(conversation, "a")[-1].content == "a"
        with recalled(conversation, "a") as brought:
            assert not brought.starts and brought.seconds == 0


# -- work and caps ---------------------------------------------------------------------------------------------------


def test_forward_passes_are_counted(engine: Engine) -> None:
    cache = engine.new_cache()
    with counting(engine) as work:
        engine.forward(cache, [1, 2, 3])
        assert work.tokens == 3
        engine.greedy(cache, [4, 5], 1)
        assert work.tokens == 5
    engine.forward(cache, [1])
    assert work.tokens == 5


def test_a_turn_more_costs_the_session_the_same_and_epicache_the_history_again(small: Engine) -> None:
    history, config = long(24), Config.load(overrides=SETTINGS)
    probes = [8, 16, 24]
    ours = added(small, config, Residence, history, probes)
    theirs = added(small, config, EpiCache, history, probes)
    turn = ours[0].history / 8
    assert [one.turns for one in ours] == probes and all(one.ready == 0 for one in ours)
    assert all(turn < one.tokens < 4 * turn for one in ours)
    assert all(one.ready >= 4 * one.history for one in theirs)
    assert theirs[-1].all - theirs[-1].ready == theirs[-1].tokens < turn


@pytest.mark.parametrize("method", ["window", "recompress", "epicache"])
def test_baselines_keep_to_a_cap(small: Engine, method: str) -> None:
    config = Config.load(overrides={**SETTINGS, "compress.kv_budget": "300 rows", "compress.keep_ratio": 1.0})
    assert settings_of([method], {}, config)
    with new_conversation(small, config, METHODS[method]) as conversation:
        for _ in fed(conversation, long(16), range(1, 17), lambda _: None):
            residence = conversation.residence
        assert rows_a_head(residence, conversation.path) == 300
        cache, each = residence.cache, small.model.pairs_per_token
        if isinstance(residence, EpiCache):
            with residence.asked(conversation.path):
                residence.choose("x")
                assert residence.cache.num_sealed_rows == 300 * each
        else:
            assert isinstance(residence, Masked)
            assert cache.num_sealed_rows + cache.tail_length * each <= (300 + 160) * each


# -- the command -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("word", ["far", "work"])
def test_the_commands_are_there(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", word, "--help"]) == 0
    assert "--cap" in capsys.readouterr().out


# -- what a re-base costs --------------------------------------------------------------------------------------------


def test_replies_are_foretold_with_and_without_a_rebase(engine: Engine) -> None:
    config = Config.load(overrides={**SETTINGS, "compress.kv_budget": "256 rows", "recall.by": "off"})
    found = costs(engine, config, long(40), 1024)
    assert [one.when for one in found] == ["before", "right after one", "all after"]
    before, first, after = found
    assert before.rebases == 0 and before.rise == before.error == 0.0 and before.rows == before.rows_rebased
    assert first.rebases == after.rebases > 1 and first.replies == first.rebases < after.replies
    assert before.replies + after.replies == 39
    assert after.after / after.before == pytest.approx(1 + after.rise, abs=1e-3)


def test_a_window_that_is_not_filled_has_no_cost_to_tell(engine: Engine) -> None:
    config = Config.load(overrides={**SETTINGS, "recall.by": "off"})
    with pytest.raises(InputError, match="trip does not fill a window of 2000 tokens"):
        costs(engine, config, long(4), 2000)
    with pytest.raises(InputError, match="--window must be below the model's own"):
        costs(engine, config, long(4), 1 << 20)
