"""The benchmark of the screen on a tiny model: every phase is measured, and nothing of it stays behind. No times."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kvchat.bench.lag import percentiles
from kvchat.bench.tui import Load, first_paint, tui
from kvchat.config import Config
from kvchat.errors import InputError
from kvchat.events import Notice
from tests.tiny import tiny_network, tiny_tokenizer

SMALL = Load(question_tokens=48, answer_tokens=16, messages=200, pages=6, code_lines=8, tokens_per_s=1000)
PHASES = ("load", "restore", "prefill", "generate", "seal", "open", "scroll", "fence")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    folder = tmp_path_factory.mktemp("model")
    tiny_network(attn_implementation="eager").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    given = {"model.name": str(folder), "model.dtype": "float32", "model.device": "cpu"}
    return Config.load(overrides={**given, "compress.segment_min": 64, "compress.recent_tokens": 0})


def test_every_phase_is_measured_and_a_process_is_started(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    told: list[Any] = []
    figures = tui(config, told.append, tokens=96, rounds=1, load=SMALL)
    assert json.loads(json.dumps(figures)) == figures
    assert figures.keys() == {*PHASES, "first_paint_s", "torch_at_first_paint"}
    for phase in PHASES:
        assert figures[phase].keys() >= {"lag_ms", "key_ms"}
    for phase in ("open", "scroll", "fence"):
        lag = figures[phase]["lag_ms"]
        assert lag["number"] > 0 and 0 <= lag["p50"] <= lag["p99"] <= lag["max"]
    assert figures["fence"]["s"] >= figures["fence"]["planned_s"] > 0
    assert figures["first_paint_s"]["min"] > 0 and figures["torch_at_first_paint"] in (True, False)
    assert [event.text for event in told if isinstance(event, Notice)][-1] == "measuring first paint"


def test_a_process_that_fails_is_one_line(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvchat.bench.tui.CHILD", "raise SystemExit('it broke')")
    with pytest.raises(InputError, match="the measuring process failed: it broke"):
        first_paint(config, 1)


def test_percentiles_are_of_the_sorted_values_in_milliseconds() -> None:
    assert percentiles([]) is None
    expected = {"p50": 51.0, "p99": 100.0, "max": 100.0, "number": 100}
    assert percentiles([n / 1000 for n in range(100, 0, -1)]) == expected
