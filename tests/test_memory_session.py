"""Memory runs out under a session: once, and nobody notices; for longer, and one line says so and nothing is lost."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers

from kvchat import model
from kvchat.cache import layer as layers
from kvchat.cache.layer import RaggedLayer
from kvchat.cache.ragged import SegmentedCache
from kvchat.cache.tail import Tail
from kvchat.config import Config
from kvchat.engine import Engine
from kvchat.errors import ModelError, OutOfMemory
from kvchat.events import Event, Notice
from kvchat.handle import Session
from kvchat.jobs import Jobs
from kvchat.residence import loading, residence, saving
from kvchat.store.store import Store
from kvchat.worker import Worker
from tests.scarcity import ALWAYS, WORDS, Scarcity
from tests.test_jobs import Somebody
from tests.test_model import save, settings
from tests.test_session import QUESTIONS, SETTINGS, probe
from tests.tiny import make_model

EXACT = {"compress.keep_ratio": 1, "codec.name": "raw"}
"""Sealed or not, KV is the same."""


class Life:
    """A store, the workers on it, and what they told."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.told = list[Event]()
        self.workers = list[Worker]()

    def worker(self, **given: Any) -> Worker:
        """A new process, after the last one has ended."""
        self.close()
        config = Config.load(overrides={"store.path": str(self.path), **SETTINGS, **given})
        self.workers.append(Worker(config, self.told.append, lambda *_: make_model()))
        return self.workers[-1]

    def close(self) -> None:
        for worker in self.workers:
            worker.close()

    @property
    def notices(self) -> list[str]:
        return [event.text for event in self.told if isinstance(event, Notice)]


@pytest.fixture
def life(tmp_path: Path) -> Iterator[Life]:
    life = Life(tmp_path / "s.db")
    yield life
    life.close()


def play(session: Session, questions: list[str]) -> list[str]:
    texts = []
    for question in questions:
        texts.append(session.ask(question).text)
        session.settle()
    return texts


class Undisturbed(NamedTuple):
    """What is said where memory always suffices, log-probabilities afterwards, and how often each place was called."""

    said: list[str]
    expected: list[tuple[str, float]]
    calls: dict[str, int]
    """For the last two questions."""


def undisturbed(folder: Path, **given: Any) -> Undisturbed:
    life = Life(folder / "undisturbed.db")
    session = life.worker(**given).open("trip")
    said = play(session, QUESTIONS[:2])
    with Scarcity() as never:
        calls = {name: never(*place, times=0) for name, place in PLACES.items()}
        said += play(session, QUESTIONS[2:])
    expected = probe(session)
    life.close()
    return Undisturbed(said, expected, {name: len(made) for name, made in calls.items()})


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    return undisturbed(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    return undisturbed(tmp_path_factory.mktemp("exact"), **EXACT)


PLACES: dict[str, tuple[Any, str]] = {
    "a pass": (Engine, "_forward"),
    "the tail": (Tail, "append_tail"),
    "the tail's room": (Tail, "_grow"),
    "ranking": (residence, "rank_turns"),
    "scoring": (Engine, "observe"),
    "encoding": (residence, "read_segment"),
    "a layer's rows": (saving, "coded_planes"),
    "a frame": (saving, "pack_frame"),
    "reading back": (loading, "_read"),
    "packing": (layers, "pack"),
    "the tail's end": (Tail, "after"),
    "shrinking": (RaggedLayer, "keep"),
}
"""What needs memory, and how it is called."""


@pytest.mark.parametrize("part", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("place", PLACES)
def test_once_too_little_memory_changes_nothing(
    life: Life, plain: Undisturbed, scarce: Scarcity, place: str, part: float
) -> None:
    said, expected, last = plain.said, plain.expected, plain.calls[place]
    session = life.worker().open("trip")
    assert play(session, QUESTIONS[:2]) == said[:2]
    scarce(*PLACES[place], first=1 + round(part * (last - 1)))
    assert play(session, QUESTIONS[2:]) == said[2:]
    scarce.end()
    assert probe(session) == expected and not life.notices
    assert probe(life.worker().open("trip")) == expected
    store = Store(life.path)
    assert store.verify() == []
    store.close()


def failed(session: Session, question: str) -> str:
    """The one line that a turn ends with which finds no memory."""
    with pytest.raises(OutOfMemory) as caught:
        session.ask(question)
    assert "\n" not in str(caught.value) and "compress.keep_ratio" in str(caught.value)
    assert session.messages()[-1].content == question, "the user's message is kept"
    return str(caught.value)


@pytest.mark.parametrize(
    ("place", "first"), [("a pass", 1), ("a pass", 4), ("the tail", 1), ("the tail", 4), ("the tail's room", 1)]
)
def test_a_turn_that_finds_no_memory_is_one_line_and_can_be_answered_later(
    life: Life, exact: Undisturbed, scarce: Scarcity, place: str, first: int
) -> None:
    said, expected, _ = exact
    session = life.worker(**EXACT).open("trip")
    assert play(session, QUESTIONS[:2]) == said[:2]
    scarce(*PLACES[place], first, ALWAYS)
    line = failed(session, QUESTIONS[2])
    assert "which needs 2.00 GiB more" in line and "trying once more" in line
    scarce.end()
    *_, done = session.resend()
    assert done.text == said[2]
    session.settle()
    assert play(session, QUESTIONS[3:]) == said[3:]
    assert dict(probe(session)) == pytest.approx(dict(expected), abs=1e-4)
    live = probe(session)
    assert probe(life.worker(**EXACT).open("trip")) == live


@pytest.mark.parametrize("place", ["ranking", "scoring", "encoding", "a layer's rows", "packing", "the tail's end"])
def test_what_cannot_be_sealed_stays_exact_and_is_sealed_with_the_next_turn(
    life: Life, exact: Undisturbed, scarce: Scarcity, place: str
) -> None:
    said = exact.said
    session = life.worker(**EXACT).open("trip")
    assert play(session, QUESTIONS[:1]) == said[:1]
    scarce(*PLACES[place], 1, ALWAYS)
    assert play(session, QUESTIONS[1:3]) == said[1:3]
    assert any("could not be sealed; their KV stays exact" in line for line in life.notices)
    kinds = [segment["kind"] for segment in session.stats()["segments"]]
    assert "sealed" not in kinds[1:] and (kinds[-1] == "open" or place == "encoding"), "saved all the same"
    scarce.end()
    assert play(session, QUESTIONS[3:]) == said[3:]
    assert [segment["kind"] for segment in session.stats()["segments"]][-1] == "sealed"
    live = probe(session)
    assert probe(life.worker(**EXACT).open("trip")) == live


def test_what_is_saved_and_cannot_be_attached_is_let_go_and_comes_back(
    life: Life, tmp_path: Path, scarce: Scarcity, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As when the disk may be full: the store has a segment before memory has it.
    monkeypatch.setattr(saving.Saver, "surely_fits", lambda *_: False)
    said, expected, _ = undisturbed(tmp_path)
    session = life.worker().open("trip")
    assert play(session, QUESTIONS[:3]) == said[:3]
    scarce(loading, "_read", 1, ALWAYS)
    assert play(session, QUESTIONS[3:]) == said[3:] and life.notices
    assert session._conversation.residence.cache.num_seen == 0
    scarce.end()
    assert probe(session) == expected


def test_sealing_makes_room_by_what_older_segments_hold_beyond_their_budget(
    life: Life, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"compress.segment_min": 1, "compress.recent_tokens": 60}
    session = life.worker(**given).open("trip")
    play(session, QUESTIONS[:3])
    observe, held = Engine.observe, list[int]()

    def limited(engine: Engine, cache: SegmentedCache, *more: Any) -> None:
        held.append(cache.num_sealed_rows)
        if held[-1] == held[0]:
            raise torch.OutOfMemoryError(WORDS)
        observe(engine, cache, *more)

    monkeypatch.setattr(Engine, "observe", limited)
    play(session, QUESTIONS[3:])
    assert held[1] < held[0] and not life.notices
    assert [segment["kind"] for segment in session.stats()["segments"]] == ["sealed"] * 4


def test_a_segment_that_cannot_be_packed_is_told_and_kept_in_memory(
    life: Life, plain: Undisturbed, scarce: Scarcity
) -> None:
    said, expected, _ = plain
    session = life.worker().open("trip")
    assert play(session, QUESTIONS[:1]) == said[:1]
    scarce(saving, "pack_frame", 1, ALWAYS)
    assert [session.ask(question).text for question in QUESTIONS[1:]] == said[1:]
    session._call(lambda: session._conversation.seal_s)
    scarce.end()
    told = [event.text for event in session._call(lambda: [*session._conversation.residence.save()])]
    assert probe(session) == expected
    assert any("could not be saved" in line or "saving the newest turns" in line for line in [*told, *life.notices])
    life.close()
    assert life.worker().open("trip").ask("And then?").text


def test_a_session_that_cannot_be_restored_is_restored_later(life: Life, scarce: Scarcity) -> None:
    session = life.worker().open("trip")
    play(session, QUESTIONS[:3])
    expected = probe(session)
    life.close()
    scarce(loading, "_read", 1, ALWAYS)
    session = life.worker().open("trip")
    assert "restoring saved turns" in failed(session, QUESTIONS[3])
    assert any("restoring saved turns" in line for line in life.notices), "it was begun before the message"
    scarce.end()
    session.rewind()
    assert probe(session) == expected


def test_restoring_goes_one_by_one_where_memory_does_not_suffice_for_all_at_once(
    life: Life, scarce: Scarcity, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = life.worker().open("trip")
    play(session, QUESTIONS)
    expected = probe(session)
    life.close()
    attach, counts = SegmentedCache.attach, list[int]()

    def limited(cache: SegmentedCache, pieces: Any, *more: Any) -> None:
        counts.append(len({piece.start for piece in pieces}))
        if counts[-1] > 1:
            raise torch.OutOfMemoryError(WORDS)
        attach(cache, pieces, *more)

    monkeypatch.setattr(SegmentedCache, "attach", limited)
    assert probe(life.worker().open("trip")) == expected
    assert counts[0] > 1 and set(counts[1:]) == {1}


def test_segments_that_cannot_grow_are_told_and_grow_with_the_next_turn(life: Life, scarce: Scarcity) -> None:
    session = life.worker().open("trip")
    play(session, QUESTIONS)
    held, expected = session._conversation.residence, probe(session)
    path = session.messages()
    session._call(lambda: held.tiers.hold({one.id: 1 for one in held.tiers.residents}))
    smaller = probe(session)
    scarce(loading, "_read", 1, ALWAYS)
    session._call(lambda: held.hold(path))
    assert smaller != expected and probe(session) == smaller and held.short
    session._call(lambda: held.hold(path))
    assert [line.text for line in held.notices if "less of older turns is held" in line.text][1:] == [], "said once"
    scarce.end()
    assert probe(session) == expected and not held.short


@pytest.mark.parametrize("times", [1, ALWAYS])
def test_a_cache_that_is_torn_is_let_go_and_comes_back(life: Life, scarce: Scarcity, times: int) -> None:
    session = life.worker().open("trip")
    play(session, QUESTIONS)
    expected, held = probe(session), session._conversation.residence
    scarce(layers, "pack", 2, times)
    with pytest.raises(OutOfMemory) if times == ALWAYS else nullcontext():
        session._call(lambda: held._fit({one.id: 1 for one in held.tiers.residents}, {}))
    assert (held.cache.num_seen == 0) == (times == ALWAYS) and held.cache.is_whole
    scarce.end()
    session._call(lambda: held.hold(session._conversation.path))
    assert probe(session) == expected


def test_turns_that_cannot_be_cut_off_are_taken_back_all_the_same(life: Life, scarce: Scarcity) -> None:
    session = life.worker(**{"compress.segment_min": 150}).open("trip")
    play(session, QUESTIONS)
    scarce(layers, "before", 1, ALWAYS)
    session.rewind(2)
    assert session._conversation.residence.cache.num_seen == 0
    scarce.end()
    live = probe(session)
    assert probe(life.worker(**{"compress.segment_min": 150}).open("trip")) == live


def test_a_lack_of_memory_in_the_background_is_told_and_not_raised_by_the_next_call() -> None:
    told, owner = list[Event](), Somebody()

    def steps() -> Iterator[Event]:
        raise MemoryError
        yield

    jobs = Jobs(told.append)
    jobs.call(lambda: jobs.in_background(steps, owner))
    assert owner.failure is None and [type(event) for event in told] == [Notice]
    with pytest.raises(OutOfMemory, match="free on cpu; lower compress"):
        jobs.call(lambda: next(steps()))
    jobs.close()


@pytest.mark.parametrize("times", [1, ALWAYS])
def test_a_model_that_does_not_fit_is_one_line_and_what_was_loaded_of_it_is_let_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    save(tmp_path / "model")
    original, loaded = transformers.AutoModelForCausalLM.from_pretrained, list[weakref.ref[Any]]()

    def from_pretrained(*args: Any, **named: Any) -> Any:
        network, info = original(*args, **named)
        loaded.append(weakref.ref(network))
        if len(loaded) <= times:
            raise torch.OutOfMemoryError(WORDS)
        return network, info

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", from_pretrained)
    if times == 1:
        assert model.load(settings(tmp_path / "model"), cache=tmp_path).network is loaded[1]()
    else:
        with pytest.raises(ModelError, match=r"does not fit into memory: its weights take .* GB .*; choose") as caught:
            model.load(settings(tmp_path / "model"), cache=tmp_path)
        assert "\n" not in str(caught.value) and len(loaded) == 2
    assert loaded[0]() is None
