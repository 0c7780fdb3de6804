"""The settings screen: what it shows, what it refuses, and what comes of a change."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from textual.pilot import Pilot
from textual.widgets import Input, Label, Switch

from kvchat.config import OF_SESSIONS, Config
from kvchat.meanings import MEANINGS
from kvchat.tui.edits import Changed, Edits
from kvchat.tui.setting_row import Choice, PlaceSwitch, SettingRow
from kvchat.tui.settings import PAGES, SettingsScreen, check_keys
from tests.tui_host import Host, hosting, wait_until

OWN = {"compress.keep_ratio": 0.3, "generate.top_k": 7}


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    monkeypatch.setenv("KVCHAT_RECALL__TURNS", "4")
    path = tmp_path / "config.toml"
    path.write_text("[compress]\nkeep_ratio = 0.4\nrecent_tokens = 64\n[tui]\ntitles = false\n")
    return Config.load(path, {"generate.min_p": 0.1})


# -- changes, without a screen -------------------------------------------------------------------------------------


def test_what_is_typed_goes_to_the_session_or_the_file_in_the_types_of_the_settings(config: Config) -> None:
    edits = Edits(config, OWN)
    for key, text in {"compress.keep_ratio": "0.25", "generate.top_k": "9", "store.min_free": "2GiB"}.items():
        edits.put(key, text)
    edits.turn("generate.top_k")
    edits.put("tui.keys", "map=f9")
    edits.put("compress.rank_chunks", "0.5, 1")
    assert edits.result() == Changed(
        {"generate.top_k": 9, "store.min_free": "2GiB", "tui.keys": {"map": "f9"}},
        {"compress.keep_ratio": 0.25, "compress.rank_chunks": [0.5, 1.0]},
    )
    assert (edits.count("file"), edits.count("session")) == (3, 2)
    edits.put("compress.keep_ratio", "0.3")  # what it is
    assert edits.result().for_session == {"compress.rank_chunks": [0.5, 1.0]}


def test_each_place_has_its_value_and_its_origin(config: Config) -> None:
    edits = Edits(config, OWN)
    assert (edits.text("compress.keep_ratio"), edits.origin("compress.keep_ratio")) == ("0.3", "this session")
    edits.turn("compress.keep_ratio")
    assert (edits.text("compress.keep_ratio"), edits.origin("compress.keep_ratio")) == ("0.4", "config.toml")
    assert edits.remark("compress.keep_ratio") == "this session has its own value, 0.3, and keeps it"
    edits.turn("recall.turns")
    assert edits.remark("recall.turns") == "the variable KVCHAT_RECALL__TURNS goes before config.toml"
    edits.turn("generate.min_p")
    assert edits.remark("generate.min_p") == "set for this run, which goes before config.toml"
    assert edits.remark("model.name") == ""
    edits.put("model.name", "some/model")
    edits.put("tui.theme", "nord")
    edits.put("generate.top_p", "0.5")
    assert edits.remark("model.name") == "counts from the next start on"
    assert edits.remark("tui.theme") == edits.remark("generate.top_p") == ""  # at once
    assert {edits.places(key) for key in MEANINGS if key.split(".")[0] not in OF_SESSIONS} == {("file",)}
    assert {key: Edits(config, None).places(key) for key in MEANINGS} == dict.fromkeys(MEANINGS, ("file",))


def test_a_reset_undoes_a_change_and_then_takes_the_value_away(config: Config) -> None:
    edits = Edits(config, OWN)
    edits.put("compress.keep_ratio", "0.9")
    edits.reset("compress.keep_ratio")
    assert not edits.is_changed("compress.keep_ratio") and edits.text("compress.keep_ratio") == "0.3"
    edits.reset("compress.keep_ratio")
    assert edits.text("compress.keep_ratio") == "0.4" and "config.toml" in edits.remark("compress.keep_ratio")
    edits.turn("compress.recent_tokens")
    edits.reset("compress.recent_tokens")
    edits.reset("generate.top_p")  # is nowhere set
    assert edits.text("compress.recent_tokens") == "1024"
    assert edits.result() == Changed({"compress.recent_tokens": None}, {"compress.keep_ratio": None})
    edits.reset("compress.keep_ratio")
    assert not edits.is_changed("compress.keep_ratio")


def test_values_that_only_together_cannot_be_are_the_problem_of_the_last_one(config: Config) -> None:
    edits = Edits(config, OWN)
    edits.put("compress.rank_chunks", "0.5, 1")
    edits.put("codec.name", "k8v8, k8v4, eb5")
    assert "has 3 codecs for the 2 intervals" in edits.problem("codec.name")
    assert edits.problems == ["codec.name"]
    edits.put("compress.rank_chunks", "0.5, 0.7, 1")
    assert edits.problems == []
    edits.put("compress.scorer", "os:system")
    assert "is code" in edits.problem("compress.scorer")


def test_a_sessions_settings_of_another_version_do_not_get_in_the_way(config: Config) -> None:
    edits = Edits(config, {"compress.scorer": "of-the-future"})
    assert edits.text("compress.scorer") == "kvzip"
    edits.reset("compress.scorer")
    assert edits.result().for_session == {"compress.scorer": None}


def test_keys_for_what_is_not_there_are_refused(config: Config) -> None:
    edits = Edits(config, OWN, check_keys)
    edits.put("tui.keys", "stop=f7 nothing=f9")
    assert "there is no binding 'nothing'; known: " in edits.problem("tui.keys")
    edits.put("tui.keys", "stop=f7 settings.save=f9")
    assert edits.result().for_file == {"tui.keys": {"stop": "f7", "settings.save": "f9"}}


# -- on the screen -------------------------------------------------------------------------------------------------


@asynccontextmanager
async def settings(
    config: Config, own: Mapping[str, Any] | None = OWN, page: str = "Recall", size: tuple[int, int] = (80, 24)
) -> AsyncIterator[tuple[Host, Pilot[None], SettingsScreen]]:
    screen = SettingsScreen(config, own, page)
    async with hosting(screen, size) as (host, pilot):
        await wait_until(lambda: keys(screen) == [*screen.wanted()])
        yield host, pilot, screen


def keys(screen: SettingsScreen) -> list[str]:
    return [one.key for one in screen.query(SettingRow)]


def row(screen: SettingsScreen, key: str) -> SettingRow:
    return screen.query(SettingRow)[keys(screen).index(key)]


def write(screen: SettingsScreen, key: str, text: str) -> None:
    editor = row(screen, key).editor
    assert isinstance(editor, Input)
    editor.focus()
    editor.value = text


def told(screen: SettingsScreen, key: str) -> str:
    return str(row(screen, key).query_one(".told", Label).render())


def test_the_pages_show_every_setting() -> None:
    sections = [section for page in PAGES.values() for section in page]
    assert sorted(sections) == sorted(Config.model_fields)


async def test_a_page_shows_values_meanings_and_origins(config: Config) -> None:
    async with settings(config) as (host, pilot, screen):
        await wait_until(lambda: "MiniLM" in host.shown)
        lines = host.shown.splitlines()
        (turns,) = [line for line in lines if line.split()[:1] == ["turns"]]
        assert turns.split() == ["turns", "4", "variable", "→", "this", "session"]
        assert any("The most old turns that come back for a question" in line for line in lines)
        assert isinstance(row(screen, "episodes.embedder").editor, Choice)
        await pilot.press("left")
        await wait_until(lambda: "keep_ratio" in host.shown and "MiniLM" not in host.shown)


async def test_a_wrong_value_is_told_at_once_and_not_kept(config: Config) -> None:
    async with settings(config) as (host, pilot, screen):
        await pilot.press("down", "down", "end", "9", "9")
        await wait_until(lambda: "less than or equal to 64, got '499'" in told(screen, "recall.turns"))
        screen.finder.value = "seed"
        await wait_until(lambda: keys(screen) == ["generate.seed"])
        await pilot.press("ctrl+s")
        await wait_until(lambda: "turns" in host.shown and screen.focused is row(screen, "recall.turns").editor)
        assert host.results == [] and "recall.turns cannot be kept so" in host.shown
        write(screen, "recall.turns", "4")
        await wait_until(lambda: not screen.edits.problems)
        await pilot.press("ctrl+s")
        assert host.results == [None]  # it is what it was


async def test_a_change_goes_to_the_session_or_with_a_key_to_the_file(config: Config) -> None:
    async with settings(config) as (host, pilot, screen):
        write(screen, "recall.turns", "42")
        write(screen, "recall.by", "recency")
        await wait_until(lambda: screen.focused is row(screen, "recall.by").editor)
        await pilot.press("ctrl+t")
        await wait_until(lambda: "changes: 1 for this session and 1 for config.toml" in host.shown)
        await pilot.press("ctrl+s")
        assert host.results == [Changed({"recall.by": "recency"}, {"recall.turns": 42})]


async def test_words_and_the_place_are_chosen_with_enter(config: Config) -> None:
    async with settings(config) as (host, pilot, screen):
        row(screen, "episodes.embedder").editor.focus()
        await pilot.press("enter", "down", "enter")
        await wait_until(lambda: screen.edits.text("episodes.embedder") == "minilm")
        row(screen, "recall.turns").query_one(PlaceSwitch).focus()
        await pilot.press("enter")
        assert screen.edits.place("recall.turns") == "file"
        await wait_until(lambda: "KVCHAT_RECALL__TURNS" in told(screen, "recall.turns"))
        assert not row(screen, "episodes.embedder").query_one(PlaceSwitch).can_focus
        await pilot.press("ctrl+s")
        assert host.results == [Changed({"episodes.embedder": "minilm"}, {})]


async def test_switches_are_turned_and_reset(config: Config) -> None:
    async with settings(config, page="Look") as (host, pilot, screen):
        editor = row(screen, "tui.titles").editor
        assert isinstance(editor, Switch) and not editor.value
        editor.focus()
        await pilot.press("space")
        await wait_until(lambda: screen.edits.result().for_file == {"tui.titles": True})
        await pilot.press("ctrl+r")
        await wait_until(lambda: not editor.value and not screen.edits.is_changed("tui.titles"))
        await pilot.press("ctrl+r", "ctrl+s")
        assert host.results == [Changed({"tui.titles": None}, {})]


async def test_words_find_settings_of_all_pages(config: Config) -> None:
    async with settings(config) as (host, pilot, screen):
        screen.finder.value = "answer seed"
        await wait_until(lambda: keys(screen) == ["generate.seed"])
        await pilot.press("down", "5")
        await wait_until(lambda: screen.edits.result().for_session == {"generate.seed": 5})
        screen.finder.value = "no [/] such"
        await wait_until(lambda: "there is no such setting" in host.shown)
        screen.finder.value = ""
        await wait_until(
            lambda: keys(screen) == ["recall.by", "recall.turns", "episodes.embedder", "episodes.clusters"]
        )


async def test_escape_asks_before_changes_are_lost(config: Config) -> None:
    async with settings(config) as (host, pilot, screen):
        write(screen, "recall.turns", "42")
        await wait_until(lambda: screen.edits.is_changed("recall.turns"))
        await pilot.press("escape")
        await wait_until(lambda: "Leave without keeping 1 change?" in host.shown)
        await pilot.press("n")
        await wait_until(lambda: host.is_back)
        assert host.results == [] and screen.edits.text("recall.turns") == "42"
        await pilot.press("escape", "y")
        await wait_until(lambda: host.results == [None])


async def test_escape_leaves_at_once_if_nothing_was_changed(config: Config) -> None:
    async with settings(config, own=None, size=(120, 40)) as (host, pilot, _):
        await wait_until(lambda: "config.toml" in host.shown)
        assert "this session" not in host.shown
        await pilot.press("escape")
        assert host.results == [None]


async def test_what_is_stored_is_never_markup() -> None:
    hostile = Config().replaced({"model.name": "[red]x[/red]\x1b[2J", "store.path": "[/]"})
    async with settings(hostile, page="Model") as (host, _, screen):
        await wait_until(lambda: "[red]x[/red]␛[2J" in host.shown)
        write(screen, "model.prefill_chunk_size", "[b]\x1b[2J")
        await wait_until(lambda: "got '[b]␛[2J'" in told(screen, "model.prefill_chunk_size"))
