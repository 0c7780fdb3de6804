"""A long answer held to a number of rows: what it attends to meanwhile, and that every row comes back."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, DynamicCache

from kvchat.cache.aside import Aside
from kvchat.cache.ragged import SegmentedCache
from kvchat.cap import BUFFER, SINKS, Cap, best
from kvchat.compress.scorers.rkv import OBSERVING
from kvchat.config import Config
from kvchat.engine import Engine
from kvchat.errors import ConfigError
from kvchat.events import Notice
from kvchat.model import Model
from kvchat.supported import cache_keyword
from tests.scarcity import ALWAYS, Scarcity
from tests.store_parts import copy_of
from tests.test_correct import Played
from tests.test_session import Open, opener, probe  # noqa: F401, a fixture
from tests.tiny import make_model

ROWS = 2 * BUFFER
CUDA = torch.cuda.is_available()


@pytest.fixture
def engine(tiny_model: Model) -> Engine:
    return Engine(tiny_model, 512)


def never() -> bool:
    return False


class Answer:
    """An answer under a cap, and all that was computed for it, token by token."""

    def __init__(self, engine: Engine, cache: SegmentedCache, prompt: Sequence[int], rows: int, stop: Any = never):
        self.engine, self.cache, self.start = engine, cache, cache.num_seen
        self.ids, self.prompt = list[int](), list(prompt)
        self.logits = [engine.forward(cache, prompt)[-1]]
        self.computed = [[part.clone() for part in layer.tail()] for layer in cache.layers]
        self.rows = list[int]()
        self.running = engine.decode(cache, self.logits[0], self._sample, (), stop, rows)

    def _sample(self, logits: Tensor) -> Tensor:
        """Tokens that repeat little, whatever the network says."""
        if len(self.rows):
            self.logits.append(logits)
            for layer, computed in zip(self.cache.layers, self.computed, strict=True):
                for index, part in enumerate(layer.tail()):
                    computed[index] = torch.cat([computed[index], part[:, -1:]], 1)
        self.rows.append(self.cache.tail_length)
        return logits[:250].topk(4).indices[len(self.rows) % 4][None]

    def take(self, most: int) -> list[int]:
        with closing(self.running) as tokens:
            self.ids += islice(tokens, most)
        return self.ids

    def assert_whole(self) -> None:
        """The cache stands for all tokens but the last, with the rows that were computed for them."""
        assert self.cache.num_seen == self.start + len(self.prompt) + len(self.ids) - 1
        assert not any(layer.aside for layer in self.cache.layers)
        length = self.cache.tail_length
        for layer, computed in zip(self.cache.layers, self.computed, strict=True):
            for now, then in zip(layer.tail(), computed, strict=True):
                assert torch.equal(now, then[:, :length])


@pytest.fixture
def retained(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[int, int], Tensor]:
    """By layer and number of tokens then in the tail: which of them each head kept, (H, R)."""
    kept: dict[tuple[int, int], Tensor] = {}
    put = Aside.put

    def spied(self: Aside, index: int, rows: Tensor) -> None:
        put(self, index, rows)
        layer = self._layers[index]
        kept[index, layer.tail_length + layer.aside] = self.tokens(index)

    monkeypatch.setattr(Aside, "put", spied)
    return kept


def plain_logits(engine: Engine, ids: Sequence[int], kept: dict[tuple[int, int], Tensor]) -> Tensor:
    """Logits of every token in one dense pass, in which a head does not see what it had put aside by then."""
    network = engine.model.network

    def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, **_: Any) -> Any:
        heads, length, groups = key.shape[1], key.shape[2], query.shape[1] // key.shape[1]
        seen = torch.ones(heads, length, length, dtype=torch.bool).tril()
        for (layer, tokens), rows in kept.items():
            if layer == module.layer_idx:
                here = torch.zeros(heads, tokens, dtype=torch.bool).scatter_(1, rows, True)
                seen[:, tokens:, :tokens] &= here[:, None]
        key, value, seen = (part.repeat_interleave(groups, 0) for part in (key[0], value[0], seen))
        weights = (query[0] @ key.mT * scaling).masked_fill(~seen, -torch.inf).softmax(-1)
        return (weights @ value).transpose(0, 1)[None], None

    AttentionInterface.register("plain_rows", attention)
    before = network.config._attn_implementation
    network.set_attn_implementation("plain_rows")
    try:
        with torch.inference_mode():
            cache = DynamicCache(config=network.config)
            return network(
                input_ids=torch.tensor([list(ids)]), use_cache=True, **{cache_keyword(network): cache}
            ).logits[0]
    finally:
        network.set_attn_implementation(before)


@pytest.mark.parametrize(("prompt", "compactions"), [(40, 2), (290, 4)], ids=["short", "longer than the cap"])
def test_an_answer_attends_to_the_rows_that_each_head_keeps(
    engine: Engine, retained: dict[tuple[int, int], Tensor], prompt: int, compactions: int
) -> None:
    ids = [(7 * i) % 250 for i in range(prompt)]
    answer = Answer(engine, engine.new_cache(), ids, ROWS)
    answer.take(420)
    times = sorted({tokens for _, tokens in retained})
    assert len(times) == compactions and len(retained) == 3 * compactions
    for (_, tokens), rows in retained.items():
        assert rows.shape == (2, ROWS - BUFFER) and (rows.diff(dim=1) > 0).all()
        assert rows[:, :SINKS].tolist() == [list(range(SINKS))] * 2
        assert rows[:, -OBSERVING:].tolist() == [list(range(tokens - OBSERVING, tokens))] * 2
    assert any(not torch.equal(rows[0], rows[1]) for rows in retained.values())
    expected = plain_logits(engine, [*ids, *answer.ids[:-1]], retained)[prompt - 1 :]
    found = torch.stack(answer.logits[: len(expected)])
    assert (found - expected).norm() < 1e-4 * expected.norm()
    different = plain_logits(engine, [*ids, *answer.ids[:-1]], {})[prompt - 1 :]
    assert (different - expected).norm() > 1e-3 * expected.norm()
    answer.assert_whole()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_never_exceed_the_cap_and_all_come_back(dtype: torch.dtype) -> None:
    engine = Engine(make_model("qwen2", dtype, layers=1), 512)
    cache = Played(engine, 0.6, "k8v8").cache
    assert cache.tail_start
    answer = Answer(engine, cache, range(100), ROWS)
    answer.take(500)
    assert max(answer.rows) == ROWS and min(answer.rows[ROWS:]) == ROWS - BUFFER + 1
    answer.assert_whole()


@pytest.mark.parametrize("most", [1, 155, 156, 157, 158, 200])
def test_an_answer_that_is_closed_early_is_whole(engine: Engine, most: int) -> None:
    answer = Answer(engine, engine.new_cache(), range(100), ROWS)
    answer.take(most)
    answer.assert_whole()


def test_an_answer_that_is_stopped_is_whole(engine: Engine) -> None:
    answer = Answer(engine, engine.new_cache(), range(100), ROWS, lambda: len(answer.rows) > 300)
    assert len(answer.take(1000)) == 301
    answer.assert_whole()


def test_a_cap_that_is_not_reached_changes_nothing(engine: Engine) -> None:
    answers = [Answer(engine, engine.new_cache(), range(100), rows) for rows in (0, ROWS)]
    assert answers[0].take(150) == answers[1].take(150)
    for left, right in zip(answers[0].cache.layers, answers[1].cache.layers, strict=True):
        assert all(map(torch.equal, left.tail(), right.tail()))


def test_the_best_of_each_head_are_kept_with_sinks_and_newest() -> None:
    scores = torch.tensor([[0.0, 5, 1, 4, 3, 2], [9.0, 1, 2, 3, 4, 5]])
    assert best(scores.clone(), 5, 2, 0).tolist() == [[1, 3, 4, 6, 7], [0, 4, 5, 6, 7]]
    assert best(scores.clone(), 5, 2, 1).tolist() == [[0, 1, 3, 6, 7], [0, 4, 5, 6, 7]]


def test_later_turns_have_no_sinks_in_their_tail(engine: Engine, retained: dict[tuple[int, int], Tensor]) -> None:
    cache = Played(engine, 0.6).cache
    Answer(engine, cache, range(100), ROWS).take(200)
    assert any((rows[:, :SINKS] != torch.arange(SINKS)).any() for rows in retained.values())


def test_what_lies_in_the_file_is_masked(engine: Engine) -> None:
    cache = engine.new_cache()
    engine.forward(cache, range(100))
    plain = cache.layers[0].keys[0, 50].numpy().tobytes()
    aside = Aside(cache)
    aside.put(0, torch.arange(50).expand(2, -1))
    aside._file.seek(0)
    body = aside._file.read()
    assert plain not in body and plain in aside._masked(body, 0)
    aside.close()


# -- when memory or the disk runs out ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("owner", "name"), [(Cap, "_choose"), (Aside, "put"), (Aside, "bring_back")])
def test_memory_that_lacks_once_changes_nothing(engine: Engine, scarce: Scarcity, owner: Any, name: str) -> None:
    expected = Answer(engine, engine.new_cache(), range(100), ROWS).take(300)
    calls = scarce(owner, name, 2)
    answer = Answer(engine, engine.new_cache(), range(100), ROWS)
    assert answer.take(300) == expected and len(calls) > 2
    answer.assert_whole()
    assert not engine.warnings()


@pytest.mark.parametrize(("name", "first"), [("put", 1), ("put", 2), ("put", 5), ("_write", 1), ("_write", 5)])
def test_rows_that_cannot_be_put_aside_stay_and_the_answer_goes_on(
    engine: Engine, scarce: Scarcity, name: str, first: int
) -> None:
    scarce(Aside, name, first, ALWAYS)
    answer = Answer(engine, engine.new_cache(), range(100), ROWS)
    answer.take(300)
    answer.assert_whole()
    assert max(answer.rows) == 399
    [warning] = engine.warnings()
    assert warning.startswith("this answer is not held to compress.answer_rows: out of memory while")


def test_a_full_disk_is_said_and_the_answer_goes_on(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tempfile.TemporaryFile", fails)
    answer = Answer(engine, engine.new_cache(), range(100), ROWS)
    answer.take(300)
    answer.assert_whole()
    assert "No space left" in engine.warnings()[0]


def test_rows_that_cannot_come_back_leave_no_half_state(engine: Engine, scarce: Scarcity) -> None:
    cache = Played(engine, 0.6).cache
    start = cache.num_seen
    scarce(Aside, "bring_back", 2, ALWAYS)
    Answer(engine, cache, range(100), ROWS).take(300)
    assert cache.num_seen == start == cache.tail_start and cache.is_whole
    assert not any(layer.aside for layer in cache.layers)
    assert engine.warnings()[0].startswith("the newest turns are computed again: out of memory")


# -- sessions ----------------------------------------------------------------------------------------------------------

LONG = {"generate__max_new_tokens": 40, "compress__answer_rows": ROWS}
QUESTION = "Where did we stay in Rome? " * 10


@pytest.mark.parametrize("segment_min", [60, 5000], ids=["sealed", "waiting"])
def test_a_session_resumes_bit_for_bit(opener: Open, tmp_path: Path, scarce: Scarcity, segment_min: int) -> None:  # noqa: F811
    calls = scarce(Aside, "bring_back", ALWAYS)
    settings = {**LONG, "compress__segment_min": segment_min}
    live = opener(**settings).open("trip")
    live.ask(QUESTION)
    live.settle()
    assert len(calls) == 3
    resumed = opener(**settings, store__path=str(copy_of(tmp_path / "s.db", 1))).open("trip")
    assert probe(resumed) == probe(live)
    reply = resumed.ask("What did it cost?")
    assert reply.text == live.ask("What did it cost?").text and reply.usage.prefilled_tokens < 50
    resumed.settle()
    live.settle()
    assert probe(resumed) == probe(live)


def test_a_session_goes_on_when_rows_could_not_come_back(opener: Open, tmp_path: Path, scarce: Scarcity) -> None:  # noqa: F811
    told: list[Any] = []
    settings = {**LONG, "compress__segment_min": 5000}
    session = opener(listener=told.append, **settings).open("trip")
    session.ask("Who was with us?")
    session.settle()
    calls = scarce(Aside, "bring_back", 1, ALWAYS)
    reply = session.ask(QUESTION)
    assert calls and 270 < reply.usage.prefilled_tokens < 330
    session.settle()
    scarce.end()
    resumed = opener(**settings, store__path=str(copy_of(tmp_path / "s.db", 1))).open("trip")
    events = list(session.send("What did it cost?"))
    assert any("computed again" in event.text for event in [*told, *events] if isinstance(event, Notice))
    # The first turn came from the store, the second was computed from its ids, here as there.
    assert resumed.ask("What did it cost?").text == events[-1].text
    assert probe(resumed) == probe(session)


@pytest.mark.parametrize("rows", [-1, 1, 255])
def test_a_cap_that_leaves_no_room_is_refused(rows: int) -> None:
    with pytest.raises(ConfigError, match=r"setting compress\.answer_rows"):
        Config.load(overrides={"compress.answer_rows": rows})


# -- steps from fixed buffers ------------------------------------------------------------------------------------------


def test_steps_from_fixed_buffers_go_on_where_rows_have_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="the kernels are written in Triton")
    from kvchat import step

    model = make_model(
        "qwen3", torch.bfloat16, device="cuda" if CUDA else "cpu", heads=3, kv_heads=1, head_dim=64, layers=1
    )
    begun: list[int] = []

    class Uncaptured(step.DecodeStep):
        def __init__(self, model: Model, capture: bool) -> None:
            super().__init__(model, capture=CUDA)

        def begin(self, cache: SegmentedCache) -> None:
            begun.append(cache.tail_length)
            super().begin(cache)

    monkeypatch.setattr(step, "DecodeStep", Uncaptured)
    if not CUDA:
        monkeypatch.setattr(step, "prove", lambda network: {})
    answers = []
    for captures in (True, False):
        engine = Engine(model, 512, "encoded")
        engine.captures = captures
        answers.append(follow(engine, ROWS + 4, 300 if CUDA else 11))
    assert begun[1] == ROWS - BUFFER
    stepped, forwarded = (torch.stack(logits).float() for logits in answers)
    assert (stepped - forwarded).norm() < 0.03 * forwarded.norm()


def follow(engine: Engine, prompt: int, tokens: int) -> list[Tensor]:
    """Logits of an answer of given tokens after a prompt of so many; at the end the tail is whole."""
    cache, logits = engine.new_cache(), list[Tensor]()

    def sample(found: Tensor) -> Tensor:
        logits.append(found.clone())
        return torch.tensor([(11 * len(logits)) % 250], device=found.device)

    first = engine.forward(cache, [(7 * i) % 250 for i in range(prompt)])[-1]
    with closing(engine.decode(cache, first, sample, (), never, ROWS)) as running:
        assert len(list(islice(running, tokens))) == tokens
        assert cache.layers[0].aside and cache.tail_length <= ROWS
    assert cache.num_seen == cache.tail_length == prompt + tokens - 1
    assert not engine.problem and not engine.warnings()
    return logits[:tokens]
