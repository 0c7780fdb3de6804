"""The decode kernel against the reference; in Triton's interpreter where there is no GPU."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

GPU = torch.cuda.is_available()
pytest.importorskip("triton", reason="Triton is not installed")

from kvchat.attention import reference  # noqa: E402
from kvchat.attention.ragged_decode import DecodePlan, Shape, Tuning, ragged_decode  # noqa: E402
from kvchat.attention.worklist import WorkList  # noqa: E402
from kvchat.cache.coded import CodedKV, Form  # noqa: E402
from kvchat.cache.pack import pack  # noqa: E402
from kvchat.cache.segment import LayerKV, Ranking  # noqa: E402
from kvchat.codecs.coded import coded_frame, decoded  # noqa: E402
from kvchat.codecs.encode import decode_frame, encode_segment  # noqa: E402

DEVICE = torch.device("cuda" if GPU else "cpu")
CPU = torch.device("cpu")
CODECS = {"raw": Form(16, 16), "k8v8": Form(8, 8), "k8v4": Form(8, 4), "k4v4": Form(4, 4)}


def coded(codec: str, chunk_of: np.ndarray, head_dim: int, dtype: torch.dtype, size: float = 1.0) -> CodedKV:
    """Random rows of one layer and segments (S, H, T) of a ranking; what is in chunk 9 is not held."""
    generator = torch.Generator().manual_seed(chunk_of.size + head_dim)
    pieces = []
    for index, one in enumerate(chunk_of):
        bias = 5 * torch.randn(len(one), 1, head_dim, generator=generator)
        keys, values = (torch.randn(*one.shape, head_dim, generator=generator) for _ in range(2))
        ranking = Ranking(index * one.shape[1], one[None])
        header, frames = encode_segment(codec, [(keys + bias).to(dtype)], [(values * size).to(dtype)], ranking)
        pieces += [coded_frame(header, *frame)[0] for frame in frames if frame[0] < 9]
    return pack(pieces, [piece.runs for piece in pieces], torch.device("cpu"))


def ranked(heads: int, tokens: int, seed: int, segments: int = 2) -> np.ndarray:
    """Chunks 0, 1 and 9; the last head keeps nothing, the one before it one row."""
    chunk_of = np.random.default_rng(seed).choice(np.array([0, 1, 9], np.uint8), (segments, heads, tokens))
    chunk_of[:, -1] = 9
    if heads > 2:
        chunk_of[:, -2] = 9
        chunk_of[0, -2, 3] = 0
    chunk_of[:, 0, 0] = 0
    chunk_of[:, 0, 1] = 1
    return chunk_of


def exact(part: CodedKV) -> LayerKV:
    """What the codes stand for, in float32, unrounded."""
    names = ("keys", "values")
    plain = {name: getattr(part, name) for name in names}
    plain = {name: rows.float() if rows.dtype == part.dtype else rows for name, rows in plain.items()}
    return decoded(CodedKV(**{**vars(part), **plain, "dtype": torch.float32}))


def tails(heads: int, length: int, head_dim: int, dtype: torch.dtype, room: int = 40) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values with NaN beyond `length`, and `length`."""
    generator = torch.Generator().manual_seed(length)
    buffers = []
    for _ in range(2):
        rows = torch.full((heads, room, head_dim), torch.nan)
        rows[:, :length] = torch.randn(heads, length, head_dim, generator=generator)
        buffers.append(rows.to(dtype).to(DEVICE))
    return buffers[0], buffers[1], torch.tensor([length], dtype=torch.int32, device=DEVICE)


def expected(
    query: Tensor, parts: list[CodedKV], keys: Tensor, values: Tensor, scale: float, softcap: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp in float32, head by head, over what the codes stand for."""
    groups, outs, sums = len(query) // len(keys), [], []
    layers = [exact(part) for part in parts]
    for h, one in enumerate(query.cpu().float()):
        head = h // groups
        of = [slice(*layer.bounds[head : head + 2]) for layer in layers]
        k = torch.cat([*(x.keys[rows] for x, rows in zip(layers, of, strict=True)), keys[head].cpu().float()])
        v = torch.cat([*(x.values[rows] for x, rows in zip(layers, of, strict=True)), values[head].cpu().float()])
        logits = k @ one * scale
        logits = softcap * torch.tanh(logits / softcap) if softcap else logits
        outs.append(logits.softmax(0) @ v)
        sums.append(logits.logsumexp(0))
    return torch.stack(outs), torch.stack(sums)


def error(out: Tensor, truth: Tensor) -> float:
    return float((out.cpu().float() - truth).norm() / truth.norm())


def on_device(part: CodedKV) -> CodedKV:
    names = ("keys", "values", "key_scale", "key_min", "value_scale", "value_min", "positions")
    return replace(part, **{name: getattr(part, name).to(DEVICE) for name in names})


def decode(
    parts: list[CodedKV],
    tail: int,
    groups: int,
    scale: float | None = None,
    softcap: float = 0.0,
    programs: int = 6,
    tile: int = 64,
) -> float:
    """Relative error of `ragged_decode` against `expected`, and its log-sum-exp checked."""
    first = parts[0]
    heads, dim, dtype = first.num_heads, first.head_dim, first.dtype
    scale = dim**-0.5 if scale is None else scale
    query = torch.randn(heads * groups, dim, generator=torch.Generator().manual_seed(1)).to(dtype)
    keys, values, length = tails(heads, tail, dim, dtype)
    given = [(on_device(part), WorkList.build(part, programs, tile)) for part in parts]
    out, lse = ragged_decode(query.to(DEVICE), given, keys, values, length, scale, softcap)
    truth, sums = expected(query, parts, keys[:, :tail], values[:, :tail], scale, softcap)
    assert out.dtype == dtype
    torch.testing.assert_close(lse.cpu(), sums, atol=5e-3, rtol=1e-3)
    return error(out, truth)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_decoded_rows_are_those_of_the_frames(codec: str, dtype: torch.dtype) -> None:
    chunk_of = ranked(3, 50, 0, segments=1)
    keys, values = (torch.randn(3, 50, 64).to(dtype) * 3 for _ in range(2))
    header, frames = encode_segment(codec, [keys, keys + 1], [values, values - 1], Ranking(7, chunk_of.repeat(2, 0)))
    for frame in frames:
        for part, rows in zip(coded_frame(header, *frame), decode_frame(header, *frame, CPU), strict=True):
            assert part.form == CODECS[codec]
            back = decoded(part)
            assert torch.equal(back.keys, rows.keys) and torch.equal(back.values, rows.values)
            assert torch.equal(back.positions, rows.positions) and back.bounds == rows.bounds


@pytest.mark.parametrize("codec", ["eb5", "k4v2", "k3v2"])
def test_other_codecs_give_plain_rows(codec: str) -> None:
    keys = torch.randn(2, 40, 64).half()
    header, frames = encode_segment(codec, [keys], [keys], Ranking.single(0, 1, 2, 40))
    for frame in frames:
        part, rows = coded_frame(header, *frame)[0], decode_frame(header, *frame, CPU)[0]
        assert part.form.value_bits == 16 and torch.equal(decoded(part).keys, rows.keys)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize(("groups", "dim"), [(1, 128), (3, 96), (4, 256), (7, 64)])
def test_every_form_is_near_what_its_codes_say(codec: str, groups: int, dim: int) -> None:
    part = coded(codec, ranked(3, 70, dim), dim, torch.float16)
    assert decode([part], 17, groups, programs=4) < 1e-3


@pytest.mark.parametrize("codec", CODECS)
def test_bfloat16(codec: str) -> None:
    part = coded(codec, ranked(2, 90, 3), 64, torch.bfloat16)
    # The interpreter cuts bfloat16 off where the device rounds.
    assert decode([part], 5, 4) < (3e-3 if GPU else 7e-3)


@pytest.mark.parametrize("tile", [32, 64, 128])
def test_warps_that_share_the_rows_of_a_head(tile: int) -> None:
    part = coded("k4v4", ranked(2, 200, tile), 64, torch.float16)
    assert decode([part], 5, 4, programs=4, tile=tile) < 1e-3


def test_forms_side_by_side_and_more_than_sixteen_queries_a_head() -> None:
    parts = [coded(codec, ranked(2, 30, seed), 64, torch.float16) for seed, codec in enumerate(CODECS)]
    assert decode(parts, 9, 17) < 1e-3


@pytest.mark.parametrize("codec", ["raw", "k4v4"])
def test_soft_cap_and_scale(codec: str) -> None:
    part = coded(codec, ranked(2, 40, 1), 64, torch.float16)
    assert decode([part], 9, 2, scale=0.2, softcap=3.0) < 1e-3


@pytest.mark.parametrize("tail", [1, 16, 33, 40])
def test_tails(tail: int) -> None:
    assert decode([coded("raw", ranked(2, 20, 5), 64, torch.float16)], tail, 2) < 1e-3


@pytest.mark.parametrize("codec", ["k8v8", "k4v4"])
def test_scales_beyond_float16(codec: str) -> None:
    part = coded(codec, ranked(2, 60, 4), 64, torch.bfloat16, size=3e6)
    assert part.value_scale.dtype == torch.float32
    assert decode([part], 1, 2) < (3e-3 if GPU else 7e-3)


def test_nothing_sealed() -> None:
    query = torch.randn(4, 64).half().to(DEVICE)
    keys, values, length = tails(2, 21, 64, torch.float16)
    out, _ = ragged_decode(query, [], keys, values, length, 0.125)
    truth = reference.attend(query[:, None].float(), None, keys[:, :21].float(), values[:, :21].float(), 0.125)
    assert error(out, truth[:, 0].cpu()) < 1e-3


def test_updating_in_place_equals_a_new_plan() -> None:
    forms = {Form(8, 8): Tuning(64, 4, 2, 5), Form(4, 4): Tuning(128, 4, 2, 7)}
    one, two = (
        [on_device(coded(codec, ranked(2, tokens, seed), 64, torch.float16)) for codec in ("k8v8", "k4v4")]
        for tokens, seed in ((70, 0), (45, 1))
    )
    shape = Shape(2, 2, 64)
    query = torch.randn(4, 64).half().to(DEVICE)
    tail = tails(2, 3, 64, torch.float16)

    def result(plan: DecodePlan) -> Tensor:
        out = torch.empty_like(query)
        plan.run(query, *tail, out, 0.125)
        return out

    old, new = DecodePlan(shape, forms, DEVICE, 2), DecodePlan(shape, forms, DEVICE, 2)
    old.update([(part, old.work(part)) for part in one])
    before = result(old)
    assert old.update([(part, old.work(part)) for part in two])
    new.update([(part, new.work(part)) for part in two])
    assert torch.equal(result(old), result(new)) and not torch.equal(result(old), before)
    old.update([(two[0], old.work(two[0]))])
    new = DecodePlan(shape, {Form(8, 8): forms[Form(8, 8)]}, DEVICE, 2)
    new.update([(two[0], new.work(two[0]))])
    torch.testing.assert_close(result(old), result(new), atol=1e-3, rtol=1e-3)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.integers(1, 150), max_size=4), min_size=1, max_size=5),
    st.sampled_from([16, 8, 4]),
    st.sampled_from([32, 64, 128]),
    st.lists(st.integers(0, 3), max_size=10),
)
def test_work_lists_cover_every_row_once(
    runs_of_heads: list[list[int]], bits: int, tile: int, variants: list[int]
) -> None:
    runs = np.array([(h, 0, n, 0, 0, 0) for h, runs in enumerate(runs_of_heads) for n in runs], np.int64).reshape(-1, 6)
    runs[:, 1] = runs[:, 2].cumsum() - runs[:, 2]
    units = -(-runs[:, 2] // 32) if bits == 4 else np.array([i % 2 for i in range(len(runs))], np.int64)
    runs[:, 3] = units.cumsum() - units
    runs[:, 4] = np.arange(len(runs)) // 2 * 100  # what shares a scale is of one segment
    variant_of = {number * 100: variant for number, variant in enumerate(variants)}
    total = int(runs[:, 2].sum())
    rows, none = torch.zeros(total, 64, dtype=torch.half), torch.zeros(0)
    keys = rows if bits == 16 else torch.zeros(total, 64 if bits == 8 else 32, dtype=torch.uint8)
    scale, where = torch.zeros(0, 64), torch.zeros(total, dtype=torch.int32)
    heads = len(runs_of_heads)
    part = CodedKV(Form(bits, 16), torch.half, heads, keys, rows, scale, scale, none, none, where, runs)
    work = WorkList.build(part, 8, tile, variant_of)
    seen = []
    for head, (first, count) in enumerate(work.spans.tolist()):
        for low, high, of, variant in work.programs[first : first + count].tolist():
            assert of == head and low < high
            for at, n, unit in work.tiles[low:high].tolist():
                assert n <= tile
                seen += [(at + i, head, unit + i // 32 if bits == 4 else unit, variant) for i in range(n)]
    truth = [
        (at + i, head, unit + i // 32 if bits == 4 else unit if bits == 8 else 0, variant_of.get(start, 0))
        for head, at, n, unit, start, _ in runs.tolist()
        for i in range(n)
    ]
    assert (sorted(seen) if any(variants) else seen) == truth
    assert not work.programs[int(work.spans[:, 1].sum()) :].any()
    words = work.words()
    assert np.array_equal(np.stack([words >> 32, words & 0xFF, words >> 8 & 0xFFFFFF], axis=1), work.tiles)
    for (low, high, head, variant), (start, stop, queries) in zip(work.programs, work.bounds(16), strict=True):
        assert queries == variant * heads + head
        rows_of_tiles = [row for at, n, _ in work.tiles[low:high] for row in range(at, at + n)]
        assert bits < 16 or rows_of_tiles == list(range(start, stop))
