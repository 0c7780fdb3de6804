"""EpiCache as a baseline: its caches are what its description says, in the harness that all others run in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.feature_extraction.text import TfidfVectorizer
from torch import Tensor

from kvchat.cache.ragged import SegmentedCache
from kvchat.config import Config
from kvchat.engine import Engine
from kvchat.evals.epicache import EpiCache, Scheme, Topic, Vectors, build, patched, topics_of, windows
from kvchat.evals.feeding import feed, new_conversation
from kvchat.model import Model
from tests.test_eval import SETTINGS, WORDS, case

SUBJECTS = ("boat sail harbour wave", "bread oven flour yeast", "goal ball team match", "piano chord song concert")


def tfidf(corpus: Sequence[str]) -> Any:
    """Unit vectors of words."""
    found = TfidfVectorizer().fit(corpus)

    def embed(texts: Sequence[str]) -> Vectors:
        vectors: Vectors = found.transform(texts).toarray().astype(np.float32)
        return vectors

    return embed


@pytest.fixture
def engine(tiny_model: Model) -> Engine:
    return Engine(tiny_model, 64)


# -- topics ----------------------------------------------------------------------------------------------------------


def test_windows_become_topics_with_their_most_typical_windows_in_order() -> None:
    texts = [f"{SUBJECTS[number % 4]} day{number}" for number in range(24)]
    topics = topics_of(texts, tfidf(texts), Scheme())
    assert len(topics) == 4
    for topic in topics:
        assert len({text.rsplit(" ", 1)[0] for text in topic.windows}) == 1
        assert len(topic.windows) == 4
        assert [texts.index(text) for text in topic.windows] == sorted(texts.index(text) for text in topic.windows)
        assert np.linalg.norm(topic.centroid) < 0.9999  # a mean of unit vectors, left as it is
    assert topics_of(texts, tfidf(texts), Scheme())[0].windows == topics[0].windows


def test_there_are_no_more_topics_than_windows() -> None:
    texts = ["boat sail", "boat sail", "oven flour"]
    assert len(topics_of(texts, tfidf(texts), Scheme())) == 2


def test_representatives_are_those_nearest_to_the_mean() -> None:
    vectors = np.array([[1, 0], [0.8, 0.6], [0.6, 0.8], [0, 1]], np.float32)
    names = ["a", "b", "c", "d"]
    embed = lambda texts: vectors[[names.index(text) for text in texts]]  # noqa: E731
    [topic] = topics_of(names, embed, Scheme(clusters=1, medoids=2))
    assert topic.windows == ("b", "c")
    assert topic.centroid == pytest.approx([0.6, 0.6])


def test_the_patched_prompt_is_an_instruction_and_then_the_windows(engine: Engine) -> None:
    template = engine.model.template
    text = template.text(patched(template, Topic(np.zeros(2, np.float32), ('User: "hi"', 'User: "ho"'))))
    assert text.startswith("user\n\n\nExtract the essential information")
    assert text.endswith('assistant\nUser: "hi"\nUser: "ho"')


# -- caches ----------------------------------------------------------------------------------------------------------


def kept(cache: SegmentedCache) -> list[list[list[int]]]:
    """Positions that each layer and head keeps."""
    return [
        [layer.sealed.positions[low:high].tolist() for low, high in zip(layer.sealed.bounds, layer.sealed.bounds[1:])]  # noqa: B905
        for layer in cache.layers
    ]


class Plain:
    """The same, densely: all KV that was ever computed, a mask of what is left, and the queries of a pass."""

    def __init__(self, engine: Engine) -> None:
        self.queries: list[Tensor] = []
        self.keys: list[Tensor] = []
        self.scale = 1.0

    def observe(self, layer: int, query: Tensor, keys: Tensor, values: Tensor, scale: float) -> None:
        self.queries.append(query)
        self.keys.append(keys)
        self.scale = scale


def test_the_first_block_keeps_what_the_prompt_attends_to(engine: Engine) -> None:
    ids, prompt, rows = list(range(30, 90)), list(range(100, 120)), 20
    cache = build(engine, ids, prompt, rows, block=60)
    dense = engine.new_cache()
    engine.forward(dense, ids)
    plain = Plain(engine)
    with dense.scratch(plain), torch.inference_mode():
        given = {**engine._inputs(dense, prompt), "position_ids": torch.arange(59, 79)[None]}
        engine.model.network.base_model(**given)
    for layer, positions in enumerate(kept(cache)):
        query, past = plain.queries[layer].view(2, 2, 20, 16), plain.keys[layer][:, :60]
        scores = torch.stack([(query[h] @ past[h].T * plain.scale).softmax(-1).amax((0, 1)) for h in range(2)])
        wanted = torch.zeros(120, dtype=torch.bool)
        wanted[scores.flatten().topk(2 * rows).indices] = True
        assert positions == [wanted[:60].nonzero()[:, 0].tolist(), wanted[60:].nonzero()[:, 0].tolist()]
        held = cache.layers[layer].sealed
        assert torch.equal(held.keys[: len(positions[0])], dense.layers[layer].keys[0, positions[0]])
    assert cache.num_seen == 60 and cache.tail_length == 0


def test_every_block_is_computed_from_what_is_left_and_all_compete_again(engine: Engine) -> None:
    ids, prompt = list(range(10, 130)), list(range(140, 160))
    first, both = (build(engine, ids[:end], prompt, 15, block=60) for end in (60, 120))
    for before, after in zip(kept(first), kept(both), strict=True):
        assert sum(map(len, after)) == 30
        for old, new in zip(before, after, strict=True):
            assert {position for position in new if position < 60} <= set(old)
    again = build(engine, ids[:60], prompt, 15, block=60)
    engine.forward(again, ids[60:])
    exact = {position: row for row, position in enumerate(range(60, 120))}
    for layer, positions in enumerate(kept(both)):
        head = [place for place in positions[0] if place >= 60]
        mine = both.layers[layer].sealed.keys[: len(positions[0])][len(positions[0]) - len(head) :]
        assert torch.equal(mine, again.layers[layer].keys[0, [exact[place] for place in head]])


def test_with_room_for_all_nothing_is_lost(engine: Engine) -> None:
    ids, question = list(range(20, 140)), list(range(150, 170))
    cache = build(engine, ids, [5, 6, 7], len(ids), block=50)
    dense = engine.new_cache()
    engine.forward(dense, ids)
    assert cache.num_sealed_rows == len(ids) * engine.model.pairs_per_token
    with cache.scratch(), dense.scratch():
        assert torch.allclose(engine.forward(cache, question), engine.forward(dense, question), atol=1e-4)


def test_memory_has_a_peak(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    most, forward = [0], Engine._forward

    def watched(self: Engine, cache: SegmentedCache, *given: Any) -> Tensor:
        found = forward(self, cache, *given)
        pairs = cache.num_sealed_rows + cache.tail_length * self.model.pairs_per_token
        most.append(pairs // self.model.pairs_per_token)
        return found

    monkeypatch.setattr(Engine, "_forward", watched)
    cache = build(engine, [number % 250 for number in range(600)], [9, 8, 7], 40, block=64)
    assert max(most) <= 40 + 64
    assert cache.num_sealed_rows == 40 * engine.model.pairs_per_token


# -- the harness -----------------------------------------------------------------------------------------------------


def asked(engine: Engine, **settings: Any) -> list[tuple[Any, ...]]:
    given = {**SETTINGS, **{key.replace("__", "."): value for key, value in settings.items()}}
    embed, told = tfidf([" ".join(SUBJECTS), *WORDS]), list[tuple[Any, ...]]()
    with new_conversation(
        engine, Config.load(overrides=given), lambda *rest: EpiCache(*rest, embed=embed, scheme=Scheme(block=128))
    ) as conversation:
        for question in feed(conversation, case(), lambda _: None, 1):
            residence = conversation.residence
            assert isinstance(residence, EpiCache)
            told.append(
                (question.id, residence.cache.num_seen, residence.cache.num_sealed_rows, residence.choose("swam far"))
            )
    return told


def test_it_answers_in_the_harness_with_as_many_rows_as_the_session(engine: Engine) -> None:
    told = asked(engine)
    assert [name for name, *_ in told] == ["q2", "q5"]
    assert told[0][1] < told[1][1]
    assert all(rows < 0.9 * seen * engine.model.pairs_per_token for _, seen, rows, _ in told)


def test_the_nearest_topic_answers(engine: Engine) -> None:
    with new_conversation(engine, Config.load(overrides=SETTINGS), EpiCache) as conversation:
        residence = conversation.residence
        assert isinstance(residence, EpiCache)
        residence.embed = lambda texts: np.array([[0.0, 1.0]], np.float32)
        residence.topics = [Topic(np.array(c, np.float32), ()) for c in ([0.9, 0.1], [0.1, 0.8])]
        residence.caches = [engine.new_cache() for _ in range(2)]
        assert residence.choose("what?") == 1 and residence.cache is residence.caches[1]


def test_windows_say_who_speaks(engine: Engine) -> None:
    with new_conversation(engine, Config.load(overrides=SETTINGS), EpiCache) as conversation:
        conversation.begin("Be brief.")
        conversation.take([{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}] * 3)
        texts = windows(conversation.path, 4)
    assert texts[0] == 'User: "hi"\nAssistant: "ho"\nUser: "hi"\nAssistant: "ho"'
    assert texts[1] == 'User: "hi"\nAssistant: "ho"'
