"""What out of memory is; where it happens to a cache or the engine, all layers have what was computed, or none has."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from itertools import islice
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import kvchat.cache.layer as layers
from kvchat import memory
from kvchat.cache.ragged import SegmentedCache
from kvchat.cache.tail import TAIL_STEP, Tail
from kvchat.engine import SHORTEST, Engine, likeliest
from kvchat.errors import CapacityError, OutOfMemory
from kvchat.model import Model
from tests.scarcity import ALWAYS, WORDS, Scarcity
from tests.test_correct import TURNS, Played
from tests.tiny import make_model

CPU = torch.device("cpu")


@pytest.fixture
def engine(tiny_model: Model) -> Engine:
    return Engine(tiny_model, 32)


def bits(cache: SegmentedCache) -> list[list[Any]]:
    """Everything that a cache holds."""
    return [
        [
            *(layer.tail_start, layer.tail_length, *(part.tolist() for part in layer.tail())),
            *((form.form, form.runs.tolist(), *(plane.tolist() for plane in form.planes)) for form in layer.forms),
            *(form.positions.tolist() for form in layer.forms),
        ]
        for layer in cache.layers
    ]


# -- what it is --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError(WORDS), True),
        (MemoryError(), True),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported later"), True),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
            True,
        ),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (OutOfMemory("as said"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (ValueError("out of memory"), False),
        (CapacityError("out of memory"), False),
        (None, False),
    ],
)
def test_what_out_of_memory_is(error: Exception | None, expected: bool) -> None:
    assert memory.is_out_of_memory(error) == expected


def test_an_error_that_followed_from_it_is_one_too_and_what_was_computed_is_let_go() -> None:
    seen = list[weakref.ref[Tensor]]()

    def run_out() -> None:
        held = torch.ones(1)
        seen.append(weakref.ref(held))
        raise torch.OutOfMemoryError(WORDS)

    def work() -> None:
        held = torch.ones(1)
        seen.append(weakref.ref(held))
        try:
            run_out()
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")

    dead = list[bool]()
    with pytest.raises(OutOfMemory) as caught:
        memory.again(work, lambda: dead.extend(one() is None for one in seen), "capturing", CPU)
    assert dead == [True] * 6 and caught.value.__context__ is None
    assert "while capturing" in str(caught.value) and "\n" not in str(caught.value)


def test_torch_and_numpy_really_raise_what_is_known_here() -> None:
    import numpy as np

    for allocate in (lambda: torch.empty(1 << 55, dtype=torch.int64), lambda: np.empty(1 << 59)):
        with pytest.raises(OutOfMemory, match=r"which needs [\d.]+ \w+ more: .* free on cpu"):
            memory.again(allocate, lambda: None, "making room", CPU)


def test_what_cannot_be_tried_again_is_not() -> None:
    tries = list[int]()
    with pytest.raises(OutOfMemory):
        for attempt in memory.twice(lambda: False, "this", CPU):
            with attempt:
                tries.append(1)
                raise MemoryError
    assert tries == [1]


# -- a cache: all layers, or none --------------------------------------------------------------------------------------


@pytest.mark.parametrize("times", [1, ALWAYS])
@pytest.mark.parametrize("layer", [1, 2, 3])
@pytest.mark.parametrize("place", ["append", "grow", "mlp"])
def test_a_pass_that_fails_at_any_layer_leaves_no_token(
    engine: Engine, scarce: Scarcity, place: str, layer: int, times: int
) -> None:
    expected, played = Played(engine, 0.6), Played(engine, 0.6)
    for one in (expected, played):
        engine.forward(one.cache, [7] * 5)
    before, more = bits(played.cache), [9] * (TAIL_STEP + 8)
    if place == "append":
        scarce(Tail, "append_tail", layer, times)
    elif place == "grow":  # the values' room, after the keys'
        scarce(torch, "empty_like", layer, times)
    else:
        scarce(engine.model.network.model.layers[layer - 1].mlp, "forward", 1, times)
    if times == 1:
        logits = engine.forward(played.cache, more)
    else:
        with pytest.raises(OutOfMemory, match=r"while computing 264 tokens, which needs 2\.00 GiB more"):
            engine.forward(played.cache, more)
        assert bits(played.cache) == before
        scarce.end()
        logits = engine.forward(played.cache, more)
    scarce.end()
    assert torch.equal(logits, engine.forward(expected.cache, more))
    assert bits(played.cache) == bits(expected.cache)


@pytest.mark.parametrize("layer", [1, 2, 3])
@pytest.mark.parametrize("place", ["pack", "after"])
def test_a_segment_is_attached_in_all_layers_or_in_none(
    engine: Engine, scarce: Scarcity, place: str, layer: int
) -> None:
    played, expected = Played(engine, 0.6, "k8v8"), Played(engine, 0.6, "k8v8")
    for one in (played, expected):
        engine.forward(one.cache, TURNS[-1])
    before = bits(played.cache)
    scarce(*((layers, "pack") if place == "pack" else (Tail, "after")), layer)
    with pytest.raises(torch.OutOfMemoryError):
        played.seal("last", 0.6, "k8v8")
    assert bits(played.cache) == before and len(played.tiers.residents) == 3
    played.seal("last", 0.6, "k8v8")
    expected.seal("last", 0.6, "k8v8")
    assert torch.equal(played.logits(), expected.logits()) and bits(played.cache) == bits(expected.cache)


def test_a_cache_that_cannot_even_be_brought_back_knows_that_it_is_not_whole(engine: Engine, scarce: Scarcity) -> None:
    played = Played(engine, 0.6)
    engine.forward(played.cache, TURNS[-1])
    assert played.cache.is_whole
    scarce(layers, "pack", 2, ALWAYS)
    with pytest.raises(torch.OutOfMemoryError):
        played.seal("last", 0.6, "raw")
    assert not played.cache.is_whole
    played.cache.clear()
    assert played.cache.is_whole and played.cache.num_seen == played.cache.num_sealed_rows == 0


@pytest.mark.parametrize("layer", [1, 2, 3])
def test_saved_rows_are_appended_to_all_layers_or_to_none(engine: Engine, scarce: Scarcity, layer: int) -> None:
    cache = engine.new_cache()
    engine.forward(cache, TURNS[0])
    before, rows = bits(cache), [tuple(part[:, :3].clone() for part in one.tail()) for one in cache.layers]
    scarce(Tail, "append_tail", layer)
    with pytest.raises(torch.OutOfMemoryError):
        cache.append_tail(rows)
    assert bits(cache) == before and cache.is_whole


# -- prefill and decode ------------------------------------------------------------------------------------------------


def limit_passes(patch: pytest.MonkeyPatch, engine: Engine, most: int) -> list[int]:
    """Passes over more than `most` tokens find no memory; the lengths of those that do."""
    forward, lengths = engine.model.network.forward, list[int]()

    def limited(*args: Any, **named: Any) -> Any:
        if named["input_ids"].shape[1] > most:
            raise torch.OutOfMemoryError(WORDS)
        lengths.append(named["input_ids"].shape[1])
        return forward(*args, **named)

    patch.setattr(engine.model.network, "forward", limited)
    return lengths


def test_a_prompt_is_read_in_smaller_chunks_where_memory_is_short(
    tiny_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids, engine = [i % 250 for i in range(150)], Engine(tiny_model, 100)
    cache, expected = engine.new_cache(), engine.new_cache()
    *_, whole = (engine.forward(expected, ids[start : start + 25])[-1] for start in range(0, 150, 25))
    lengths = limit_passes(monkeypatch, engine, 30)
    prefill = engine.prefill(cache, ids, lambda: False)
    done = list[int]()
    while True:
        try:
            done.append(next(prefill))
        except StopIteration as finished:
            logits = finished.value
            break
    assert lengths == [25] * 6 and done == [25, 50, 75, 100, 125, 150]
    assert torch.equal(logits, whole) and bits(cache) == bits(expected)


def test_a_prompt_that_cannot_be_read_at_all_is_an_error_and_what_was_read_stays(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, scarce: Scarcity
) -> None:
    cache, ids = engine.new_cache(), list(range(100))
    calls = scarce(engine.model.network, "forward", 3, ALWAYS)
    with pytest.raises(OutOfMemory, match=f"computing {SHORTEST} tokens"):
        list(engine.prefill(cache, ids, lambda: False))
    assert cache.num_seen == 64 and cache.is_whole and len(calls) == 2 + 2 * 2
    scarce.end()
    expected = engine.new_cache()
    list(engine.prefill(expected, ids, lambda: False))
    list(engine.prefill(cache, ids[64:], lambda: False))
    assert bits(cache) == bits(expected)


def answered(engine: Engine, cache: SegmentedCache, most: int = 8) -> list[int]:
    logits = engine.forward(cache, TURNS[-1])[-1]
    with closing(engine.decode(cache, logits, likeliest, (), lambda: False)) as tokens:
        return list(islice(tokens, most))


def test_a_token_for_which_there_is_no_memory_once_changes_nothing(engine: Engine, scarce: Scarcity) -> None:
    expected = answered(engine, Played(engine, 0.6).cache)
    played = Played(engine, 0.6)
    calls = scarce(engine.model.network, "forward", 4)
    assert answered(engine, played.cache) == expected and len(calls) == 1 + 7 + 1


def test_an_answer_that_ends_for_lack_of_memory_leaves_its_whole_tokens(engine: Engine, scarce: Scarcity) -> None:
    cache = Played(engine, 0.6).cache
    start = cache.num_seen
    scarce(engine.model.network.model.layers[1].mlp, "forward", 4, ALWAYS)
    with pytest.raises(OutOfMemory, match="computing a token"):
        answered(engine, cache)
    assert cache.num_seen == start + len(TURNS[-1]) + 2 and cache.is_whole


class Steps(ModuleType):
    """Stands for `kvchat.step`: steps that are forward passes, and a script of what beginning one raises."""

    def __init__(self, engine: Engine, script: Sequence[str]) -> None:
        super().__init__("kvchat.step")
        self.begun, self.made = list[bool](), list[weakref.ref[Any]]()
        steps, script = self, list(script)

        class DecodeStep:
            def __init__(self, model: Model, capture: bool) -> None:
                self.buffers = torch.zeros(4)
                steps.made.append(weakref.ref(self))

            def begin(self, cache: SegmentedCache) -> None:
                what = script.pop(0) if script else ""
                steps.begun.append(not what)
                if what:
                    raise torch.OutOfMemoryError(WORDS) if what == "short" else RuntimeError(what)

            def run(self, cache: SegmentedCache, token: Tensor) -> Tensor:
                if cache.tail_length % 20 == 0:
                    self.begin(cache)
                return engine.forward(cache, token)[-1]

        self.DecodeStep = DecodeStep


def capturing(engine: Engine, patch: pytest.MonkeyPatch, script: Sequence[str]) -> Steps:
    steps = Steps(engine, script)
    patch.setitem(sys.modules, "kvchat.step", steps)
    engine.captures = True
    return steps


@pytest.mark.parametrize(
    ("script", "begun", "told"),
    [
        (["short"], [False, True], 0),  # room was made by letting other steps go
        (["short", "short"], [False, False], 1),
        (["", "short"], [True, False], 1),  # more room for the tail
        (["invalid capture"], [False], 1),
    ],
)
def test_a_step_that_cannot_be_captured_is_let_go_and_decoding_goes_on_without(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, script: list[str], begun: list[bool], told: int
) -> None:
    expected, cache = answered(engine, Played(engine, 0.6).cache), Played(engine, 0.6).cache
    steps = capturing(engine, monkeypatch, script)
    assert answered(engine, cache) == expected
    assert steps.begun[: len(begun)] == begun
    assert len(engine.warnings()) == told == len([one for one in [engine.problem] if one])
    assert [one() is None for one in steps.made] == [True] * (len(steps.made) - (not told)) + [False] * (not told)
    steps.begun.clear()
    assert answered(engine, cache)
    assert bool(steps.begun) == (script[-1] == "short"), "it is tried again where memory was short, and only there"


def test_what_an_answer_needs_is_made_before_it_and_once(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    steps, cache = capturing(engine, monkeypatch, []), Played(engine, 0.6).cache
    for _ in range(2):
        engine.prepare(cache)
    assert len(steps.made) == 1
    answered(engine, cache)
    assert len(steps.made) == 1


def test_steps_of_other_conversations_are_let_go_for_one_that_needs_memory(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, scarce: Scarcity
) -> None:
    steps, cache = capturing(engine, monkeypatch, []), Played(engine, 0.6).cache
    answered(engine, cache)
    assert [one() is None for one in steps.made] == [False]
    scarce(engine.model.network, "forward")
    engine.forward(engine.new_cache(), [1, 2, 3])
    assert [one() is None for one in steps.made] == [True]


# -- on a device -------------------------------------------------------------------------------------------------------


@pytest.fixture
def full_device() -> Iterator[Callable[[], None]]:
    """What takes all memory of the CUDA device that is not taken yet, until the test ends or `memory` is given back."""

    def fill() -> None:
        memory.release(torch.device("cuda"))
        total = torch.cuda.get_device_properties("cuda").total_memory
        torch.cuda.set_per_process_memory_fraction(torch.cuda.memory_reserved() / total)

    yield fill
    torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_device_that_is_full_ends_a_pass_and_the_next_one_is_as_if_nothing_had_been(
    full_device: Callable[[], None],
) -> None:
    engine = Engine(make_model("llama", torch.bfloat16, device="cuda", heads=4, kv_heads=2, head_dim=64), 4000)
    cache, expected, ids = engine.new_cache(), engine.new_cache(), [i % 250 for i in range(4000)]
    for one in (cache, expected):
        engine.forward(one, ids[:50])
    logits = engine.forward(expected, ids)
    full_device()
    before = bits(cache)
    with pytest.raises(OutOfMemory, match=r"needs [\d.]+ \w+ more: [\d.]+ of [\d.]+ GB are free on cuda"):
        engine.forward(cache, ids)
    assert bits(cache) == before
    torch.cuda.set_per_process_memory_fraction(1.0)
    assert torch.equal(engine.forward(cache, ids), logits) and bits(cache) == bits(expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_device_that_is_full_while_a_step_is_captured_decodes_without_a_graph(
    full_device: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    from kvchat.step import DecodeStep

    engine = Engine(make_model("llama", torch.bfloat16, device="cuda", heads=4, kv_heads=2, head_dim=64), 64)
    assert engine.captures
    engine.captures = False
    caches = [Played(engine, 0.6, "k8v8").cache for _ in range(3)]
    expected = answered(engine, caches[0])
    engine.captures = True
    answered(engine, caches[1])  # kernels are compiled
    assert not engine.problem
    engine.free()
    record = DecodeStep._record

    def starved(step: DecodeStep, cache: SegmentedCache) -> None:
        full_device()
        try:
            record(step, cache)
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)

    with monkeypatch.context() as patched:
        patched.setattr(DecodeStep, "_record", starved)
        assert answered(engine, caches[2]) == expected
    assert "out of memory" in engine.problem and len(engine.warnings()) == 1 and not engine._steps
    answered(engine, caches[2])
    assert not engine.problem
