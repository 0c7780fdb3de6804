"""Steps from fixed buffers give what a forward pass a token gives; captured as a graph where there is a CUDA device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from itertools import islice
from typing import Any

import pytest
import torch

CUDA = torch.cuda.is_available()
pytest.importorskip("triton", reason="the kernels are written in Triton")

from kvchat.engine import Engine, likeliest  # noqa: E402
from kvchat.step import DecodeStep  # noqa: E402
from tests.test_correct import Played  # noqa: E402
from tests.tiny import make_model  # noqa: E402

TURNS = [[(7 * i + 3 * turn) % 250 for i in range(length)] for turn, length in enumerate((70, 1, 45, 6))]
TOKENS = [5, 200]


@pytest.fixture(autouse=True)
def no_proofs_in_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """They have tests of their own, and take the interpreter longer than the steps."""
    if not CUDA:
        monkeypatch.setattr("kvchat.step.prove", lambda network: {})


@pytest.fixture(scope="module")
def engine() -> Engine:
    device = "cuda" if CUDA else "cpu"
    model = make_model("qwen3", torch.bfloat16, device=device, heads=3, kv_heads=1, head_dim=64, layers=1)
    return Engine(model, 64, "encoded")


def stepped(step: DecodeStep, played: Played, tokens: list[int]) -> Iterator[torch.Tensor]:
    """Logits after each token, the cache left as it was."""
    cache = played.cache
    with cache.scratch():
        step.begin(cache)
        for token in tokens:
            yield step.run(cache, torch.tensor([token], device=played.engine.model.device)).clone()


def forwarded(played: Played, tokens: list[int]) -> Iterator[torch.Tensor]:
    with played.cache.scratch():
        for token in tokens:
            yield played.engine.forward(played.cache, [token])[-1]


def assert_close(step: DecodeStep, played: Played, tokens: list[int] = TOKENS) -> None:
    """As close as rounding of bfloat16 states allows."""
    length = played.cache.num_seen
    ours, theirs = (
        torch.stack(list(rows)).float() for rows in (stepped(step, played, tokens), forwarded(played, tokens))
    )
    assert (ours - theirs).norm() < 0.02 * theirs.norm()
    assert played.cache.num_seen == length


def test_steps_follow_the_cache_wherever_it_goes(engine: Engine) -> None:
    codec: Any = ["k8v8", "k8v4", "k4v4", "raw"]
    played, step = Played(engine, 0.6, codec, TURNS), DecodeStep(engine.model, capture=CUDA)
    assert_close(step, played)  # no tail
    engine.forward(played.cache, TURNS[-1])
    assert_close(step, played)
    played.hold(0.1)
    assert_close(step, played)
    played.hold(1.0)
    assert_close(step, played)
    played.seal("later", 0.6, codec)
    assert_close(step, played)
    played.tiers.crop(90)
    assert_close(step, played)


def test_rows_that_were_decoded(engine: Engine) -> None:
    plain = Engine(engine.model, 64, "decoded")
    played, step = Played(plain, 0.6, "k8v8", TURNS), DecodeStep(engine.model, capture=CUDA)
    assert {form.form for layer in played.cache.layers for form in layer.forms} == {(16, 16)}
    assert_close(step, played)
    played.hold(0.1)
    assert_close(step, played)


@pytest.mark.parametrize(
    ("codec", "residence"),
    [(["k8v8", "k8v4", "k4v4", "raw"], "encoded"), ("k8v8", "decoded")],
    ids=str,
)
def test_segments_that_have_moved(engine: Engine, codec: Any, residence: Any) -> None:
    played = Played(Engine(engine.model, 64, residence), 0.6, codec, TURNS)
    step, cache = DecodeStep(engine.model, capture=CUDA), played.cache
    engine.forward(cache, TURNS[-1])
    before = torch.stack(list(stepped(step, played, TOKENS[:1])))
    for moved, offset, variants in [((0, -40, -40), 40, 2), ((5, 30, -50), 50, 4), ((0, 0, 0), 0, 4)]:
        cache.arrange(dict(zip((0, 70, 71), moved, strict=True)), offset)
        assert_close(step, played)
        assert step._turned.num_variants == variants
        played.hold(0.1 if offset == 40 else 0.6)  # rows come and go where segments stand now
    assert_close(step, played)
    after = torch.stack(list(stepped(step, played, TOKENS[:1])))
    assert (after - before).norm() < 0.02 * before.norm()


def test_moved_rows_matter(engine: Engine) -> None:
    """The test above would else pass with a step that does not turn."""
    played, step = Played(engine, 0.6, "k8v8", TURNS), DecodeStep(engine.model, capture=CUDA)
    before = torch.stack(list(stepped(step, played, TOKENS))).float()
    played.cache.arrange({0: 40}, 0)
    assert (torch.stack(list(stepped(step, played, TOKENS))).float() - before).norm() > 0.05 * before.norm()


def test_a_tail_that_outgrows_its_room(engine: Engine) -> None:
    played, step = Played(engine, 0.6, "k8v8", [TURNS[0], TURNS[-1]]), DecodeStep(engine.model, capture=CUDA)
    played.cache.layers[0].reserve(1)
    room = played.cache.layers[0].room
    engine.forward(played.cache, [3] * (room - 1))
    assert_close(step, played)
    assert played.cache.layers[0].room > room


def test_dead_rows_of_the_room_are_never_read(engine: Engine) -> None:
    played, step = Played(engine, 0.6, "k8v8", TURNS), DecodeStep(engine.model, capture=CUDA)
    engine.forward(played.cache, TURNS[-1])
    expected = torch.stack(list(stepped(step, played, TOKENS)))
    with torch.inference_mode():
        for layer in played.cache.layers:
            layer.keys[:, layer.tail_length :] = torch.nan
            layer.values[:, layer.tail_length :] = torch.nan
    assert torch.equal(torch.stack(list(stepped(step, played, TOKENS))), expected)


@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
def test_decoding_ahead_leaves_no_trace() -> None:
    model = make_model("llama", torch.bfloat16, device="cuda", heads=4, kv_heads=2, head_dim=64)
    engine = Engine(model, 64)
    played = Played(engine, 0.6, "k8v8", TURNS)
    logits = engine.forward(played.cache, TURNS[-1])[-1]
    length = played.cache.num_seen
    with closing(engine.decode(played.cache, logits, likeliest, (), lambda: False)) as tokens:
        answer = list(islice(tokens, 12))
    assert not engine.problem and played.cache.num_seen == length + 11
    played.tiers.crop(length)
    step, token, again = DecodeStep(model, capture=False), likeliest(logits), []
    step.begin(played.cache)
    for _ in range(12):
        again.append(int(token))
        token = likeliest(step.run(played.cache, token))
    assert again == answer
