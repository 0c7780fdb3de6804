"""Frames find damage, `raw` is exact, `k8v8` stays within half a step, and decoding depends on nothing but bytes.

What codecs of fewer bits do besides is in test_ladder.py.
"""

from __future__ import annotations

import hashlib
import struct
import subprocess
import sys
import tracemalloc
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import msgpack
import numpy as np
import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvchat.cache.segment import Ranking
from kvchat.codecs import CODECS, SegmentHeader, decode_frame, encode_segment
from kvchat.codecs.encode import _read
from kvchat.codecs.frame import Planes, check, pack, unpack
from kvchat.errors import CodecError, CorruptFrame, UnknownCodec

CPU = torch.device("cpu")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
Frames = list[tuple[int, int, bytes]]


def normal(layers: int, heads: int, tokens: int, dim: int, dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randn(layers, heads, tokens, dim, generator=generator).to(dtype))


def random_ranking(layers: int, heads: int, tokens: int, chunks: int, start: int = 0) -> Ranking:
    return Ranking(start, np.random.default_rng(0).integers(0, chunks, (layers, heads, tokens), dtype=np.uint8))


def encode(
    codec: str | Sequence[str], keys: Sequence[Tensor], values: Sequence[Tensor], ranking: Ranking
) -> tuple[bytes, Frames]:
    header, frames = encode_segment(codec, keys, values, ranking)
    return header.to_bytes(), list(frames)


def decode(header_bytes: bytes, frames: Frames, chunks: Sequence[int] | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Dense keys, values (L, H, T, D) and how often each pair occurred (L, H, T)."""
    header = SegmentHeader.from_bytes(header_bytes)
    shape = header.ranking.chunk_of.shape
    keys = torch.zeros(*shape, header.head_dim, dtype=header.dtype)
    values, seen = torch.zeros_like(keys), torch.zeros(shape, dtype=torch.int64)
    for chunk, group, blob in frames:
        if chunks is not None and chunk not in chunks:
            continue
        for layer, kv in enumerate(decode_frame(header, chunk, group, blob, CPU), header.layers(group)[0]):
            for head in range(header.num_kv_heads):
                rows = slice(int(kv.cu_seqlens[head]), int(kv.cu_seqlens[head + 1]))
                times = kv.positions[rows].long() - header.ranking.start
                assert bool((times.diff() > 0).all())
                keys[layer, head, times] = kv.keys[rows]
                values[layer, head, times] = kv.values[rows]
                seen[layer, head, times] += 1
    return keys, values, seen


def bits(x: Tensor) -> Tensor:
    return x.view({2: torch.int16, 4: torch.int32}[x.dtype.itemsize])


def forge(described: list[Any], body: bytes = b"", version: int = 1) -> bytes:
    """A frame with a right checksum, whatever it says."""
    header: bytes = msgpack.packb([{}, described])
    rest = struct.pack("<BI", version, len(header)) + header + body
    return signed(rest)


def signed(rest: bytes) -> bytes:
    return b"KVCF" + hashlib.sha256(rest).digest()[:16] + rest


# Frames


def test_a_frame_returns_what_it_was_given() -> None:
    planes: Planes = {
        "codes": np.random.default_rng(0).integers(0, 256, (300, 7), dtype=np.uint8),
        "zeros": np.zeros((4, 1000), np.float32),
        "nothing": np.zeros((0, 64), np.float16),
        "backwards": np.arange(10, dtype=np.uint16)[::-1],
    }
    head, back = unpack(pack({"a": 1, "b": "x"}, planes), limit=1 << 20)
    assert head == {"a": 1, "b": "x"}
    assert list(back) == list(planes)
    for name, plane in planes.items():
        assert back[name].dtype == plane.dtype
        np.testing.assert_array_equal(back[name], plane)


def test_a_plane_is_compressed_only_where_it_pays() -> None:
    noise = np.random.default_rng(0).integers(0, 128, 10_000, dtype=np.uint8)
    assert len(pack({}, {"x": noise})) < 9_000
    assert len(pack({}, {"x": noise}, {"x": 0.8})) > 10_000
    assert len(pack({}, {"x": np.zeros(10_000, np.uint8)}, {"x": 0})) > 10_000


def test_a_raw_plane_is_read_in_place() -> None:
    blob = pack({}, {"x": np.arange(100, dtype=np.uint8)}, {"x": 0})
    plane = unpack(blob, limit=100)[1]["x"]
    assert not plane.flags.owndata and not plane.flags.writeable


@settings(max_examples=300, deadline=None)
@given(where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), of_header=st.booleans())
def test_a_flipped_bit_is_found(where: float, bit: int, of_header: bool) -> None:
    header, frames = encode(
        "k8v8", normal(2, 2, 5, 4, DTYPES[0]), normal(2, 2, 5, 4, DTYPES[0]), random_ranking(2, 2, 5, 2)
    )
    damaged = bytearray(header if of_header else frames[0][2])
    damaged[int(where * len(damaged))] ^= 1 << bit
    with pytest.raises(CorruptFrame):
        check(bytes(damaged))
    with pytest.raises(CorruptFrame):
        if of_header:
            SegmentHeader.from_bytes(bytes(damaged))
        else:
            decode_frame(SegmentHeader.from_bytes(header), 0, 0, bytes(damaged), CPU)


def test_a_cut_or_lengthened_frame_is_found() -> None:
    blob = pack({"a": 1}, {"x": np.arange(9, dtype=np.uint8)})
    for length in range(len(blob)):
        with pytest.raises(CorruptFrame):
            check(blob[:length])
    with pytest.raises(CorruptFrame):
        check(blob + b"\0")


@pytest.mark.parametrize(
    ("described", "body"),
    [
        ([["x", "|u1", [1 << 40], "zstd", 20]], b"0" * 20),
        ([["x", "|u1", [1 << 40], "raw", 20]], b"0" * 20),
        ([["x", "|u1", [1 << 62, 1 << 62], "raw", 20]], b"0" * 20),
        ([["x", "|u1", [20], "raw", 1 << 40]], b"0" * 20),
        ([["x", "|u1", [20], "raw", 20]], b"0" * 21),
        ([["x", "|u1", [-20], "raw", -20]], b""),
        ([["x", "|O8", [20], "raw", 160]], b"0" * 160),
        ([["x", "|u1", [20], "lzma", 20]], b"0" * 20),
        ([["x", "|u1", [1] * 5, "raw", 1]], b"0"),
        ([["x", "|u1", [20], "zstd", 20]], b"0" * 20),
        ([["x", "|u1", 20, "raw", 20]], b"0" * 20),
        ([["x"]], b""),
        ([7], b""),
    ],
)
def test_a_frame_that_lies_about_its_planes_is_refused(described: list[Any], body: bytes) -> None:
    with pytest.raises(CorruptFrame):
        unpack(forge(described, body), limit=1000)


@pytest.mark.parametrize("claimed", [1 << 40, 10, None])
def test_a_zstd_plane_of_another_size_is_refused_before_it_is_unpacked(claimed: int | None) -> None:
    packed = zstandard.ZstdCompressor(write_content_size=claimed is not None).compress(bytes(10))
    if claimed is not None and claimed > 10:
        # Single-segment frame header with an 8-byte content size, then the same block.
        assert packed[4] == 0x20
        packed = packed[:4] + b"\xe0" + struct.pack("<Q", claimed) + packed[6:]
    size = 20 if claimed == 10 else 10
    with pytest.raises(CorruptFrame, match="zstd frame"):
        unpack(forge([["x", "|u1", [size], "zstd", len(packed)]], packed), limit=1000)


@pytest.mark.parametrize(
    "header", [b"\xc1", b"\x92\x80", b"\xdd\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff", b"\x01", b""]
)
def test_a_header_that_is_no_msgpack_list_is_refused(header: bytes) -> None:
    rest = struct.pack("<BI", 1, len(header)) + header
    with pytest.raises(CorruptFrame):
        unpack(signed(rest), limit=1000)


def test_a_newer_format_is_named_and_is_no_damage() -> None:
    with pytest.raises(UnknownCodec, match=r"version 2, this program reads 1"):
        check(forge([], version=2))


def test_an_unknown_codec_is_named_with_the_known_ones() -> None:
    keys = normal(1, 1, 3, 4, torch.bfloat16)
    with pytest.raises(UnknownCodec, match=r"'k1v1'.*raw, k8v8"):
        encode_segment("k1v1", keys, keys, Ranking.single(0, 1, 1, 3))
    header, _ = encode_segment("raw", keys, keys, Ranking.single(0, 1, 1, 3))
    with pytest.raises(UnknownCodec, match="'k1v1'"):
        SegmentHeader.from_bytes(replace(header, codecs=("k1v1",)).to_bytes())


def test_frames_are_read_without_torch() -> None:
    code = "import sys, kvchat.codecs.frame; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# Segments

SOME = ("raw", "k8v8", "k4v4", "k3v2", "k2v2")

AWKWARD = [(1, 1, 1, 1), (1, 1, 1, 64), (3, 2, 7, 5), (30, 3, 1, 64), (2, 1, 33, 96)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", AWKWARD, ids=str)
def test_raw_is_bit_exact(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    keys, values = normal(*shape, dtype, 1), normal(*shape, dtype, 2)
    out_keys, out_values, seen = decode(*encode("raw", keys, values, random_ranking(*shape[:3], 3, start=1000)))
    assert bool((seen == 1).all())
    assert torch.equal(bits(out_keys), bits(torch.stack(keys)))
    assert torch.equal(bits(out_values), bits(torch.stack(values)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_raw_keeps_every_bit_pattern(dtype: torch.dtype) -> None:
    integer = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    patterns = torch.arange(1 << 16).to(torch.int16).to(integer)
    if dtype == torch.float32:
        patterns = torch.cat([patterns, patterns << 16])
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0], dtype=dtype)
    x = [torch.cat([patterns.view(dtype), special]).reshape(2, -1, 2)]
    keys, values, _ = decode(*encode("raw", x, x, random_ranking(1, 2, x[0].shape[1], 2)))
    assert torch.equal(bits(keys[0]), bits(x[0])) and torch.equal(bits(values[0]), bits(x[0]))


def half_a_step(x: Tensor, dim: int) -> Tensor:
    """Of 255 steps from min to max, with room for scale and min being rounded."""
    low, high = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    return 0.5 * (high - low + low.abs() / 512) / 255 * 1.004 + 1e-6 * x.abs().amax() + 2.0**-24


@pytest.mark.parametrize("shape", AWKWARD, ids=str)
@pytest.mark.parametrize(
    ("factor", "offset"), [(1.0, 0.0), (1e-4, 0.0), (3.0, 100.0), (1.0, -1e5), (1e6, 0.0), (0.0, 7.3)]
)
def test_k8v8_stays_within_half_a_step(shape: tuple[int, int, int, int], factor: float, offset: float) -> None:
    keys = torch.stack(normal(*shape, torch.float32, 1)) * factor
    keys[..., ::3] += offset
    values = torch.stack(normal(*shape, torch.float32, 2)) * factor + offset
    out_keys, out_values, seen = decode(*encode("k8v8", list(keys), list(values), random_ranking(*shape[:3], 3)))
    assert bool((seen == 1).all())
    assert bool(((out_keys - keys).abs() <= half_a_step(keys, 2)).all())
    assert bool(((out_values - values).abs() <= half_a_step(values, 3)).all())


def test_k8v8_keeps_biased_key_channels() -> None:
    keys = torch.stack(normal(2, 2, 512, 64, torch.float32))
    keys[..., ::8] += 100
    out, _, _ = decode(*encode("k8v8", list(keys), list(keys), random_ranking(2, 2, 512, 5)))
    step = (keys.amax(2, keepdim=True) - keys.amin(2, keepdim=True)) / 255
    assert bool(((out - keys).abs() <= 0.501 * step + 1e-5).all())


def test_k8v8_writes_constants_exactly() -> None:
    for constant in (0.0, 1.0, -3.5):
        x = [torch.full((2, 9, 4), constant)]
        keys, values, _ = decode(*encode("k8v8", x, x, Ranking.single(0, 1, 2, 9)))
        assert torch.equal(keys[0], x[0]) and torch.equal(values[0], x[0])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("side", ["keys", "values"])
@pytest.mark.parametrize("codec", ["k8v8", "k4v4"])
def test_what_is_not_finite_is_refused(codec: str, side: str, bad: float) -> None:
    kv = {"keys": normal(3, 2, 8, 4, torch.bfloat16), "values": normal(3, 2, 8, 4, torch.bfloat16)}
    kv[side][1][1, 3, 2] = bad
    with pytest.raises(CodecError, match=f"{side} of layer 1 .*codec raw"):
        encode_segment(codec, kv["keys"], kv["values"], Ranking.single(0, 3, 2, 8))


@pytest.mark.parametrize("codec", SOME)
def test_encoding_leaves_its_input_alone(codec: str) -> None:
    keys, values = normal(2, 2, 20, 8, torch.float32, 1), normal(2, 2, 20, 8, torch.float32, 2)
    encode(codec, keys, values, random_ranking(2, 2, 20, 2))
    assert torch.equal(torch.stack(keys), torch.stack(normal(2, 2, 20, 8, torch.float32, 1)))
    assert torch.equal(torch.stack(values), torch.stack(normal(2, 2, 20, 8, torch.float32, 2)))


@pytest.mark.parametrize("codec", ["raw", "k8v8", "k8v4", "k8v3"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_chunks_together_are_the_whole_segment(codec: str, dtype: torch.dtype) -> None:
    keys, values = normal(4, 2, 40, 16, dtype, 1), normal(4, 2, 40, 16, dtype, 2)
    whole = decode(*encode(codec, keys, values, Ranking.single(5, 4, 2, 40)))
    header, frames = encode(codec, keys, values, random_ranking(4, 2, 40, 7, start=5))
    chunked = decode(header, frames)
    assert all(torch.equal(a, b) for a, b in zip(whole, chunked, strict=True))
    parts = [decode(header, frames, [chunk]) for chunk in range(7)]
    assert torch.equal(torch.stack([part[0] for part in parts]).sum(0), whole[0])


@pytest.mark.parametrize("codec", SOME)
def test_a_head_may_have_nothing_in_a_chunk_and_a_chunk_nothing_at_all(codec: str) -> None:
    chunk_of = np.full((3, 2, 6), 3, np.uint8)
    chunk_of[1, 0] = 0
    chunk_of[2, 1, 4] = 1
    x = normal(3, 2, 6, 4, torch.bfloat16)
    header, frames = encode(codec, x, x, Ranking(0, chunk_of))
    assert [(chunk, group) for chunk, group, _ in frames] == [(0, 0), (1, 0), (2, 0), (3, 0)]
    assert bool((decode(header, frames)[2] == 1).all())
    best = decode_frame(SegmentHeader.from_bytes(header), 0, 0, frames[0][2], CPU)
    assert [kv.num_kept for kv in best] == [0, 6, 0]
    assert best[1].cu_seqlens.tolist() == [0, 6, 6]


@pytest.mark.parametrize("codec", SOME)
def test_decoding_is_the_same_every_time_whatever_the_threads(codec: str) -> None:
    keys, values = normal(6, 3, 700, 64, torch.bfloat16, 1), normal(6, 3, 700, 64, torch.bfloat16, 2)
    header, frames = encode(codec, keys, values, random_ranking(6, 3, 700, 2))
    threads = torch.get_num_threads()
    try:
        runs = []
        for count in (1, 2, 2):
            torch.set_num_threads(count)
            runs.append([decode_frame(SegmentHeader.from_bytes(header), *frame, CPU) for frame in frames])
    finally:
        torch.set_num_threads(threads)
    for run in runs[1:]:
        for ours, first in zip(run, runs[0], strict=True):
            for a, b in zip(ours, first, strict=True):
                assert torch.equal(bits(a.keys), bits(b.keys)) and torch.equal(bits(a.values), bits(b.values))
                assert torch.equal(a.positions, b.positions) and torch.equal(a.cu_seqlens, b.cu_seqlens)


def test_a_code_times_its_scale_is_exact_in_float32() -> None:
    x = normal(2, 2, 64, 16, torch.float32)
    header, _ = encode_segment("k8v8", x, x, Ranking.single(0, 2, 2, 64))
    scale = torch.from_numpy(header.params["key_scale"]).unsqueeze(-1)
    codes = torch.arange(256)
    assert torch.equal((scale * codes).double(), scale.double() * codes)


@pytest.mark.parametrize("codec", SOME)
def test_decoding_warns_of_nothing_and_gives_tensors_of_its_own(codec: str) -> None:
    x = normal(2, 2, 9, 8, torch.bfloat16)
    header, frames = encode(codec, x, x, random_ranking(2, 2, 9, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for kv in decode_frame(SegmentHeader.from_bytes(header), *frames[0], CPU):
            kv.keys.zero_()
            kv.values.zero_()
    assert bool((decode(header, frames)[2] == 1).all())


def test_a_frame_of_another_place_is_refused() -> None:
    x = normal(2, 2, 8, 4, torch.bfloat16)
    header, frames = encode_segment("k8v8", x, x, random_ranking(2, 2, 8, 2))
    blobs = [blob for *_, blob in frames]
    with pytest.raises(CorruptFrame):
        decode_frame(header, 0, 0, blobs[1], CPU)
    other, _ = encode_segment("raw", x, x, random_ranking(2, 2, 8, 2))
    with pytest.raises(CorruptFrame):
        decode_frame(other, 0, 0, blobs[0], CPU)
    with pytest.raises(CorruptFrame):
        SegmentHeader.from_bytes(blobs[0])
    with pytest.raises(CorruptFrame):
        decode_frame(header, 0, 0, header.to_bytes(), CPU)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("codec", [name for name in CODECS if name != "raw"])
def test_a_plane_that_is_not_finite_is_refused(codec: str, bad: float) -> None:
    x = normal(2, 2, 40, 16, torch.float32)
    header, frames = encode_segment(codec, x, x, random_ranking(2, 2, 40, 2))
    head, planes = unpack(next(frames)[2], limit=1 << 20)
    lies = []
    for name, plane in planes.items():
        if plane.dtype.kind == "f":
            lies.append({**planes, name: np.where(np.arange(plane.size).reshape(plane.shape) == 3, bad, plane)})
        elif name.endswith(("_step", "_min")):  # bytes of float16, apart
            broken = plane.copy()
            broken.reshape(2, -1)[:, 3] = np.frombuffer(np.float16(bad).tobytes(), np.uint8)
            lies.append({**planes, name: broken})
    assert lies
    for lie in lies:
        kept = {name: plane.astype(planes[name].dtype) for name, plane in lie.items()}
        with pytest.raises(CorruptFrame, match="not finite"):
            decode_frame(header, 0, 0, pack(head, kept), CPU)


def test_a_header_that_is_not_finite_is_refused() -> None:
    x = normal(2, 2, 8, 4, torch.bfloat16)
    header, _ = encode_segment("k8v8", x, x, Ranking.single(0, 2, 2, 8))
    for name in ("key_scale", "key_min"):
        broken = np.full_like(header.params[name], np.nan)
        with pytest.raises(CorruptFrame, match=f"'{name}' holds numbers that are not finite"):
            SegmentHeader.from_bytes(replace(header, params={**header.params, name: broken}).to_bytes())


@pytest.mark.parametrize("codec", ["k8v8", "k4v4", "k2v2"])
def test_finite_planes_that_decode_to_infinity_are_refused(codec: str) -> None:
    x = normal(2, 2, 40, 16, torch.bfloat16)
    header, frames = encode_segment(codec, x, x, random_ranking(2, 2, 40, 2))
    head, planes = unpack(next(frames)[2], limit=1 << 20)
    planes["value_scale"] = np.full(planes["value_scale"].shape, 3e38, np.float32)
    if "value_min" in planes:
        planes["value_min"] = planes["value_min"].astype(np.float32)
    with pytest.raises(CorruptFrame, match="decodes to numbers that are not finite"):
        decode_frame(header, 0, 0, pack(head, planes), CPU)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("part", [1.0, 0.99])
def test_what_k8v8_writes_it_can_read(dtype: torch.dtype, part: float) -> None:
    x = torch.stack(normal(1, 1, 40, 16, dtype)) * 0.1
    x[0, 0, 3] = part * torch.finfo(dtype).max
    if part == 1:
        with pytest.raises(CodecError, match="use codec raw"):
            encode("k8v8", list(x), list(x), Ranking.single(0, 1, 1, 40))
    else:
        keys, values, _ = decode(*encode("k8v8", list(x), list(x), Ranking.single(0, 1, 1, 40)))
        assert bool(keys.isfinite().all()) and bool(values.isfinite().all())


def huge_header(tokens: int, head_dim: int = 4) -> bytes:
    """A few bytes that say they rank so many tokens of two layers with two heads."""
    head = {"kind": "segment", "codec": "raw", "dtype": "bfloat16", "head_dim": head_dim, "start": 0, "group_size": 2}
    return pack(head, {"chunk_of": np.zeros((2, 2, tokens), np.uint8)})


def test_a_header_takes_no_more_than_its_segment_needs() -> None:
    blob = huge_header(1 << 24)
    assert len(blob) < 10_000
    tracemalloc.start()
    try:
        for shape in (None, (2, 2, 4)):
            tracemalloc.reset_peak()
            with pytest.raises(CorruptFrame, match="are expected"):
                SegmentHeader.from_bytes(blob, b"", (0, 541), shape)
            assert tracemalloc.get_traced_memory()[1] < 1 << 20
        tracemalloc.reset_peak()
        assert SegmentHeader.from_bytes(blob).ranking.num_chunks == 1
        # The ranking, and not eight bytes for each of its pairs.
        assert tracemalloc.get_traced_memory()[1] < 3 << 26
    finally:
        tracemalloc.stop()


def test_a_header_of_another_segment_or_model_is_refused() -> None:
    blob = huge_header(100)
    assert SegmentHeader.from_bytes(blob, b"", (0, 100), (2, 2, 4)).ranking.end == 100
    for span, shape in (((0, 99), None), ((1, 101), None), ((0, 100), (2, 3, 4)), ((0, 100), (2, 2, 8))):
        with pytest.raises(CorruptFrame, match="the header is of"):
            SegmentHeader.from_bytes(blob, b"", span, shape)
    for head_dim in (0, 1 << 13, 1 << 62):
        with pytest.raises(CorruptFrame, match="not a segment's header"):
            SegmentHeader.from_bytes(huge_header(100, head_dim))


def test_pairs_are_counted_by_chunk() -> None:
    chunk_of = np.random.default_rng(0).choice([0, 1, 7], (3, 2, 400_000)).astype(np.uint8)
    sizes = Ranking(0, chunk_of).sizes
    np.testing.assert_array_equal(sizes, np.bincount(chunk_of.reshape(-1)))


def test_codecs_read_a_segment_without_a_copy_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    keys, values = normal(2, 2, 40, 16, torch.bfloat16, 1), normal(2, 2, 40, 16, torch.bfloat16, 2)
    copies, stack = list[int](), torch.stack

    def counted(tensors: Any) -> Tensor:
        stacked = stack(tensors)
        copies.append(stacked.numel())
        return stacked

    monkeypatch.setattr(torch, "stack", counted)
    _read([CODECS[name] for name in ("eb2", "k4v4", "eb5", "k3v2", "eb10")], keys, values)
    assert [size for size in copies if size > 1000] == []


@pytest.mark.parametrize("missing", ["chunk_of", "key_scale"])
def test_a_header_without_a_plane_is_refused(missing: str) -> None:
    x = normal(2, 2, 8, 4, torch.bfloat16)
    header, _ = encode_segment("k8v8", x, x, Ranking.single(0, 2, 2, 8))
    head, planes = unpack(header.to_bytes(), limit=1 << 20)
    del planes[missing]
    with pytest.raises(CorruptFrame):
        SegmentHeader.from_bytes(pack(head, planes))


def test_a_header_survives_its_bytes() -> None:
    x = normal(4, 2, 8, 4, torch.float16)
    header, _ = encode_segment("k8v8", x, x, random_ranking(4, 2, 8, 3, start=77))
    back = SegmentHeader.from_bytes(header.to_bytes())
    assert (back.codecs, back.dtype, back.head_dim, back.group_size) == (("k8v8",), torch.float16, 4, header.group_size)
    assert (back.num_layers, back.num_kv_heads, back.num_groups, back.ranking.start) == (4, 2, 1, 77)
    np.testing.assert_array_equal(back.ranking.chunk_of, header.ranking.chunk_of)
    assert back.to_bytes() == header.to_bytes()


def test_a_realistic_segment_is_small_and_cut_into_handy_frames() -> None:
    layers, heads, tokens, dim = 30, 3, 512, 64
    order = np.random.default_rng(0).permutation(layers * heads * tokens) / (layers * heads * tokens)
    cuts = np.searchsorted([0.1, 0.2, 0.3, 0.4, 0.5, 0.7], order, side="right")
    ranking = Ranking(0, cuts.astype(np.uint8).reshape(layers, heads, tokens))
    x = normal(layers, heads, tokens, dim, torch.bfloat16)
    header, frames = encode("k8v8", x, x, ranking)
    sizes = [len(blob) for *_, blob in frames]
    assert len(frames) == 7
    assert 256 * 1024 <= min(sizes) <= max(sizes) <= 8 * 1024 * 1024
    assert len(header) + sum(sizes) <= 0.55 * layers * heads * tokens * dim * 2 * 2


def test_a_long_segment_is_cut_into_groups_of_layers() -> None:
    x = normal(7, 2, 12000, 64, torch.bfloat16)
    header, frames = encode_segment("k8v8", x, x, Ranking.single(0, 7, 2, 12000))
    sizes = {group: len(blob) for _, group, blob in frames}
    assert header.num_groups == len(sizes) == 2
    assert max(sizes.values()) <= 16 * 1024 * 1024
    assert [header.layers(group) for group in sizes] == [(0, 4), (4, 7)]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("codec", SOME)
def test_a_gpu_writes_and_reads_the_bits_that_a_cpu_does(codec: str) -> None:
    keys, values = normal(4, 3, 600, 64, torch.bfloat16, 1), normal(4, 3, 600, 64, torch.bfloat16, 2)
    ranking = random_ranking(4, 3, 600, 3)
    header, frames = encode_segment(codec, [k.cuda() for k in keys], [v.cuda() for v in values], ranking)
    for frame in frames:
        for cpu, gpu in zip(
            decode_frame(header, *frame, CPU), decode_frame(header, *frame, torch.device("cuda")), strict=True
        ):
            assert gpu.keys.is_cuda and torch.equal(bits(cpu.keys), bits(gpu.keys.cpu()))
            assert torch.equal(bits(cpu.values), bits(gpu.values.cpu()))
            assert torch.equal(cpu.positions, gpu.positions.cpu())
