"""How much layers depend on far tokens, and the shares of the budget that follow."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import kvchat.evals.sensitivity as sensitivity
from kvchat.cli.app import main
from kvchat.config import Config
from kvchat.engine import Engine
from kvchat.errors import InputError
from kvchat.evals.sensitivity import shares_of, similarities
from kvchat.learned import load_shares, save_shares, version
from kvchat.model import Model
from kvchat.residence.sealing import way
from tests.tiny import make_model

IDS = [*range(200), *range(200)]


@pytest.fixture
def settings(tmp_path: Path) -> Config:
    return Config().replaced({"compress.learned": str(tmp_path), "compress.allocate": "sensitivity"})


def test_a_first_layer_sees_nothing_and_later_ones_more(tiny_model: Model) -> None:
    sigmas = similarities(Engine(tiny_model, 64), IDS, 150, lambda _: None)
    assert sigmas[0] == pytest.approx(1, abs=1e-5)  # its keys depend on the token alone
    assert all(sigma < 0.9999 for sigma in sigmas[1:])
    assert sigmas == similarities(Engine(tiny_model, 64), IDS, 150, lambda _: None)


def test_what_a_block_sees_whole_does_not_differ(tiny_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """With as many sinks as stand before the block it sees everything."""
    monkeypatch.setattr(sensitivity, "SINKS", 149)
    sigmas = similarities(Engine(tiny_model, 64), IDS[:300], 150, lambda _: None)
    assert sigmas == pytest.approx([1.0] * 3, abs=1e-3)


def test_too_short_a_text_is_refused(tiny_model: Model) -> None:
    for length, block in ((150, 150), (400, 128)):
        with pytest.raises(InputError, match="too few to be measured"):
            similarities(Engine(tiny_model, 64), IDS[:length], block, lambda _: None)


def test_shares_rise_with_sensitivity_and_have_mean_1() -> None:
    shares = shares_of([1.0, 0.9, 0.8, 0.5])
    assert list(shares) == sorted(shares) and sum(shares) == pytest.approx(4) and shares[0] >= 0.1
    assert shares_of([0.9, 0.8], alpha=1.0) == pytest.approx([2 / 3, 4 / 3], abs=1e-5)
    assert shares_of([1.0, 1.0, 1.0]) == (1.0, 1.0, 1.0)


def test_shares_that_were_measured_decide_the_order(tiny_model: Model, settings: Config) -> None:
    with pytest.raises(InputError, match="no sensitivity was measured on tiny-llama: run `kvchat tune --sensitivity`"):
        way(tiny_model, settings.compress)
    before = version(tiny_model, settings.compress)
    save_shares(tiny_model, settings.compress, [0.5, 1.0, 1.5], "sensitivity")
    assert version(tiny_model, settings.compress) != before
    for other in ({"compress.keep_ratio": 0.1}, {"compress.scorer": "snapkv"}):  # whatever else is set
        assert load_shares(tiny_model, settings.replaced(other).compress) == [0.5, 1.0, 1.5]
    with pytest.raises(InputError, match="no layer budgets were searched"):
        load_shares(tiny_model, settings.replaced({"compress.allocate": "evolved"}).compress)
    order = way(tiny_model, settings.compress)(torch.rand(3, 2, 600))
    kept = order > order.flatten().sort(descending=True).values[360]  # a tenth of the pairs
    assert [int(layer.sum()) for layer in kept] == pytest.approx([60, 120, 180], abs=2)


def test_the_command_measures_and_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("kvchat.model.load", lambda *_: make_model())
    file = tmp_path / "talk.json"
    turns = [{"role": role, "content": "words and words " * 20} for role in ("user", "assistant") * 4]
    file.write_text(json.dumps(turns))
    learned = f"compress.learned={tmp_path / 'learned'}"
    assert main(["tune", str(file), "--sensitivity", "--json", "--set", learned]) == 0
    out = json.loads(capsys.readouterr().out)
    assert [row["layer"] for row in out["layers"]] == [0, 1, 2] and Path(out["file"]).exists()
    assert main(["tune", str(file), "--sensitivity", "--tokens", "900", "--set", learned]) == 0
    printed = capsys.readouterr()
    assert printed.out.splitlines()[0].split() == ["layer", "sigma", "share"]
    assert "compress.allocate=sensitivity" in printed.err
