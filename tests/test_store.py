"""Sessions, the tree of messages, branches and search."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvchat.errors import InputError, SessionExists, SessionNotFound, StoreError
from kvchat.store.store import Message, SearchHit, Store
from tests.store_parts import FINGERPRINT, MODEL, converse, say, segment, talk


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(tmp_path / "sessions" / "kvchat.db")
    yield store
    store.close()


def test_a_new_store_is_empty(store: Store) -> None:
    assert store.sessions() == [] and store.last_session() is None and store.verify() == []
    assert store.path(None) == [] and store.search("anything") == []


def test_a_new_session_has_no_turns(store: Store) -> None:
    info = store.create_session("trip", MODEL, FINGERPRINT)
    assert info == store.session("trip")
    assert (info.tip, info.num_turns, info.num_tokens, info.nbytes, info.title) == (None, 0, 0, 0, "")
    assert info.model == MODEL and info.fingerprint == FINGERPRINT and info.created == info.updated


def test_messages_come_back_as_they_were_given(store: Store) -> None:
    info = store.create_session("trip", MODEL, FINGERPRINT)
    system = Message.new(None, "system", "Be brief.", [0, 2**32 - 1, 7], (1, 2))
    user = Message.new(system.id, "user", "नमस्ते 👩‍🚀 \0 \r\n", (), (0, 0))
    usage, timings = {"prompt_tokens": 3}, {"ttft_s": 0.25, "itl_s": [0.1]}
    reply = say(user, "assistant", "", finish_reason="stop", usage=usage, timings=timings, created="2020-01-01")
    store.add_messages(info.id, [system, user, reply], None)
    assert store.path(reply.id) == [system, user, reply]
    assert store.path(user.id) == [system, user]
    assert system.created and reply.created == "2020-01-01"


@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.text(st.characters(exclude_categories=["Cs"])),
    st.lists(st.integers(0, 2**32 - 1)),
    st.sampled_from(["user", "assistant"]),
)
def test_any_text_and_ids_survive(store: Store, content: str, ids: list[int], role: str) -> None:
    info = store.create_session(f"s{len(store.sessions())}", MODEL, FINGERPRINT)
    message = Message.new(None, role, content, ids, (0, len(ids)))  # type: ignore[arg-type]
    store.add_messages(info.id, [message], None)
    [found] = store.path(message.id)
    assert (found.content, found.token_ids, found.id) == (content, tuple(ids), message.id)
    store.search(content)


def test_half_a_surrogate_pair_is_refused_before_anything_is_written() -> None:
    with pytest.raises(InputError, match="surrogate"):
        Message.new(None, "user", "\ud83d", (), (0, 0))


def test_an_id_follows_from_past_role_content_and_tokens_alone() -> None:
    base = Message.new(None, "user", "hi", (1, 2), (0, 1))
    assert base.id == Message.new(None, "user", "hi", [1, 2], (1, 2), finish_reason="stop", created="then").id
    others = [
        Message.new("b2:00", "user", "hi", (1, 2), (0, 1)),
        Message.new(None, "assistant", "hi", (1, 2), (0, 1)),
        Message.new(None, "user", "hi ", (1, 2), (0, 1)),
        Message.new(None, "user", "hi", (1, 2, 3), (0, 1)),
    ]
    assert len({base.id, *(other.id for other in others)}) == 5
    assert base.id == "b2:" + "f64cadfb92d4c41bc47ebae9c3abddca"


def test_the_listing_counts_turns_tokens_and_bytes_of_the_current_path(store: Store) -> None:
    info, chain = converse(store, "trip", "  Where\n did we   stay? ", "At the Hotel Sole.", "And then?", "Home.")
    record, frames = segment(chain, 0, 2)
    store.put_segment(record, frames)
    info = store.session("trip")
    assert (info.num_turns, info.title) == (2, "Where did we stay?")
    assert info.num_tokens == sum(len(message.token_ids) for message in chain)
    assert info.nbytes == len(record.header) + sum(len(body) for _, _, body in frames)
    store.set_tip(info.id, None)
    info = store.session("trip")
    assert (info.num_turns, info.num_tokens, info.nbytes, info.title) == (0, 0, 0, "")


def test_a_long_title_is_cut(store: Store) -> None:
    info, _ = converse(store, "trip", "word " * 1000)
    assert len(info.title) == 60 and info.title.endswith("word…")


def test_a_system_prompt_is_neither_title_nor_turn(store: Store) -> None:
    info = store.create_session("trip", MODEL, FINGERPRINT)
    system = say(None, "system", "Be brief.")
    store.add_messages(info.id, [system], None)
    assert store.session("trip").num_turns == 0 and store.session("trip").title == ""
    store.add_messages(info.id, talk(system, "Hello", "Hi"), system.id)
    assert store.session("trip").num_turns == 1 and store.session("trip").title == "Hello"


def test_sessions_are_listed_latest_first(store: Store) -> None:
    for name in ("a", "b", "c"):
        converse(store, name, f"I am {name}")
    info = store.session("a")
    store.add_messages(info.id, [say(info.tip, "assistant", "Noted.")], info.tip)
    assert [session.name for session in store.sessions()] == ["a", "c", "b"]
    last = store.last_session()
    assert last is not None and last.name == "a"


def test_a_taken_name_is_refused(store: Store) -> None:
    store.create_session("trip", MODEL, FINGERPRINT)
    store.create_session("other", MODEL, FINGERPRINT)
    with pytest.raises(SessionExists, match="'trip'"):
        store.create_session("trip", MODEL, FINGERPRINT)
    with pytest.raises(SessionExists, match="'trip'"):
        store.rename("other", "trip")
    with pytest.raises(SessionExists, match="'trip'"):
        store.fork("other", "trip", None)
    assert len(store.sessions()) == 2


@pytest.mark.parametrize("name", ["", "  ", "two\nlines", "a\tb", "\ud800", "a\u2028b", "nul\0"])
def test_what_is_no_name_is_refused(store: Store, name: str) -> None:
    with pytest.raises(InputError, match="no session name"):
        store.create_session(name, MODEL, FINGERPRINT)


@pytest.mark.parametrize("name", ["trip", "O'Brien; --", "میزبان‌ها", "👩‍🚀 log", '"q" %_*'])
def test_any_one_line_is_a_name(store: Store, name: str) -> None:
    store.create_session("first", MODEL, FINGERPRINT)
    store.rename("first", name)
    assert store.session(name).name == name and len(store.sessions()) == 1
    store.rename(name, name)


def test_an_unknown_name_brings_the_closest_ones(store: Store) -> None:
    for name in ("trip", "trip-2", "recipes"):
        store.create_session(name, MODEL, FINGERPRINT)
    for call in (store.session, store.delete, store.verify):
        with pytest.raises(SessionNotFound, match=r"no session 'tripp'; did you mean 'trip', 'trip-2'\? `kvchat ls`"):
            call("tripp")
    with pytest.raises(SessionNotFound, match="no session 'xyz'; `kvchat ls` lists all"):
        store.session("xyz")


def test_another_model_can_take_over(store: Store) -> None:
    _, chain = converse(store, "trip", "Hello", "Hi")
    store.set_model("trip", "bigger", {"weights": "w2"})
    info = store.session("trip")
    assert (info.model, info.fingerprint, info.tip) == ("bigger", {"weights": "w2"}, chain[-1].id)


def test_a_tip_that_moved_meanwhile_is_found(store: Store) -> None:
    info, chain = converse(store, "trip", "Hello", "Hi")
    mine, theirs = talk(chain[-1], "mine"), talk(chain[-1], "theirs")
    store.add_messages(info.id, theirs, chain[-1].id)
    with pytest.raises(StoreError, match="'trip' was changed by another kvchat; open it again"):
        store.add_messages(info.id, mine, chain[-1].id)
    assert store.session("trip").tip == theirs[-1].id and store.path(mine[-1].id) == []


def test_a_session_that_was_deleted_meanwhile_takes_no_messages(store: Store) -> None:
    info, chain = converse(store, "trip", "Hello", "Hi")
    store.delete("trip")
    later = store.create_session("later", MODEL, FINGERPRINT)
    assert later.id != info.id
    with pytest.raises(StoreError, match="deleted by another kvchat"):
        store.add_messages(info.id, talk(chain[-1], "more"), chain[-1].id)
    with pytest.raises(StoreError, match="deleted by another kvchat"):
        store.set_tip(info.id, None)


def test_a_failed_append_leaves_nothing_behind(store: Store) -> None:
    info, chain = converse(store, "trip", "Hello", "Hi")
    wrong = Message("b2:ff", chain[-1].id, "user", "x", (1,), (0, 1), usage={"no json": {1, 2}})
    with pytest.raises(TypeError):
        store.add_messages(info.id, [wrong], chain[-1].id)
    store.add_messages(info.id, talk(chain[-1], "goes on"), chain[-1].id)
    assert store.verify() == []


def test_a_rewound_branch_is_kept(store: Store) -> None:
    info, chain = converse(store, "trip", "one", "two", "three", "four")
    store.set_tip(info.id, chain[1].id)
    again = talk(chain[1], "three, edited", "four, again")
    store.add_messages(info.id, again, chain[1].id)
    assert store.branches(info.id) == [chain[-1].id]
    assert store.path(store.branches(info.id)[0]) == chain
    assert store.path(store.session("trip").tip) == [*chain[:2], *again]


def test_branches_are_leaves_off_the_path_most_recently_left_first(store: Store) -> None:
    info, chain = converse(store, "trip", "one", "two", "three", "four")
    for message in reversed(chain[:3]):
        store.set_tip(info.id, message.id)
    assert store.branches(info.id) == [chain[-1].id]
    other = talk(chain[0], "another two")
    store.add_messages(info.id, other, chain[0].id)
    store.set_tip(info.id, None)
    assert store.branches(info.id) == [other[-1].id, chain[-1].id]
    store.set_tip(info.id, chain[-1].id)
    assert store.branches(info.id) == [other[-1].id]


def test_an_answer_given_again_word_for_word_is_the_old_branch(store: Store) -> None:
    info, chain = converse(store, "trip", "Hello", "Hi")
    store.set_tip(info.id, chain[0].id)
    assert store.branches(info.id) == [chain[1].id]
    store.add_messages(info.id, talk(None, "Hello", "Hi")[1:], chain[0].id)
    assert store.branches(info.id) == [] and store.stats()["messages"] == 2


def test_the_tip_moves_only_to_a_message(store: Store) -> None:
    info, chain = converse(store, "trip", "Hello", "Hi")
    with pytest.raises(StoreError, match="open the session again"):
        store.set_tip(info.id, "b2:00")
    assert store.session("trip").tip == chain[-1].id and store.branches(info.id) == []


def test_timings_are_filled_in_later(store: Store) -> None:
    _, chain = converse(store, "trip", "Hello", "Hi there")
    store.set_timings(chain[1].id, {"seal_s": 1.5})
    assert store.path(chain[1].id)[1].timings == {"seal_s": 1.5}
    assert len(store.search("there")) == 1 and store.verify() == []


def test_a_fork_shares_rows_and_goes_its_own_way(store: Store) -> None:
    info, chain = converse(store, "trip", "one", "two", "three", "four")
    fork = store.fork("trip", "trip-2", chain[1].id)
    assert (fork.model, fork.fingerprint, fork.num_turns) == (info.model, info.fingerprint, 1)
    assert store.stats()["messages"] == 4
    own = talk(chain[1], "three", "another four")
    store.add_messages(fork.id, own, chain[1].id)
    assert store.stats()["messages"] == 5
    assert store.path(store.session("trip-2").tip) == [*chain[:3], own[-1]]
    assert store.path(store.session("trip").tip) == chain


def test_a_fork_may_start_on_an_old_branch_or_before_the_first_message(store: Store) -> None:
    info, chain = converse(store, "trip", "one", "two", "three")
    store.set_tip(info.id, chain[0].id)
    assert store.fork("trip", "old", chain[2].id).num_turns == 2
    assert store.fork("trip", "blank", None).tip is None


def test_a_fork_at_a_message_of_another_session_is_refused(store: Store) -> None:
    _, theirs = converse(store, "private", "a secret")
    converse(store, "trip", "Hello")
    with pytest.raises(StoreError, match="'trip' has no message"):
        store.fork("trip", "new", theirs[0].id)


def test_thousands_of_messages_are_read_in_order(store: Store) -> None:
    info, chain = converse(store, "long", *(f"message {number}" for number in range(1000)))
    assert store.path(chain[-1].id) == chain
    assert info.num_turns == 500 and len(store.search("999")) == 1


def test_search_names_session_turn_and_role(store: Store) -> None:
    info = store.create_session("trip", MODEL, FINGERPRINT)
    system = say(None, "system", "You know hotels.")
    chain = [system, *talk(system, "Hello", "Hi", "Which hotel\nwas it?", "The Hotel Sole, by the station.")]
    store.add_messages(info.id, chain, None)
    assert store.search("station") == [
        SearchHit("trip", 2, "assistant", "The Hotel Sole, by the station.", ((23, 30),))
    ]
    assert {(hit.turn, hit.role) for hit in store.search("hotel")} == {(0, "system"), (2, "user"), (2, "assistant")}
    assert SearchHit("trip", 2, "user", "Which hotel was it?", ((6, 11),)) in store.search("hotel")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("stays", True),
        ("CAFE", True),
        ("café sol", True),
        ("sol café", False),
        ("station café", True),
        ('"café', True),
        ("it wasn't cheap", True),
        ("C++", True),
        ("cheap OR missing", False),
        ("NOT cheap", False),
        ("content:cheap", False),
        ("cheap AND (", False),
        ("-- cheap ;", True),
        ("chea", True),
        ("", False),
        ("*", False),
        ("\ud800 \0", False),
        ("cheap " * 500, True),
    ],
)
def test_search_takes_words_and_never_operators(store: Store, text: str, found: bool) -> None:
    converse(store, "trip", "We stayed near the station, at the Café Sole: it wasn't cheap. C++!")
    assert bool(store.search(text)) == found


def test_the_best_match_comes_first_and_the_limit_holds(store: Store) -> None:
    converse(store, "far", "one hotel among very many other words that have nothing at all to do with it")
    converse(store, "near", "hotel hotel")
    for number in range(5):
        converse(store, f"s{number}", f"hotel number {number}, with a view")
    hits = store.search("hotel", limit=3)
    assert len(hits) == 3 and hits[0].session == "near"
    assert len(store.search("hotel")) == 7


def test_a_shared_message_is_a_hit_in_every_session_that_holds_it(store: Store) -> None:
    _, chain = converse(store, "trip", "Hello", "the hotel", "more", "the harbour")
    store.fork("trip", "trip-2", chain[1].id)
    assert {(hit.session, hit.turn) for hit in store.search("hotel")} == {("trip", 1), ("trip-2", 1)}
    assert {hit.session for hit in store.search("harbour")} == {"trip"}


def test_a_hit_on_an_old_branch_has_no_turn(store: Store) -> None:
    info, chain = converse(store, "trip", "Hello", "the hotel", "the harbour")
    store.set_tip(info.id, chain[0].id)
    store.add_messages(info.id, talk(None, "Hello", "the hostel")[1:], chain[0].id)
    assert [hit.turn for hit in store.search("harbour")] == [None]
    assert [hit.turn for hit in store.search("hostel")] == [1]
    assert [hit.turn for hit in store.search("hello")] == [1]


def test_stats_count_what_is_there(store: Store) -> None:
    _, chain = converse(store, "trip", "one", "two", "three")
    for record, frames in (segment(chain, 0, 2), segment(chain, 2, 3, kind="open", num_chunks=1)):
        store.put_segment(record, frames)
    stats = store.stats()
    assert (stats["sessions"], stats["messages"], stats["segments"], stats["frames"]) == (1, 3, 2, 6)
    assert stats["kinds"] == {"sealed": 1, "open": 1}
    assert stats["kv_bytes"] == store.session("trip").nbytes > 0
    assert stats["text_bytes"] == sum(len(message.content) + 4 * len(message.token_ids) for message in chain)
    assert stats["file_bytes"] >= stats["kv_bytes"] and stats["free_bytes"] >= 0


def test_the_store_needs_no_torch() -> None:
    code = "import sys, kvchat.store.store; raise SystemExit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
