"""Many segments at once lie as segments lie that were attached one by one; what is damaged ends nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import fields, replace
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

from kvchat.cache.ragged import SegmentedCache
from kvchat.cache.segment import LayerKV, Ranking
from kvchat.codecs import encode_segment
from kvchat.codecs.coded import decoded
from kvchat.errors import CorruptFrame
from kvchat.residence import loading
from kvchat.residence.loading import Part, Resident
from kvchat.residence.tiers import Tiers

LAYERS, HEADS, DIM = 5, 2, 32
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def pool() -> Iterator[Executor]:
    with ThreadPoolExecutor(3) as pool:
        yield pool


class Frames:
    """A store of frames."""

    def __init__(self) -> None:
        self.blobs: dict[tuple[str, int, int], bytes] = {}

    def __call__(self, name: str, chunks: Sequence[int]) -> Iterator[tuple[int, int, Callable[[], bytes]]]:
        for (segment, chunk, group), blob in sorted(self.blobs.items()):
            if segment == name and chunk in chunks:
                yield chunk, group, partial(bytes, blob)


def segments(
    frames: Frames,
    codecs: Sequence[str],
    lengths: Sequence[int],
    large: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> list[Resident]:
    """Segments one after the other, of random KV with ragged ranks, two of three chunks held of every second."""
    source, numbers, start, residents = np.random.default_rng(0), torch.Generator().manual_seed(0), 0, []
    for index, tokens in enumerate(lengths):
        chunk_of = source.integers(0, 3, (LAYERS, HEADS, tokens)).astype(np.uint8)
        chunk_of[1, 0] = 2  # a head without rows in the better chunks
        chunk_of[0, 0, 0] = 0
        kv: list[list[Tensor]] = [
            [torch.randn(HEADS, tokens, DIM, generator=numbers).to(dtype) for _ in range(LAYERS)] for _ in range(2)
        ]
        if index == large:
            kv[1][2] *= 1e6  # scales that float16 does not hold
        header, made = encode_segment(codecs, *kv, Ranking(start, chunk_of))
        frames.blobs |= {(str(index), chunk, group): blob for chunk, group, blob in made}
        residents.append(Resident(str(index), header, start + tokens, 3 - index % 2))
        start += tokens
    return residents


def new_tiers(frames: Frames, pool: Executor, dtype: torch.dtype = torch.bfloat16) -> Tiers:
    return Tiers(SegmentedCache(LAYERS, HEADS, DIM, dtype, DEVICE, decoded), frames, pool)


def assert_same(one: SegmentedCache, other: SegmentedCache) -> None:
    assert (one.num_seen, one.pieces, one.sealed_bytes) == (other.num_seen, other.pieces, other.sealed_bytes)
    for left, right in zip(one.layers, other.layers, strict=True):
        assert len(left.forms) == len(right.forms)
        for a, b in zip(left.forms, right.forms, strict=True):
            for field in fields(a):
                x, y = getattr(a, field.name), getattr(b, field.name)
                if isinstance(x, Tensor):
                    assert x.dtype == y.dtype and torch.equal(x, y), field.name
                else:
                    assert np.array_equal(x, y), field.name


@pytest.mark.parametrize(
    "codecs",
    [["k8v8"], ["k4v4"], ["k8v4"], ["raw"], ["k8v8", "k4v4", "eb2"], ["k4v4", "raw", "k8v8"], ["eb5"]],
    ids=",".join,
)
@pytest.mark.parametrize("batch", [1, 40_000, loading.BATCH_BYTES])
def test_all_at_once_is_as_one_by_one(
    pool: Executor, monkeypatch: pytest.MonkeyPatch, codecs: list[str], batch: int
) -> None:
    monkeypatch.setattr(loading, "BATCH_BYTES", batch)
    monkeypatch.setattr("kvchat.codecs.codec._FRAME_BYTES", 12_000)
    frames = Frames()
    residents = segments(frames, codecs, [70, 33, 150, 1, 40])
    assert residents[2].header.num_groups > 1 == residents[3].header.num_groups
    together, single = new_tiers(frames, pool), new_tiers(frames, pool)
    assert together._assemble(residents) == 5
    for resident in residents:
        single.add({resident: single.load(resident).pieces()})
    assert_same(together.cache, single.cache)
    assert together.residents == single.residents


def test_what_is_brought_shrinks_grows_and_is_cut_like_all_else(pool: Executor) -> None:
    frames = Frames()
    residents = segments(frames, ["k8v8", "k4v4"], [70, 90, 60])
    together, single = new_tiers(frames, pool), new_tiers(frames, pool)
    assert together._assemble(residents) == 3
    single.add({resident: single.load(resident).pieces() for resident in residents})
    for tiers in (together, single):
        assert not tiers.hold({"0": 1, "1": 3})
        tiers.crop(200)
    assert_same(together.cache, single.cache)


def test_a_damaged_frame_leaves_what_is_before_it(pool: Executor) -> None:
    frames = Frames()
    residents = segments(frames, ["k8v8"], [70, 90, 60])
    place = ("1", 0, 0)
    frames.blobs[place] = frames.blobs[place][:-1] + b"\0\0"
    tiers, single = new_tiers(frames, pool), new_tiers(frames, pool)
    assert tiers._assemble(residents) == 0
    assert not tiers.residents and not tiers.cache.num_seen and not tiers.cache.pieces
    assert tiers.bring(residents) == 1
    single.add({residents[0]: single.load(residents[0]).pieces()})
    assert_same(tiers.cache, single.cache)
    with pytest.raises(CorruptFrame):
        tiers.load(residents[1]).pieces()


def test_scales_that_float16_does_not_hold_go_the_other_way(pool: Executor) -> None:
    frames = Frames()
    residents = segments(frames, ["k8v8"], [70, 90], large=1, dtype=torch.float32)
    tiers = new_tiers(frames, pool, torch.float32)
    assert tiers._assemble(residents) == 0
    tiers.add({one: tiers.load(one).pieces() for one in residents})
    assert tiers.cache.layers[2].forms[0].value_scale.dtype == torch.float32


def test_a_segment_used_in_part_is_cut_and_those_behind_it_are_left(pool: Executor) -> None:
    frames = Frames()
    first, second, third = segments(frames, ["k8v8", "k4v4"], [70, 90, 60])
    cut = Resident(second.id, second.header, 100, second.chunks)
    together, single = new_tiers(frames, pool), new_tiers(frames, pool)
    assert together._assemble([first, cut, third]) == 2
    for resident in (first, cut):
        single.add({resident: single.load(resident).pieces()})
    assert_same(together.cache, single.cache)
    assert together.residents == [first, cut] and together.cache.num_seen == 100
    assert together._assemble([third]) == 0, "only an empty cache takes all at once"


def test_other_frames_than_the_header_says_are_damage(pool: Executor) -> None:
    for change in (lambda blobs: blobs.pop(("1", 0, 0)), lambda blobs: blobs.update({("1", 0, 7): b""})):
        frames = Frames()
        residents = segments(frames, ["k8v8"], [70, 90])
        change(frames.blobs)
        assert new_tiers(frames, pool)._assemble(residents) == 0


def test_segments_of_which_nothing_is_stored_are_not_brought(pool: Executor) -> None:
    frames = Frames()
    residents = [replace(one, chunks=0) for one in segments(frames, ["k8v8"], [70])]
    assert new_tiers(frames, pool)._assemble(residents) == 0


def test_plain_rows_are_not_brought(pool: Executor) -> None:
    frames = Frames()
    residents = segments(frames, ["k8v8"], [70])
    cache = SegmentedCache(LAYERS, HEADS, DIM, torch.bfloat16, DEVICE)
    assert Tiers(cache, frames, pool)._assemble(residents) == 0


SPANS = [((10, 14), (40, 66)), ((75, 160),), ((165, 166), (200, 215))]


@pytest.mark.parametrize("encoded", [True, False])
@pytest.mark.parametrize("codecs", [["raw"], ["k8v8"], ["k4v4"], ["k8v4", "k4v4", "raw"]])
def test_some_tokens_of_several_segments_come_together_as_one_by_one(
    pool: Executor, monkeypatch: pytest.MonkeyPatch, codecs: list[str], encoded: bool
) -> None:
    monkeypatch.setattr("kvchat.codecs.codec._FRAME_BYTES", 12_000)
    frames = Frames()
    residents = segments(frames, codecs, [70, 90, 60])
    parts = {str(index): Part(spans) for index, spans in enumerate(SPANS)}

    def held(tiers: Tiers) -> list[LayerKV]:
        tiers.bring(residents)
        tiers.crop(210)  # inside the last segment and span
        assert not tiers.hold({"0": 3, "1": 3, "2": 2}, parts)
        some = [layer.sealed for layer in tiers.cache.layers]
        assert not tiers.hold({"0": 1, "1": 3, "2": 3})
        return some + [layer.sealed for layer in tiers.cache.layers]

    decode = decoded if encoded else None
    together, single = (
        Tiers(SegmentedCache(LAYERS, HEADS, DIM, torch.bfloat16, DEVICE, decode), frames, pool) for _ in "ab"
    )
    found = held(together)
    monkeypatch.setattr("kvchat.residence.tiers.excerpts", refused)
    for one, other in zip(found, held(single), strict=True):
        assert torch.equal(one.keys, other.keys) and torch.equal(one.values, other.values)
        assert torch.equal(one.positions, other.positions) and one.bounds == other.bounds


def refused(*_: object) -> None:
    raise CorruptFrame("one by one")


def test_damage_in_what_comes_together_costs_that_segment_alone(pool: Executor) -> None:
    frames = Frames()
    residents = segments(frames, ["k8v8"], [70, 90, 60])
    tiers = new_tiers(frames, pool)
    tiers.bring(residents)
    frames.blobs["1", 1, 0] = frames.blobs["1", 1, 0][:-1] + b"\0\0"
    damaged = tiers.hold({"0": 3, "1": 3, "2": 2}, {str(index): Part(spans) for index, spans in enumerate(SPANS)})
    assert [one.start for one in damaged] == [70]
    assert {piece.start for piece in tiers.cache.pieces} == {10, 40, 165, 200}
    assert [one.start for one in tiers.residents] == [0, 160]


@pytest.mark.parametrize("codec", ["k8v8", "k4v4", "raw"])
def test_a_piece_without_rows_in_some_layers_is_in_all_of_them(
    pool: Executor, monkeypatch: pytest.MonkeyPatch, codec: str
) -> None:
    frames = Frames()
    residents = segments(frames, [codec], [70, 90, 60])
    tiers = new_tiers(frames, pool)
    tiers.bring(residents)
    monkeypatch.setattr("kvchat.residence.tiers.excerpts", refused)
    assert not tiers.hold({"0": 3, "1": 3, "2": 2}, {"1": Part(((75, 77),))})
    assert tiers.cache.is_whole and len([piece for piece in tiers.cache.pieces if piece.start == 75]) == 3
    assert sum(tiers.cache.rows(piece) for piece in tiers.cache.pieces if piece.start == 75) > 0
