"""Where settings come from, and that config.toml is written with everything else in it left alone."""

from __future__ import annotations

import os
import stat
import tomllib
from pathlib import Path
from typing import Any

import pytest

from kvchat.config import Config
from kvchat.config_file import save, write
from kvchat.errors import ConfigError
from kvchat.meanings import MEANINGS, NAMES
from kvchat.values import annotation, as_text, from_text, kept, value_of

ROOT = Path(__file__).parent.parent
OURS = (ROOT / "config.toml").read_text("utf-8")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "config.toml"
    path.write_text(OURS, "utf-8")
    return path


def changed(before: str, after: str) -> list[str]:
    """Lines that are new or gone, those of `after` only; the count of lines must be the same."""
    old, new = before.splitlines(), after.splitlines()
    assert len(old) == len(new)
    return [line for was, line in zip(old, new, strict=True) if was != line]


def test_each_value_says_where_it_comes_from(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.write_text("[compress]\nkeep_ratio = 0.4\nscorer = 'keydiff'\n[recall]\nturns = 3\n")
    monkeypatch.setenv("KVCHAT_RECALL__TURNS", "4")
    monkeypatch.setenv("kvchat_generate", '{"top_k": 5}')
    monkeypatch.setenv("KVCHAT_TUI__KEYS__MAP", "f9")
    config = Config.load(file, {"compress.scorer": "knorm"})
    origins = config.origins()
    assert origins.keys() == MEANINGS.keys()
    assert {key: origin for key, origin in origins.items() if origin != "default"} == {
        "compress.keep_ratio": "config.toml",
        "compress.scorer": "this run",
        "recall.turns": "KVCHAT_RECALL__TURNS",
        "generate.top_k": "KVCHAT_GENERATE",
        "tui.keys": "KVCHAT_TUI__KEYS",
    }
    assert config.tui.keys == {"map": "f9"}
    own = config.for_session({"generate.top_p": 0.5, "compress.scorer": "kvzip"})
    assert own.origins()["generate.top_p"] == "this session" and own.generate.top_p == 0.5
    assert own.origins()["compress.scorer"] == "this run" and own.file == config.file == file
    assert set(Config().origins().values()) == {"default"}


def test_every_setting_has_a_meaning_of_one_line() -> None:
    assert list(MEANINGS) == list(Config().origins())
    assert all(text.isprintable() and 10 < len(text) < 100 for text in MEANINGS.values())
    assert all(Config().replaced({key: name}) for key, names in NAMES.items() for name in names)


def test_one_value_changes_one_line(file: Path) -> None:
    write(file, {"compress.keep_ratio": "0.3"})
    assert changed(OURS, file.read_text()) == ["keep_ratio = 0.3"]
    write(file, {"compress.keep_ratio": None})
    assert file.read_text() == OURS


def test_values_are_written_in_the_types_of_their_settings(file: Path) -> None:
    texts = {
        "tui.titles": "no",
        "generate.top_k": "40",
        "store.min_free": "2GiB",
        "store.host_cache": "1000",
        "codec.name": "k8v8, eb5",
        "compress.rank_chunks": "0.5, 1",
        "tui.keys": "map=f9 stop=f8,escape",
        "generate.seed": "7",
    }
    write(file, {key: from_text(key, text) for key, text in texts.items()})
    expected = {
        "titles = false",
        "top_k = 40",
        'min_free = "2GiB"',
        "host_cache = 1000",
        'name = ["k8v8", "eb5"]',
        "rank_chunks = [0.5, 1.0]",
        'keys = {map = "f9", stop = "f8,escape"}',
        "seed = 7",
    }
    assert set(changed(OURS, file.read_text())) == expected
    config = Config.load(file)
    assert config.generate.seed == 7 and config.codec.names == ("k8v8", "eb5") and not config.tui.titles
    write(file, dict.fromkeys(texts))
    assert changed(OURS, file.read_text()) == ["# seed = 7"]  # what it was last stays as an example


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("", "[compress]\n# {meaning}\nkeep_ratio = 0.3\n"),
        ("# mine\n", "# mine\n\n[compress]\n# {meaning}\nkeep_ratio = 0.3\n"),
        ("[compress] # all of it\nkeep_ratio=0.9  # much\n", "[compress] # all of it\nkeep_ratio=0.3  # much\n"),
        ("compress.keep_ratio = 0.9\n", "compress.keep_ratio = 0.3\n"),
        ("compress = {keep_ratio = 0.9, budget = 'segment'}", "compress = {keep_ratio = 0.3, budget = 'segment'}"),
        ("[compress]\n\n[recall]\nturns = 3\n", "[compress]\n# {meaning}\nkeep_ratio = 0.3\n\n[recall]\nturns = 3\n"),
        ("[compress]\n# keep_ratio = 0.4\n[recall]\n", "[compress]\nkeep_ratio = 0.3\n[recall]\n"),
        (
            "[recall]\n# keep_ratio = 0.4\n",
            "[recall]\n# keep_ratio = 0.4\n\n[compress]\n# {meaning}\nkeep_ratio = 0.3\n",
        ),
    ],
)
def test_other_ways_to_write_a_file_stay_as_they_are(before: str, after: str, file: Path) -> None:
    file.write_text(before)
    write(file, {"compress.keep_ratio": 0.3})
    assert file.read_text() == after.replace("{meaning}", MEANINGS["compress.keep_ratio"])
    assert Config.load(file).compress.keep_ratio == 0.3


@pytest.mark.parametrize(
    ("before", "values", "after"),
    [
        ("[generate]\ntop_k = 5", {"generate.top_p": 0.5}, "[generate]\ntop_k = 5\n# {top_p}\ntop_p = 0.5\n"),
        (
            "[generate]\ntop_k = 5\n# more\n\n# of codecs\n[codec]\n",
            {"generate.top_p": 0.5},
            "[generate]\ntop_k = 5\n# more\n# {top_p}\ntop_p = 0.5\n\n# of codecs\n[codec]\n",
        ),
        ("[generate] # x\n  seed=1 # why\n", {"generate.seed": None}, "[generate] # x\n  # seed=1 # why\n"),
        (
            "[tui]\n[tui.keys]\nmap = 'f4' # x\n",
            {"tui.titles": False},
            "[tui]\ntitles = false\n\n[tui.keys]\nmap = 'f4' # x\n",
        ),
        (
            "[tui.keys]\nmap = 'f4' # x\nstop = 'f8'\n",
            {"tui.keys": {"map": "f9"}},
            '[tui.keys]\nmap = "f9" # x\n',
        ),
    ],
)
def test_comments_stay_where_they_belong(before: str, values: dict[str, Any], after: str, file: Path) -> None:
    file.write_text(before)
    write(file, values)
    assert file.read_text() == after.replace("{top_p}", MEANINGS["generate.top_p"])


def test_a_file_that_is_missing_is_made_and_a_key_of_a_table_too(tmp_path: Path) -> None:
    path = tmp_path / "new" / "config.toml"
    write(path, {"tui.keys.map": "f9", "tui.theme": "nord"})
    assert Config.load(path).tui.model_dump() == {"theme": "nord", "keys": {"map": "f9"}, "titles": True}
    write(path, {"tui.keys.stop": "f8", "tui.keys.map": None})
    assert Config.load(path).tui.keys == {"stop": "f8"}
    write(path, {"tui.keys.none": None, "recall.turns": None})
    assert Config.load(path).tui.keys == {"stop": "f8"}


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"compress.keep_ratio": "3"}, "setting compress.keep_ratio: Input should be less than or equal to 1, got '3'"),
        ({"compress.keep": "3"}, "unknown setting 'compress.keep'; known here: scorer"),
        ({"kompress.keep": "3"}, "unknown setting 'kompress'; known here: model"),
        ({"keep_ratio": "3"}, "setting 'keep_ratio' needs a section"),
        ({"tui.keys.map": "no key!"}, "has no key"),
        ({"tui.keys.map.x": "f3"}, "setting tui.keys.map: Input should be a valid string"),
        ({"tui.theme.x": "f3"}, "setting tui.theme must be a table"),
        ({"codec.name": ["k8v8"] * 9}, "codec.name has 9 codecs"),
        ({"compress.keep_ratio": 0.3, "recall.by": "magic"}, "setting recall.by: must be off"),
    ],
)
def test_a_value_that_would_not_be_accepted_is_refused_in_one_line(
    values: dict[str, object], problem: str, file: Path
) -> None:
    with pytest.raises(ConfigError) as refused:
        write(file, values)
    assert problem in str(refused.value) and "\n" not in str(refused.value)
    assert file.read_text() == OURS and os.listdir(file.parent) == ["config.toml"]


def test_a_file_that_cannot_be_read_or_written_is_left_alone(file: Path, tmp_path: Path) -> None:
    for text in (b"[compress\n", b"\xff = 1", b"compress = 1\n", b"[compress]\nkeep = 1\n"):
        file.write_bytes(text)
        with pytest.raises(ConfigError, match=r"not valid TOML|must be a table|unknown setting"):
            write(file, {"compress.keep_ratio": 0.3})
        assert file.read_bytes() == text
    for path in (file / "below" / "config.toml", tmp_path):
        with pytest.raises(ConfigError, match="cannot be"):
            write(path, {"compress.keep_ratio": 0.3})


def test_who_may_read_the_file_stays_so_and_a_link_stays_a_link(file: Path, tmp_path: Path) -> None:
    file.chmod(0o640)
    link = tmp_path / "link.toml"
    link.symlink_to(file)
    write(link, {"recall.turns": 5})
    assert link.is_symlink() and stat.S_IMODE(file.stat().st_mode) == 0o640
    assert Config.load(file).recall.turns == 5


def test_saving_changes_the_settings_of_the_run_where_the_file_counts(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVCHAT_RECALL__TURNS", "4")
    before = Config.load(file, {"generate.top_k": 9})
    after = save(before, {"recall.turns": 5, "generate.top_k": 3, "compress.keep_ratio": 0.2, "tui.theme": None})
    assert (after.recall.turns, after.generate.top_k, after.compress.keep_ratio) == (4, 9, 0.2)
    assert after.origins()["compress.keep_ratio"] == "config.toml" and after.file == file
    given = tomllib.loads(file.read_text())
    assert (given["recall"]["turns"], given["generate"]["top_k"]) == (5, 3)
    monkeypatch.setenv("KVCHAT_COMPRESS__RANK_CHUNKS", "[0.5, 1.0]")
    with pytest.raises(ConfigError, match="3 codecs for the 2"):
        save(Config.load(file), {"codec.name": ["k8v8", "eb2", "eb5"]})
    assert tomllib.loads(file.read_text())["codec"]["name"] == "k8v8"


def test_every_value_can_be_typed_as_it_is_shown() -> None:
    config = Config().replaced(
        {"store.min_free": 3 << 29, "tui.keys": {"map": "f3,f9"}, "codec.name": ["k8v8", "eb2"], "generate.seed": 3}
    )
    shown = {key: as_text(value_of(config, key)) for key in MEANINGS}
    assert shown["store.min_free"] == "1536MiB" and shown["tui.keys"] == "map=f3,f9" and shown["tui.titles"] == "true"
    again = Config().replaced({key: from_text(key, text) for key, text in shown.items()})
    assert again.model_dump() == config.model_dump()
    assert kept(config, "store.min_free", "1.5 GiB") == "1.5 GiB" and kept(config, "store.min_free", "100") == 3 << 29
    assert from_text("compress.rank_chunks", "[0.5, 1]") == [0.5, 1] and annotation("no.such") is None
    with pytest.raises(ConfigError, match="not a list"):
        from_text("compress.rank_chunks", "[0.5, 1")
