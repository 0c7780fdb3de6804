"""Conversations without end: re-based positions, a limit of memory, recall, and what is lost long ago.

The reference takes the rows that are to be held straight from the store, turns their keys with an arithmetic of its
own, and attends to them head by head.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor

from kvchat import probe
from kvchat.branching import fork, questions
from kvchat.cache.layer import Piece
from kvchat.cache.segment import LayerKV
from kvchat.codecs import decode_frame
from kvchat.config import Config
from kvchat.engine import Engine
from kvchat.errors import CapacityError, OutOfMemory
from kvchat.events import Notice, TurnDone
from kvchat.residence.catalogue import positions
from kvchat.residence.residence import Residence
from kvchat.residence.sealing import read_header
from kvchat.session import Conversation
from kvchat.store.store import Store
from tests.tiny import make_model

WINDOW = 512
PROBE = [5, 80, 33, 200]


def settled(**more: Any) -> Config:
    plain = {"compress.segment_min": 40, "compress.recent_tokens": 60, "compress.scorer": "random"}
    return Config().replaced({**plain, "generate.max_new_tokens": 8, "generate.temperature": 0.0, **more})


@contextmanager
def conversation(store: Store, engine: Engine, config: Config, name: str = "far") -> Iterator[Conversation]:
    if name not in {info.name for info in store.sessions()}:
        store.create_session(name, engine.model.name, engine.model.fingerprint)
    info = store.session(name)
    with ThreadPoolExecutor(1) as pool:
        yield Conversation(info, store, engine, Residence(store, engine, config, pool, info.id))


def say(one: Conversation, number: int, length: int = 10) -> list[Any]:
    """A turn of some 50 tokens."""
    answer = f"It is {number * 37 % 101}, {'x' * length}."
    messages = [{"role": "user", "content": f"word{number}?"}, {"role": "assistant", "content": answer}]
    events = [*one.append(messages, lambda: False), *one.finish()]
    one.save()
    return events


def ask(one: Conversation, text: str) -> TurnDone:
    events = [*one.send(text, one.residence.config.generate, lambda: False, 0.0), *one.finish()]
    one.save()
    return next(event for event in events if isinstance(event, TurnDone))


def new_engine(family: str = "llama", window: int = WINDOW, **shape: Any) -> Engine:
    return Engine(replace(make_model(family, **shape), context_window=window), 64)


@pytest.fixture(params=["llama", "qwen3", "phi3"])
def engine(request: pytest.FixtureRequest) -> Engine:
    return new_engine(request.param)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with closing(Store(tmp_path / "far.db")) as store:
        yield store


def logits(one: Conversation, ids: list[int] = PROBE) -> Tensor:
    cache = one.residence.cache
    with cache.scratch():
        return one.engine.forward(cache, ids, logits=len(ids))


def turned(keys: Tensor, by: int, theta: float) -> Tensor:
    """Rotate-half RoPE in float64."""
    dim = keys.shape[-1]
    angle = by * theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    one, other = keys.double().chunk(2, -1)
    return torch.cat([one * angle.cos() - other * angle.sin(), other * angle.cos() + one * angle.sin()], -1)


def expected(one: Conversation) -> list[list[tuple[Tensor, Tensor]]]:
    """Of every layer and head the sealed rows that are to be held, from the store, where they are to stand."""
    residence, model = one.residence, one.engine.model
    held = {resident.id: resident.chunks for resident in residence.tiers.residents}
    parts = {resident.id: resident.part for resident in residence.tiers.residents}
    there = [entry for entry in residence.known if held.get(entry.id)]
    rows: list[list[list[tuple[Tensor, Tensor]]]] = [
        [[] for _ in range(model.num_key_value_heads)] for _ in range(model.num_hidden_layers)
    ]
    theta = float(model.config.rope_parameters["rope_theta"])
    back = {e.start: residence.recalled[e.start].spans for e in there if e.start in residence.recalled}
    spans = {e.start: [*parts[e.id].spans] or [(e.start, e.end)] for e in there}
    plain = [
        e.stretch(low, high) for e in there for low, high in spans[e.start] if (low, high) not in back.get(e.start, ())
    ]
    stands = {e.start: p for e, p in zip(plain, positions(plain, residence.offset), strict=True)}
    told_again = residence.asked_at - residence.offset
    for low, high in [span for e in there for span in back.get(e.start, ())]:
        stands[low] = told_again
        told_again += high - low
    for entry, (low, high) in [(e, span) for e in there for span in spans[e.start]]:
        record = one.store.segment(entry.id)
        assert record is not None
        header, by = read_header(record, model), stands[low] - (low - entry.offset)
        for chunk, group, blob in one.store.frames(entry.id, range(held[entry.id])):
            decoded = decode_frame(header, chunk, group, blob, model.device)
            for layer, kv in zip(range(*header.layers(group)), decoded, strict=True):
                for head, (first, last) in enumerate(pairwise(kv.bounds)):
                    places = kv.positions[first:last]
                    use = (places >= low) & (places < min(high, entry.end))
                    keys = turned(kv.keys[first:last][use], by, theta)
                    rows[layer][head].append((keys, kv.values[first:last][use]))
    empty = torch.zeros(0, model.head_dim, dtype=torch.float64)
    return [
        [tuple(torch.cat([empty, *(part[side].double() for part in parts)]) for side in (0, 1)) for parts in layer]  # type: ignore[misc]
        for layer in rows
    ]


def reference(one: Conversation, ids: list[int] = PROBE) -> Tensor:
    """Logits over rows from the store, in a cache of its own in which nothing is turned."""
    engine, cache = one.engine, one.residence.cache
    plain = engine.new_cache()
    layers = []
    for heads in expected(one):
        keys, values = (torch.cat([head[side] for head in heads]).float() for side in (0, 1))
        bounds = torch.tensor([0, *(len(head[0]) for head in heads)]).cumsum(0).int()
        layers.append(LayerKV(keys, values, torch.zeros(len(keys), dtype=torch.int32), bounds))
    # Where it ends is what positions are counted from.
    if cache.tail_start:
        plain.attach({Piece(0, 0): layers}, cache.tail_start)
    plain.append_tail([layer.tail() for layer in cache.layers])
    plain.offset, plain.gap = cache.offset, cache.gap
    return engine.forward(plain, ids, logits=len(ids))


def assert_as_reference(one: Conversation) -> None:
    torch.testing.assert_close(logits(one), reference(one), atol=2e-3, rtol=2e-3)


def test_a_conversation_goes_on_beyond_the_window_and_is_resumed_bit_for_bit(engine: Engine, store: Store) -> None:
    with conversation(store, engine, settled()) as live:
        live.begin("Be brief.")
        events = [event for number in range(60) for event in say(live, number)]
        cache = live.residence.cache
        assert cache.num_seen > 4 * WINDOW and cache.position < WINDOW and cache.offset
        assert any(isinstance(event, Notice) and "goes on at position" in event.text for event in events)
        with conversation(store, engine, settled()) as again:
            for _ in again.restore():
                pass
            assert again.residence.cache.num_seen == cache.num_seen and again.residence.cache.offset == cache.offset
            assert not again.residence.num_computed
            assert torch.equal(logits(again), logits(live))


def test_logits_after_a_rebase_are_those_of_rows_that_stood_there_from_the_start(engine: Engine, store: Store) -> None:
    with conversation(store, engine, settled(**{"codec.name": "raw"})) as one:
        one.begin("Be brief.")
        offsets = set[int]()
        for number in range(40):
            say(one, number)
            offset = one.residence.cache.offset
            if offset not in offsets or number % 3 == 0:
                assert_as_reference(one)
            offsets.add(offset)
        assert len(offsets) > 3
        shifted = one.residence.cache.layers[0].shifts
        assert len(set(shifted.values())) > 1  # gaps were closed, the newest turns keep their distance


def test_all_moved_alike_is_the_model_run_at_those_positions_from_the_start(engine: Engine, store: Store) -> None:
    keep = {"compress.keep_ratio": 1.0, "codec.name": "raw"}
    with conversation(store, engine, settled(**keep)) as one:
        for number in range(5):
            say(one, number)
        cache, ids = one.residence.cache, one.residence.ids(one.path)
        cache.arrange(dict.fromkeys({piece.start for piece in cache.pieces}, -37), 37)
        plain = engine.new_cache()
        plain.offset = 37  # so the first token stands at -37: RoPE knows distances only
        dense = engine.forward(plain, [*ids, *PROBE], logits=len(PROBE))
        torch.testing.assert_close(logits(one), dense, atol=2e-3, rtol=2e-3)


def test_many_rebases_leave_no_drift(store: Store) -> None:
    engine = new_engine(dtype=torch.bfloat16)
    with conversation(store, engine, settled()) as one:
        one.begin("Be brief.")
        for number in range(30):
            say(one, number)
        cache, before = one.residence.cache, logits(one)
        shifts, offset = dict(cache.layers[0].shifts), cache.offset
        assert (shifts and cache.tail_length == 0) or shifts
        rows = [layer.sealed.keys.clone() for layer in cache.layers]
        for step in range(200):
            cache.arrange({start: by - step % 90 for start, by in shifts.items()}, offset)
            _ = [layer.sealed for layer in cache.layers]
        cache.arrange(shifts, offset)
        assert all(torch.equal(layer.sealed.keys, old) for layer, old in zip(cache.layers, rows, strict=True))
        assert torch.equal(logits(one), before)


def watch_memory(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Rows a head, on average, that are in memory once a forward pass has added its own."""
    seen: list[float] = []
    forward, observe = engine._forward, engine.observe

    def rows(cache: Any) -> float:
        return float(cache.num_sealed_rows / engine.model.pairs_per_token + cache.tail_length)

    def watched(cache: Any, ids: Any, count: int) -> Tensor:
        found = forward(cache, ids, count)
        seen.append(rows(cache))
        assert cache.position <= engine.model.context_window
        return found

    def watched_too(cache: Any, ids: Any, tap: Any, start: int | None = None) -> None:
        observe(cache, ids, tap, start)
        seen.append(rows(cache) + (len(ids) if start is None else 0))

    monkeypatch.setattr(engine, "_forward", watched)
    monkeypatch.setattr(engine, "observe", watched_too)
    return seen


@pytest.mark.parametrize("budget", ["330 rows", "260 kB"])
def test_a_limit_of_memory_holds_at_every_moment(store: Store, monkeypatch: pytest.MonkeyPatch, budget: str) -> None:
    engine = new_engine()
    config = settled(**{"compress.kv_budget": budget, "compress.scorer": "kvzip", "compress.keep_ratio": 1.0})
    token = engine.model.pairs_per_token * engine.model.bytes_per_pair
    most = 330 if "rows" in budget else 260_000 / token
    with conversation(store, engine, config) as one:
        seen = watch_memory(engine, monkeypatch)
        for number in range(25):
            say(one, number)
            if number % 6 == 5:
                assert ask(one, f"What of word{number - 5}?").usage.recalled
        assert max(seen) <= most
        assert max(seen) > 0.6 * most
        with pytest.raises(CapacityError, match="does not fit"):
            one.take([{"role": "user", "content": "x" * 200}])


def test_recall_brings_the_right_turn_and_leaves_no_trace(engine: Engine, store: Store) -> None:
    with conversation(store, engine, settled(**{"compress.kv_budget": "300 rows"})) as one:
        one.begin("Be brief.")
        for number in range(40):
            say(one, number)
        residence, before, rows = one.residence, logits(one), one.residence.cache.num_sealed_rows
        start = residence.known[5].start
        asked = next(message for message in one.path if message.role == "user" and one.path.index(message) > 0)
        assert start not in {resident.start for resident in residence.tiers.residents}
        bounds = residence.bounds(one.path)
        wanted = next(m for m, low in zip(one.path, bounds, strict=False) if low >= start and m.role == "user")
        question = [*one.path, replace(asked, content=wanted.content)]
        for _ in residence.recall(question):
            pass
        assert start in residence.recalled
        assert any(resident.start == start for resident in residence.tiers.residents)
        assert not torch.equal(logits(one), before)
        assert_as_reference(one)
        residence.recalled = {}
        residence.hold(one.path)
        assert torch.equal(logits(one), before) and residence.cache.num_sealed_rows == rows


def test_a_question_that_concerns_nothing_in_particular_brings_nothing_back(store: Store) -> None:
    with conversation(store, new_engine(), settled()) as one:
        for number in range(20):
            say(one, number)
        assert ask(one, "zzz qqq").usage.recalled == ()


def test_what_is_recalled_is_told_and_used_again_after_resuming(store: Store) -> None:
    engine, config = new_engine(), settled(**{"compress.kv_budget": "300 rows"})
    with conversation(store, engine, config) as one:
        for number in range(40):
            say(one, number)
        done = ask(one, "What of word3?")
        assert done.usage.recalled
        live = logits(one)
    with conversation(store, engine, config) as again:
        for _ in again.restore():
            pass
        assert tuple(again.path[-1].usage["recalled"]) == done.usage.recalled  # type: ignore[index]
        assert torch.equal(logits(again), live)


def test_a_long_gone_segment_that_is_damaged_is_said_and_the_conversation_goes_on(store: Store) -> None:
    engine, config = new_engine(), settled()
    with conversation(store, engine, config) as one:
        for number in range(60):
            say(one, number)
        lost, seen = one.residence.known[6], one.residence.cache.num_seen
    store.drop_segment(lost.id)
    with conversation(store, engine, config) as again:
        for _ in again.restore():
            pass
        assert again.residence.cache.num_seen == seen and not again.residence.num_computed
        assert [entry.start for entry in again.residence.known if entry.lost] == [lost.start]
        assert_as_reference(again)
        say(again, 61)
        assert_as_reference(again)


def test_frames_damaged_long_ago_cost_that_segment_alone(store: Store) -> None:
    engine, config = new_engine(), settled()
    with conversation(store, engine, config) as one:
        for number in range(60):
            say(one, number)
        damaged = one.residence.known[6]
        word = next(m for m, low in zip(one.path, one.residence.bounds(one.path), strict=False) if low >= damaged.start)
        store._db.execute("UPDATE frames SET body = zeroblob(length(body)) WHERE segment_id = ?", [damaged.id])
        store._db.conn.commit()
        events = [*one.send(word.content, one.residence.config.generate, lambda: False, 0.0), *one.finish()]
        done = next(event for event in events if isinstance(event, TurnDone))
        assert damaged.start not in done.usage.recalled
        assert next(entry for entry in one.residence.known if entry.start == damaged.start).lost
        told = [*events, *one.residence.notices]
        assert any("damaged" in event.text for event in told if isinstance(event, Notice))
        assert_as_reference(one)


def test_turns_that_are_damaged_together_are_computed_again_and_come_back(store: Store) -> None:
    config = settled(**{"compress.keep_ratio": 0.2, "recall.turns": 3})
    with conversation(store, new_engine(window=4096), config) as one:
        one.begin("Be brief.")
        for number in range(8):
            say(one, number, 40)
        damaged = [one.residence.known[at] for at in (1, 2, 4)]
        for entry in damaged:  # of which memory holds the first chunk
            sql = "UPDATE frames SET body = zeroblob(length(body)) WHERE segment_id = ? AND chunk > 0"
            store._db.execute(sql, [entry.id])
        store._db.conn.commit()
        done = ask(one, "What of word1, word2 and word4?")
        assert {*done.usage.recalled} == {entry.start for entry in damaged}
        assert_as_reference(one)


def test_rewinding_past_a_rebase_goes_on_as_if_it_had_not_been(store: Store) -> None:
    engine, config = new_engine(), settled()
    with conversation(store, engine, config) as one:
        for number in range(60):
            say(one, number)
        one.rewind(one.user_index(25))
        for _ in one.restore():
            pass
        assert_as_reference(one)
        live = logits(one)
    with conversation(store, engine, config) as again:
        for _ in again.restore():
            pass
        assert torch.equal(logits(again), live)


def test_a_model_without_rope_keeps_its_window(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = new_engine()
    monkeypatch.setattr(type(engine.anatomy), "turns", False)
    with conversation(store, engine, settled()) as one, pytest.raises(CapacityError, match="does not fit"):
        for number in range(60):
            say(one, number)
    assert one.residence.cache.offset == 0


def test_a_question_as_long_as_may_be_is_not_refused_for_what_it_brings_back(store: Store) -> None:
    engine = new_engine()
    template = engine.model.template
    around = len(template.generation_prompt) + len(template.assistant_close)
    with conversation(store, engine, settled()) as one:
        one.begin(f"Be brief. {'x' * 80}")
        for number in range(24):
            say(one, number, 80 + 3 * number)
            if number > 16:
                room = one.residence.longest(one.num_tokens, one.path) - 2 * around - 40
                done = ask(one, f"word{number % 7} {'x' * room}")
                assert done.usage.completion_tokens and one.residence.cache.position <= WINDOW


def test_a_deep_check_compares_an_answer_beyond_the_window_too(store: Store) -> None:
    engine, config = new_engine(window=2 * WINDOW), settled()
    with conversation(store, engine, config) as one:
        number = 0
        while one.num_tokens <= 2 * WINDOW:  # and no more, so that there is room for the question
            say(one, number := number + 1)
        assert one.residence.cache.offset
        assert [probe.check(one).outcome for _ in range(2)] == ["recorded", "same"]
        state = probe.state_of(one)
        one.residence.cache.arrange({}, one.residence.offset - 1)
        assert probe.state_of(one) != state
    with conversation(store, engine, config) as again:
        assert probe.check(again).outcome == "same"


def test_a_portable_header_tells_where_keys_were_computed(store: Store) -> None:
    engine = new_engine()
    with conversation(store, engine, settled()) as one:
        for number in range(40):
            say(one, number)
        entry = one.residence.known[-1]
        record = store.segment(entry.id)
        assert record is not None and entry.offset
        assert read_header(record, engine.model).ranking.offset == entry.offset
        assert json.loads(json.dumps(entry.offset)) == entry.offset


class Interleaved(RuleBasedStateMachine):
    """Turns, questions, forks, rewinds and offloading in any order, against rows taken from the store."""

    def __init__(self) -> None:
        super().__init__()
        self.undo, self.turns, self.forks = ExitStack(), 0, 0
        folder = self.undo.enter_context(TemporaryDirectory())
        self.store = self.undo.enter_context(closing(Store(Path(folder) / "far.db")))
        self.engine = new_engine(window=256, layers=2)

    @initialize(budget=st.sampled_from(["", "280 rows"]), codec=st.sampled_from(["raw", "k8v8"]))
    def begin(self, budget: str, codec: str) -> None:
        self.config = settled(**{"compress.kv_budget": budget, "codec.name": codec, "compress.segment_min": 30})
        self.one = self.undo.enter_context(conversation(self.store, self.engine, self.config))
        self.one.begin("Be brief.")

    @rule(count=st.integers(1, 6), length=st.integers(0, 40))
    def say(self, count: int, length: int) -> None:
        for _ in range(count):
            self.turns += 1
            say(self.one, self.turns, length)

    @precondition(lambda self: self.turns)
    @rule(data=st.data())
    def ask(self, data: st.DataObject) -> None:
        ask(self.one, f"word{data.draw(st.integers(1, self.turns))}")

    @precondition(lambda self: self.turns)
    @rule(data=st.data())
    def recall_and_leave(self, data: st.DataObject) -> None:
        before = logits(self.one)
        named = self.one.path[-1]
        number = data.draw(st.integers(1, self.turns))
        for _ in self.one.residence.recall([*self.one.path, replace(named, role="user", content=f"word{number}")]):
            pass
        assert_as_reference(self.one)
        self.one.residence.recalled = {}
        self.one.residence.hold(self.one.path)
        assert torch.equal(logits(self.one), before)

    @precondition(lambda self: len(questions(self.one.path)) > 3)
    @rule(data=st.data())
    def rewind(self, data: st.DataObject) -> None:
        self.one.rewind(self.one.user_index(data.draw(st.integers(1, 3))))
        for _ in self.one.restore():
            pass

    @precondition(lambda self: self.turns)
    @rule()
    def fork(self) -> None:
        self.forks += 1
        name = f"fork{self.forks}"
        fork(self.one, name, None)
        live = logits(self.one)
        self.one = self.undo.enter_context(conversation(self.store, self.engine, self.config, name))
        for _ in self.one.restore():
            pass
        assert torch.equal(logits(self.one), live)

    @precondition(lambda self: self.turns)
    @rule()
    def offload(self) -> None:
        before = logits(self.one)
        self.one.residence.let_go()
        for _ in self.one.restore():
            pass
        assert torch.equal(logits(self.one), before)

    @invariant()
    def rows_stand_where_they_should(self) -> None:
        if self.turns:
            assert self.one.residence.cache.position <= 256
            assert_as_reference(self.one)

    def teardown(self) -> None:
        self.undo.close()


Interleaved.TestCase.settings = settings(
    max_examples=8, stateful_step_count=12, deadline=None, suppress_health_check=list(HealthCheck)
)
TestInterleaved = Interleaved.TestCase


def test_damage_that_cannot_be_removed_does_not_keep_a_question_waiting(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = new_engine(window=4 * WINDOW)
    with conversation(store, engine, settled()) as one:
        for number in range(20):
            say(one, number)
        recall, asked = one.residence.recall, list[int]()

        def damaged(path: Any) -> Iterator[Any]:
            """Always meets damage, as where the store cannot remove it."""
            asked.append(len(path))
            yield from recall(path)
            one.residence.cut(one.residence.cache.num_seen - 1)

        monkeypatch.setattr(one.residence, "recall", damaged)
        assert ask(one, "word3?").usage.recalled == ()
        assert len(asked) == 8


def again(one: Conversation) -> TurnDone:
    """Have the newest question answered once more; what it brings back is still there."""
    one.rewind(one.user_index(1) + 1)
    events = [*one.answer(one.residence.config.generate, lambda: False, 0.0)]
    return next(event for event in events if isinstance(event, TurnDone))


@pytest.mark.parametrize("least", [40, 100])
def test_a_question_answered_once_more_stands_behind_what_it_brings_back(store: Store, least: int) -> None:
    config = settled(**{"compress.kv_budget": "400 rows", "compress.segment_min": least})
    with conversation(store, new_engine(), config) as one:
        one.begin("Be brief.")
        number = 0
        while number < 40 or one.residence.cache.tail_length:
            say(one, number := number + 1)
        done = ask(one, "What of word3?")
        assert bool(one.residence.waiting) == (least == 100)  # sealed with the question, or still exact
        more = again(one)
        assert more.usage.recalled == done.usage.recalled != () and more.text == done.text
        assert one.residence.asked_at == one.residence.bounds(one.path)[-3]


def concern(one: Conversation, text: str) -> None:
    """Bring back what a question that is not asked concerns."""
    for _ in one.residence.recall([*one.path, replace(one.path[-1], role="user", content=text)]):
        pass


def places(one: Conversation) -> set[int]:
    forms = [form for layer in one.residence.cache.layers for form in layer.forms]
    return {place for form in forms for place in form.positions.tolist()}


def test_the_system_prompt_stays_when_a_turn_right_after_it_comes_back(store: Store) -> None:
    with conversation(store, new_engine(), settled(**{"compress.kv_budget": "300 rows"})) as one:
        one.begin("Be brief.")
        for number in range(40):
            say(one, number)
        prompt = set(range(one.residence.bounds(one.path)[1]))
        concern(one, "word0?")
        assert 0 in one.residence.recalled and prompt <= places(one)
        assert_as_reference(one)


def test_the_newest_segments_stay_where_they_are_whatever_is_asked(store: Store) -> None:
    more = {"compress.kv_budget": "500 rows", "compress.segment_min": 120, "compress.recent_tokens": 200}
    with conversation(store, new_engine(window=1024), settled(**more)) as one:
        one.begin("Be brief.")
        for number in range(60):
            say(one, number)
        residence, before = one.residence, places(one)
        newest = {place for place in before if place >= residence.known[-1].start}
        low = residence.bounds(one.path).index(residence.known[-1].start)
        asked = next(message.content for message in one.path[low:] if message.role == "user")
        concern(one, f"{asked} word3?")
        assert residence.recalled and residence.known[-1].start not in residence.recalled and newest <= places(one)


def no_memory(*_: object) -> None:
    raise torch.OutOfMemoryError("out of memory")


@pytest.mark.parametrize("layer", [0, 1])
def test_no_memory_for_what_comes_leaves_nothing_of_what_was_to_go(
    store: Store, monkeypatch: pytest.MonkeyPatch, layer: int
) -> None:
    with conversation(store, new_engine(), settled(**{"compress.kv_budget": "300 rows"})) as one:
        one.begin("Be brief.")
        for number in range(40):
            say(one, number)
        residence, before = one.residence, logits(one)
        with monkeypatch.context() as patch:
            patch.setattr(residence.cache.layers[layer], "exchange", no_memory)
            concern(one, "word35?")  # part of it is there, at another place
        assert residence.short and residence.recalled and residence.tiers.is_tidy and residence.cache.is_whole
        assert_as_reference(one)
        residence.recalled = {}
        residence.hold(one.path)
        assert torch.equal(logits(one), before)


def test_a_tail_that_is_turned_in_some_layers_only_is_let_go(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    with conversation(store, new_engine(), settled(**{"compress.segment_min": 100})) as one:
        one.begin("Be brief.")
        number = 0
        while not (one.residence.offset and one.residence.cache.tail_length):
            say(one, number := number + 1)
        residence, before = one.residence, logits(one)
        with monkeypatch.context() as patch:
            patch.setattr(residence.cache.layers[1], "_turn", no_memory)
            residence.offset += 16
            with pytest.raises(OutOfMemory):
                residence.arrange()
        assert not residence.cache.num_seen
        for _ in one.restore():
            pass
        torch.testing.assert_close(logits(one), before, atol=2e-3, rtol=2e-3)


def test_a_limit_of_memory_holds_while_turns_wait_to_be_sealed(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = new_engine(window=4 * WINDOW)
    with conversation(store, engine, settled(**{"compress.kv_budget": "330 rows", "compress.segment_min": 512})) as one:
        seen = watch_memory(engine, monkeypatch)
        for number in range(12):
            say(one, number)
        assert 250 < max(seen) <= 330
        # Two messages of which each has room, but not both at once.
        one.take([{"role": "user", "content": "a" * 50}, {"role": "assistant", "content": "b" * 125}])
        assert ask(one, "word3?").usage.completion_tokens
        assert max(seen) <= 330


def test_a_limit_of_memory_holds_while_attention_chooses(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = new_engine(window=2 * WINDOW)
    with conversation(store, engine, settled(**{"compress.kv_budget": "330 rows", "recall.by": "attention"})) as one:
        for number in range(20):
            say(one, number)
        seen = watch_memory(engine, monkeypatch)
        ask(one, f"word3 {'x' * 110}")
        assert 250 < max(seen) <= 330


def test_scoring_an_answer_leaves_no_less_than_is_held_after_resuming(store: Store) -> None:
    config = settled(**{"compress.kv_budget": "330 rows", "compress.scorer": "kvzip", "compress.keep_ratio": 1.0})
    engine = new_engine()
    with conversation(store, engine, config) as one:
        for number in range(12):
            say(one, number)
        ask(one, "x" * 20)
        assert not one.residence.cache.tail_length  # sealed with the answer
        with conversation(store, engine, config) as resumed:
            for _ in resumed.restore():
                pass
            assert torch.equal(logits(resumed), logits(one))


def test_no_positions_stay_free_for_what_turns_out_to_be_damaged(store: Store) -> None:
    with conversation(store, new_engine(), settled(**{"compress.kv_budget": "300 rows"})) as one:
        one.begin("Be brief.")
        for number in range(40):
            say(one, number)
        residence = one.residence
        concern(one, "word12?")
        back = next(iter(residence.recalled.values()))
        assert residence.cache.gap.length == back.length
        held = {one.id: one.chunks for one in residence.tiers.residents}
        assert held[back.entry.id] > 1
        residence.tiers.hold(held | {back.entry.id: 1})
        update = "UPDATE frames SET body = zeroblob(length(body)) WHERE segment_id = ? AND chunk > 0"
        store._db.execute(update, [back.entry.id])
        store._db.conn.commit()
        residence.hold(one.path)
        assert not residence.recalled and not residence.cache.gap.length
        assert_as_reference(one)
