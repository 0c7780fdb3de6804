"""`kvchat config`: settings shown with where they come from, and written."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from kvchat.cli.app import main
from kvchat.meanings import MEANINGS
from tests.test_config_file import OURS, changed, file

__all__ = ["file"]

Run = Callable[..., str]


@pytest.fixture
def run(file: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*words: str, code: int = 0) -> str:
        assert main(["config", "--config", str(file), *words]) == code
        out, err = capsys.readouterr()
        return err if code else out

    return run


def test_the_command_shows_all_some_and_one(run: Run) -> None:
    lines = run().splitlines()
    assert lines[0].split() == ["setting", "value", "from"] and len(lines) == 1 + len(MEANINGS)
    assert any(line.split() == ["compress.keep_ratio", "0.5", "config.toml"] for line in lines)
    assert len(run("recall", "tui.theme", "recall.by").splitlines()) == 1 + 2 + 1
    one = run("compress.keep_ratio", "--set", "compress.keep_ratio=0.25").splitlines()
    assert one[1].split()[1:] == ["0.25", "this", "run"] and one[2] == MEANINGS["compress.keep_ratio"]
    entry = json.loads(run("store.min_free", "codec.name", "--json"))
    assert entry["store.min_free"] == {"value": 1 << 30, "from": "config.toml", "meaning": MEANINGS["store.min_free"]}


def test_the_command_writes_all_or_nothing(run: Run, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVCHAT_RECALL__TURNS", "4")
    shown = run("compress.keep_ratio=0.3", "recall.turns = 5", "tui.keys.map=f9").splitlines()
    assert [line.split()[1:] for line in shown[1:]] == [
        ["0.3", "config.toml"],
        ["4", "KVCHAT_RECALL__TURNS"],
        ["map=f9", "config.toml"],
    ]
    written = file.read_text()
    assert set(changed(OURS, written)) == {"keep_ratio = 0.3", "turns = 5", 'keys = {map = "f9"}'}
    assert run("recall.turns=6", "compress.keep_ratio=9", code=1).startswith("kvchat: setting compress.keep_ratio: ")
    assert run("compress.kept", code=1).startswith("kvchat: unknown setting 'compress.kept'; known here: scorer")
    assert run("nothing", code=1).startswith("kvchat: setting 'nothing' needs a section")
    assert file.read_text() == written
    run("compress.keep_ratio=", "recall.turns=", "tui.keys.map=")
    assert file.read_text() == OURS


def test_the_command_makes_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "deep" / "mine.toml"
    assert main(["config", "--config", str(path), "generate.temperature=0"]) == 0
    assert tomllib.loads(path.read_text()) == {"generate": {"temperature": 0.0}}
