"""The built-in model itself: a resumed session goes on bit for bit, under both codecs."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvchat.config import Config
from kvchat.model import Model
from kvchat.worker import Worker
from tests.store_parts import copy_of

SAID = [{"role": ("user", "assistant")[i % 2], "content": f"Line {i} of a long talk about the sea."} for i in range(24)]


@pytest.mark.weights
@pytest.mark.parametrize("codec", ["raw", "k8v8"])
def test_a_resumed_session_of_the_built_in_model_goes_on_bit_for_bit(
    tmp_path: Path, builtin_model: Model, codec: str
) -> None:
    given = {
        "store.path": str(tmp_path / "s.db"),
        "codec.name": codec,
        "compress.segment_min": 128,
        "compress.keep_ratio": 0.3,
        "compress.recent_tokens": 64,
        "generate.temperature": 0,
        "generate.max_new_tokens": 8,
    }
    config = Config.load(overrides=given)
    live_worker = Worker(config, None, lambda *_: builtin_model)
    live = live_worker.open("sea")
    live.append(SAID)
    live.ask("What is it about?")
    live.settle()
    segments = live.stats()["segments"]
    assert {segment["kind"] for segment in segments} == {"sealed", "open"}
    assert any(segment["rows"] < segment["rows_total"] for segment in segments)
    given["store.path"] = str(copy_of(tmp_path / "s.db", 1))
    again = Worker(Config.load(overrides=given), None, lambda *_: builtin_model)
    resumed = again.open("sea")
    assert resumed.logprobs("And then?", "We swam.") == live.logprobs("And then?", "We swam.")
    assert resumed.ask("And then?").text
    again.close()
    live_worker.close()
