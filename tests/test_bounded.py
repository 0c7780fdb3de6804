"""Error-bounded quantisation keeps its bound whatever the numbers; no codec loses keys that a constant bias shifts."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvchat.cache.segment import Ranking
from kvchat.codecs import CODECS, SegmentHeader, decode_frame, encode_segment
from kvchat.codecs.bounded import UNIT, step_and_min
from kvchat.codecs.frame import Planes, pack, unpack
from kvchat.errors import CodecError, CorruptFrame
from tests.test_codecs import CPU, DTYPES, decode, encode, normal, random_ranking

BOUNDED = {name: int(name.removeprefix("eb")) / 100 for name in CODECS if name.startswith("eb")}
STEPS = pytest.mark.parametrize("codec", BOUNDED)


def key_ranges(keys: Tensor, chunk_of: npt.NDArray[np.uint8]) -> Tensor:
    """The range of each key's unit: its channel in up to 64 rows of its head and chunk; (L, H, T, D) float64."""
    ranges = torch.zeros(keys.shape, dtype=torch.float64)
    for layer, head in np.ndindex(chunk_of.shape[:2]):
        for chunk in np.unique(chunk_of[layer, head]):
            for unit in torch.from_numpy(np.flatnonzero(chunk_of[layer, head] == chunk)).split(UNIT):
                rows = keys[layer, head, unit].double()
                ranges[layer, head, unit] = rows.amax(0) - rows.amin(0)
    return ranges


def within(out: Tensor, exact: Tensor, ranges: Tensor, rel: float) -> bool:
    """Half a step, and the rounding of the dtype: of the result, and of sums in float32 on the way."""
    rounding = torch.finfo(exact.dtype).eps / 2 + 4 * torch.finfo(torch.float32).eps
    largest = exact.double().abs() + ranges
    allowed = 0.5 * rel * ranges * (1 + 1e-6) + rounding * largest + 2.0**-24 * (exact.dtype != torch.float32) + 1e-38
    return bool(((out.double() - exact.double()).abs() <= allowed).all())


def check_bound(codec: str, keys: Tensor, values: Tensor, ranking: Ranking) -> None:
    out_keys, out_values, seen = decode(*encode(codec, list(keys), list(values), ranking))
    assert bool((seen == 1).all())
    assert within(out_keys, keys, key_ranges(keys, ranking.chunk_of), BOUNDED[codec])
    across = values.double().amax(3, keepdim=True) - values.double().amin(3, keepdim=True)
    assert within(out_values, values, across, BOUNDED[codec])


@settings(max_examples=60, deadline=None)
@given(
    codec=st.sampled_from(sorted(BOUNDED)),
    dtype=st.sampled_from(DTYPES),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 2), st.integers(1, 140), st.integers(1, 9)),
    factor=st.sampled_from([0.0, 1e-30, 1e-6, 1e-3, 1.0, 30.0]),
    offset=st.sampled_from([0.0, 1e-5, 7.3, -100.0, 4000.0]),
    chunks=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_the_bound_holds(
    codec: str,
    dtype: torch.dtype,
    shape: tuple[int, int, int, int],
    factor: float,
    offset: float,
    chunks: int,
    seed: int,
) -> None:
    keys, values = (torch.stack(normal(*shape, torch.float32, seed + side)) * factor for side in (0, 1))
    keys[..., ::3] += offset
    values[..., ::2] += offset
    check_bound(codec, keys.to(dtype), values.to(dtype), random_ranking(*shape[:3], chunks, start=5))


@STEPS
@pytest.mark.parametrize("scale", [1e30, 1e-35])
def test_the_bound_holds_for_huge_and_tiny_numbers(codec: str, scale: float) -> None:
    x = torch.stack(normal(2, 2, 90, 8, torch.float32)) * scale
    check_bound(codec, x, x, random_ranking(2, 2, 90, 2))


@STEPS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_constants_and_single_rows_come_back_as_they_were(codec: str, dtype: torch.dtype) -> None:
    for constant in (0.0, 1.0, -3.5, 7.3, 1e-7):
        x = [torch.full((2, 70, 4), constant, dtype=dtype)]
        keys, values, _ = decode(*encode(codec, x, x, Ranking.single(0, 1, 2, 70)))
        torch.testing.assert_close(keys[0], x[0], rtol=1e-6, atol=0)
        torch.testing.assert_close(values[0], x[0], rtol=1e-6, atol=0)
    one = normal(1, 3, 1, 16, dtype)
    keys, _, _ = decode(*encode(codec, one, one, Ranking.single(0, 1, 3, 1)))
    torch.testing.assert_close(keys[0], one[0], rtol=1e-6, atol=0)


def test_the_min_is_kept_as_a_number_however_large_the_bias() -> None:
    low = torch.tensor([[100.0, 1e4, 1e6, -3.0, 0.0]])
    high = low + torch.tensor([[1.0, 0.01, 1e-1, 2.0, 0.0]])
    for some in (slice(0, 1), slice(3, 5), slice(0, 5)):
        step, least = step_and_min(low[:, some], high[:, some], 0.02)
        assert bool((least.float() <= low[:, some]).all())
        extent = high[:, some] - low[:, some]
        assert bool((step.float()[extent > 0] <= 0.02 * extent[extent > 0]).all())
        assert bool(((high[:, some] - least.float()) / step.float() <= 255.5).all())
    # The first ones fit float16; a min of 1e6 does not.
    assert step.dtype == torch.float32 and step_and_min(low[:, :1], high[:, :1], 0.02)[0].dtype == torch.float16


@STEPS
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("side", ["keys", "values"])
def test_what_is_not_finite_is_refused(codec: str, side: str, bad: float) -> None:
    kv = {"keys": normal(3, 2, 8, 4, torch.bfloat16), "values": normal(3, 2, 8, 4, torch.bfloat16)}
    kv[side][1][1, 3, 2] = bad
    with pytest.raises(CodecError, match=f"{side} of layer 1 .*codec raw"):
        encode_segment(codec, kv["keys"], kv["values"], Ranking.single(0, 3, 2, 8))


def test_coarser_steps_are_fewer_bytes() -> None:
    x = normal(4, 2, 512, 64, torch.bfloat16)
    sizes = [sum(len(blob) for *_, blob in encode(name, x, x, Ranking.single(0, 4, 2, 512))[1]) for name in BOUNDED]
    assert sizes == sorted(sizes, reverse=True)
    bits = {name: 8 * size / (2 * 4 * 2 * 512 * 64) for name, size in zip(BOUNDED, sizes, strict=True)}
    assert bits["eb2"] < 6.4 and bits["eb5"] < 5.1 and bits["eb10"] < 4.1


def hostile(planes: Planes) -> list[Planes]:
    """Planes that cannot be those of the frame they stand in for."""
    lies: list[Planes] = []
    for name, plane in planes.items():
        lies += [{**planes, name: plane[1:]}, {**planes, name: plane.astype("<u2")}]
        lies.append({key: other for key, other in planes.items() if key != name})
    lies += [{**planes, "key_step": np.zeros((3, *planes["key_step"].shape[1:]), np.uint8)}]
    return [*lies, {**planes, "more": np.zeros(1 << 20, np.uint8)}]


def test_a_hostile_frame_is_refused() -> None:
    x = normal(2, 2, 40, 16, torch.bfloat16)
    header, frames = encode_segment("eb5", x, x, random_ranking(2, 2, 40, 2))
    head, planes = unpack(next(frames)[2], limit=1 << 20)
    decode_frame(header, 0, 0, pack(head, planes), CPU)
    for lie in hostile(planes):
        with pytest.raises(CorruptFrame):
            decode_frame(header, 0, 0, pack(head, lie), CPU)


def test_decoding_is_the_same_whatever_the_threads() -> None:
    keys, values = normal(6, 3, 700, 64, torch.bfloat16, 1), normal(6, 3, 700, 64, torch.bfloat16, 2)
    header, frames = encode("eb5", keys, values, random_ranking(6, 3, 700, 2))
    threads = torch.get_num_threads()
    try:
        runs = []
        for count in (1, 2):
            torch.set_num_threads(count)
            runs.append(decode(header, frames))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))


def test_a_unit_never_crosses_a_rank_chunk() -> None:
    x = torch.stack(normal(1, 1, 60, 8, torch.float32))
    chunk_of = (np.arange(60) % 2).astype(np.uint8).reshape(1, 1, 60)
    header, frames = encode("eb5", list(x), list(x), Ranking(0, chunk_of))
    other = x.clone()
    other[:, :, 1::2] *= 100
    _, frames_2 = encode("eb5", list(other), list(other), Ranking(0, chunk_of))
    assert SegmentHeader.from_bytes(header).ranking.num_chunks == 2
    assert frames[0][2] == frames_2[0][2] and frames[1][2] != frames_2[1][2]


# Keys with a constant bias, of every codec

STEP_OF = {**{f"k{bits}": 1 / ((1 << bits) - 1) for bits in (8, 4, 3, 2)}, **BOUNDED}
"""What each codec's keys are quantised by, as a part of the range."""


def per_token(keys: Tensor, step: float) -> Tensor:
    """Keys (L, H, T, D) in as many steps, but of one range for all channels of a token: what no codec may do."""
    low, high = keys.amin(3, keepdim=True), keys.amax(3, keepdim=True)
    size = step * (high - low)
    return ((keys - low) / size).round() * size + low


def logit_error(out: Tensor, keys: Tensor) -> float:
    """Root mean square error of what queries see; what is the same for all tokens changes no attention."""
    queries = torch.randn(keys.shape[3], 32, generator=torch.Generator().manual_seed(3)) / keys.shape[3] ** 0.5
    error = (out - keys) @ queries
    return float((error - error.mean(2, keepdim=True)).square().mean().sqrt())


@pytest.mark.parametrize("codec", CODECS)
def test_a_bias_of_50_times_the_spread_costs_attention_nothing(codec: str) -> None:
    plain = torch.stack(normal(2, 2, 256, 64, torch.float32))
    biased = plain.clone()
    biased[..., ::8] += 50 * torch.tensor([1.0, -1.0]).repeat(4)
    ranking = random_ranking(2, 2, 256, 3)
    out, out_biased = (decode(*encode(codec, list(x), list(plain), ranking))[0] for x in (plain, biased))
    bound = 1.1 * logit_error(out, plain) + 1e-3
    assert logit_error(out_biased, biased) < bound
    if codec != "raw":
        step = STEP_OF[codec if codec in BOUNDED else codec[:2]]
        assert logit_error(per_token(biased, step), biased) > 4 * bound
