"""The limit of memory holds while segments come and go, the copies on the way counted."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from kvchat.cache.layer import RaggedLayer
from kvchat.cache.pack import _Places
from kvchat.cache.ragged import SegmentedCache
from kvchat.engine import Engine
from kvchat.residence import excerpts as excerpting
from kvchat.residence.holding import Holding
from kvchat.residence.tiers import Tiers
from kvchat.store.store import Store
from tests.test_rebase import ask, assert_as_reference, concern, conversation, logits, new_engine, say, settled

KINDS = (torch.float32, torch.bfloat16, torch.float16, torch.uint8)


def kv(engine: Engine) -> dict[int, int]:
    """Bytes of all that may be keys or values, by where it lies."""
    dim = engine.model.head_dim
    tensors = [one for one in gc.get_objects() if type(one) is torch.Tensor and one.dtype in KINDS]
    storages = [one.untyped_storage() for one in tensors if one.ndim and one.shape[-1] in (dim, dim // 2)]
    return {storage.data_ptr(): storage.nbytes() for storage in storages}


def turned_bytes(cache: SegmentedCache) -> int:
    """Bytes of keys that lie turned beside the stored ones."""
    keys = [layer.sealed.keys for layer in cache.layers]
    stored = {form.keys.data_ptr() for layer in cache.layers for form in layer.forms}
    return sum(one.untyped_storage().nbytes() for one in keys if one.data_ptr() not in stored)


@contextmanager
def watched(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Bytes of KV whenever something was read, joined or put into a layer while segments are held.

    Rows of the tail count, and not the room that it has for more; nor what else was there before.
    """
    seen, besides = list[int](), list[int]()

    def sampling(function: Callable[..., Any]) -> Callable[..., Any]:
        def sampled(*args: Any, **more: Any) -> Any:
            found = function(*args, **more)
            if besides:
                seen.append(sum(kv(engine).values()) - besides[-1])
            return found

        return sampled

    def watching(function: Callable[..., Any]) -> Callable[..., Any]:
        def watched(self: Holding | Tiers, *args: Any) -> Any:
            for layer in self.cache.layers:
                layer.forget_turned()
            gc.collect()
            tail = self.cache.tail_length * engine.model.pairs_per_token * engine.model.bytes_per_pair
            besides.append(sum(kv(engine).values()) - self.cache.sealed_bytes - tail)
            try:
                return function(self, *args)
            finally:
                besides.pop()

        return watched

    with monkeypatch.context() as patch:
        patch.setattr(Holding, "hold", watching(Holding.hold))
        patch.setattr(Tiers, "bring", watching(Tiers.bring))
        patch.setattr(_Places, "take", sampling(_Places.take))
        patch.setattr(RaggedLayer, "place", sampling(RaggedLayer.place))
        for name in ("coded_rows", "decoded", "pack"):
            patch.setattr(excerpting, name, sampling(getattr(excerpting, name)))
        yield seen


@pytest.mark.parametrize(("codec", "rows", "in_bytes"), [("raw", 300, False), ("k8v8", 300, True), ("k4v4", 400, True)])
def test_a_limit_of_memory_holds_while_what_a_question_concerns_comes_and_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, codec: str, rows: int, in_bytes: bool
) -> None:
    engine = new_engine(layers=8)
    most = rows * engine.model.pairs_per_token * engine.model.bytes_per_pair
    budget = f"{most} B" if in_bytes else f"{rows} rows"
    config = settled(**{"compress.kv_budget": budget, "codec.name": codec, "recall.turns": 4})
    with (
        closing(Store(tmp_path / "far.db")) as store,
        conversation(store, engine, config) as one,
        watched(engine, monkeypatch) as seen,
    ):
        one.begin("Be brief.")
        ask(one, "a" * 60)
        for number in range(30):
            say(one, number, number % 3 * 25)
        stays = logits(one)
        for asked in ("word5? word9? word17?", "word2?", "word21? word3?"):
            concern(one, asked)
            assert one.residence.recalled
            assert_as_reference(one)
            if in_bytes:  # a limit in rows is one of rows
                tail = one.residence.cache.tail_length * most // rows
                assert one.residence.cache.sealed_bytes + turned_bytes(one.residence.cache) + tail <= most
        one.residence.recalled = {}
        one.residence.hold(one.path)
        assert torch.equal(logits(one), stays)
        assert 0.5 * most < max(seen) <= most
        seen.clear()
        one.residence.let_go()
        for _ in one.restore():
            pass
        assert torch.equal(logits(one), stays)
        assert 0.5 * most < max(seen) <= most
