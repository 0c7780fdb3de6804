"""The archive codec: exact sums, rows close to what they were, and nothing decoded from a basis that is not its own."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kvchat.cache.segment import Ranking
from kvchat.codecs import SegmentHeader, decode_frame, encode_segment
from kvchat.codecs.archive import LEVELS, NUM_SINKS, ONE, RISE, Basis, reach, shifts
from kvchat.codecs.bits import digit_table, pack_digits
from kvchat.codecs.fit import Part, fit_basis, unturn
from kvchat.codecs.frame import Planes, pack, unpack
from kvchat.errors import CodecError, CorruptFrame, UnknownCodec
from tests.test_codecs import CPU, Frames, bits, random_ranking

SHAPE = (2, 2, 1500, 32)
BASE = 1e5


def rotate(keys: Tensor, start: int, sign: int) -> Tensor:
    """RoPE of base 1e5 over (L, H, T, D), by its formula."""
    half = keys.shape[3] // 2
    frequency = BASE ** (-torch.arange(half, dtype=torch.float64) / half)
    angle = torch.arange(start, start + keys.shape[2], dtype=torch.float64)[:, None] * frequency
    one, other = keys.double()[..., :half], keys.double()[..., half:]
    cos, sin = angle.cos(), sign * angle.sin()
    return torch.cat([one * cos - other * sin, other * cos + one * sin], 3)


def made_up(start: int = 0, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Part:
    """Keys with RoPE and a bias, and values, both mostly in a few directions; and first tokens like no others."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(2, *SHAPE[:2], SHAPE[3], SHAPE[3], generator=torch.Generator().manual_seed(99))
    falling = 0.85 ** torch.arange(SHAPE[3])
    keys, values = (
        (torch.randn(SHAPE, generator=generator) * falling) @ torch.linalg.qr(directions[side]).Q for side in (0, 1)
    )
    keys[..., ::8] += 20
    keys = rotate(keys, start, 1)
    if start == 0:
        keys[:, :, :NUM_SINKS] *= 30
    ranking = random_ranking(*SHAPE[:3], 5, start)
    return Part(keys.to(dtype), values.to(dtype), ranking, torch.ones(SHAPE[:3], dtype=torch.bool))


def encode(part: Part, basis: bytes) -> tuple[bytes, Frames]:
    header, frames = encode_segment("archive", list(part.keys), list(part.values), part.ranking, basis)
    return header.to_bytes(), list(frames)


def decode(header: SegmentHeader, frames: Frames) -> tuple[Tensor, Tensor]:
    from kvchat.recode import dense

    return dense(header, frames, CPU)


@pytest.fixture(scope="module")
def part() -> Part:
    return made_up()


@pytest.fixture(scope="module")
def basis(part: Part) -> bytes:
    return fit_basis(iter([part]))


def lost(out: Tensor, exact: Tensor) -> float:
    """The squared error, as a part of the variance around the mean of each head."""
    exact = exact.double()
    return float((out.double() - exact).square().mean() / (exact - exact.mean(2, keepdim=True)).square().mean())


# Codes


@pytest.mark.parametrize("level", LEVELS)
def test_codes_come_back_from_their_bytes(level: int) -> None:
    most, per_byte = reach(level)
    assert (2 * most + 1) ** per_byte <= 256 and most <= ONE
    for count in (0, 1, per_byte, 1001):
        q = np.random.default_rng(count).integers(-most, most + 1, count).astype(np.int8)
        packed = pack_digits(q, most, per_byte)
        assert len(packed) == -(-count // per_byte)
        np.testing.assert_array_equal(digit_table(most, per_byte)[packed].reshape(-1)[:count], q)


def test_a_byte_holds_digits_the_first_the_lowest() -> None:
    q = np.array([-1, 0, 1, 1, -1, 1], np.int8)
    assert pack_digits(q, *reach(4)).tolist() == [0 + 1 * 3 + 2 * 9 + 2 * 27 + 0 * 81, 2 + 3 + 9 + 27 + 81]
    assert pack_digits(np.array([-7, 7], np.int8), *reach(8)).tolist() == [14 * 15]


def test_sums_over_components_are_exact_in_any_order() -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randint(-ONE, ONE + 1, (50, 256), generator=generator)
    rows = torch.randint(-ONE, ONE + 1, (256, 256), generator=generator)
    assert torch.equal((q.float() @ rows.float()).double(), q.double() @ rows.double())
    assert 256 * ONE * (ONE + 1) < 1 << 24


def test_steps_grow_from_the_best_chunk_to_the_worst() -> None:
    ranking = Ranking(0, np.repeat(np.arange(10, dtype=np.uint8), 10).reshape(1, 1, 100))
    assert shifts(ranking).tolist() == [0, 2, 2, 4, 4, 6, 6, 8, 8, 10]  # halves go to the even
    assert shifts(Ranking.single(0, 1, 1, 9)).tolist() == [RISE]


# Segments


def test_rows_are_close_and_sinks_exact(part: Part, basis: bytes) -> None:
    header_bytes, frames = encode(part, basis)
    keys, values = decode(SegmentHeader.from_bytes(header_bytes, basis), frames)
    late = slice(NUM_SINKS, None)
    assert lost(keys[:, :, late], part.keys[:, :, late]) < 0.1
    assert lost(values[:, :, late], part.values[:, :, late]) < 0.2
    assert torch.equal(bits(keys[:, :, :NUM_SINKS]), bits(part.keys[:, :, :NUM_SINKS]))
    assert torch.equal(bits(values[:, :, :NUM_SINKS]), bits(part.values[:, :, :NUM_SINKS]))


def test_sinks_are_exact_however_few_rows_are_beside_them(part: Part, basis: bytes) -> None:
    chunk_of = np.ones(SHAPE[:3], np.uint8)
    chunk_of[:, :, : NUM_SINKS + 1] = 0  # of five rows a quarter would be two
    some = part._replace(ranking=Ranking(0, chunk_of))
    keys, values = decode(*_read(some, basis))
    assert torch.equal(bits(keys[:, :, :NUM_SINKS]), bits(part.keys[:, :, :NUM_SINKS]))
    assert torch.equal(bits(values[:, :, :NUM_SINKS]), bits(part.values[:, :, :NUM_SINKS]))
    assert not torch.equal(bits(keys[:, :, NUM_SINKS]), bits(part.keys[:, :, NUM_SINKS]))


def test_better_chunks_are_closer(part: Part, basis: bytes) -> None:
    header_bytes, frames = encode(part, basis)
    keys, _ = decode(SegmentHeader.from_bytes(header_bytes, basis), frames)
    error = (keys.double() - part.keys.double()).square().mean(3)
    means = [float(error[torch.from_numpy(part.ranking.chunk_of == chunk)].mean()) for chunk in range(5)]
    assert means == sorted(means) and means[4] > 10 * means[0]


def test_everything_together_takes_its_share() -> None:
    parts = [made_up(start, start) for start in (0, 1500, 3000, 4500)]
    basis = fit_basis(iter(parts))
    size = len(basis)
    for one in parts:
        header_bytes, frames = encode(one, basis)
        size += len(header_bytes) + sum(len(blob) for *_, blob in frames)
    plain = sum(2 * one.keys.nbytes for one in parts)
    assert 0.10 < size / plain < 0.125


def test_a_row_like_no_other_is_exact(part: Part) -> None:
    keys, values = part.keys.clone(), part.values.clone()
    values[1, 0, 700] = torch.linspace(-300, 300, SHAPE[3])
    basis = fit_basis(iter([part]))
    header_bytes, frames = encode(part._replace(keys=keys, values=values), basis)
    _, out = decode(SegmentHeader.from_bytes(header_bytes, basis), frames)
    assert torch.equal(bits(out[1, 0, 700]), bits(values[1, 0, 700]))


def test_constant_numbers_come_back() -> None:
    keys, values = torch.full(SHAPE, 3.0), torch.zeros(SHAPE)
    part = Part(keys, values, random_ranking(*SHAPE[:3], 3), torch.ones(SHAPE[:3], dtype=torch.bool))
    basis = fit_basis(iter([part]))
    out_keys, out_values = decode(*_read(part, basis))
    torch.testing.assert_close(out_keys, keys, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out_values, values, rtol=0, atol=1e-5)


def _read(part: Part, basis: bytes) -> tuple[SegmentHeader, Frames]:
    header_bytes, frames = encode(part, basis)
    return SegmentHeader.from_bytes(header_bytes, basis), frames


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (1, 2, 3, 5), (2, 1, 40, 7)], ids=str)
def test_any_shape_comes_back(shape: tuple[int, int, int, int]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    part = Part(x, x, random_ranking(*shape[:3], 3, start=2), torch.ones(shape[:3], dtype=torch.bool))
    keys, values = decode(*_read(part, fit_basis(iter([part]), 1.0)))
    assert keys.shape == values.shape == shape
    assert float((values - x).square().mean()) <= 0.5 * float(x.square().mean())


def test_decoding_gives_the_same_bits_again_and_with_other_threads(part: Part, basis: bytes) -> None:
    header, frames = _read(part, basis)
    threads = torch.get_num_threads()
    try:
        runs = []
        for count in (1, 2, 3, 3):
            torch.set_num_threads(count)
            runs.append([decode_frame(header, *frame, CPU) for frame in frames])
    finally:
        torch.set_num_threads(threads)
    for run in runs[1:]:
        for ours, first in zip(run, runs[0], strict=True):
            for a, b in zip(ours, first, strict=True):
                assert torch.equal(bits(a.keys), bits(b.keys)) and torch.equal(bits(a.values), bits(b.values))


def test_a_row_is_what_the_formula_says(part: Part, basis: bytes) -> None:
    header, frames = _read(part, basis)
    chunk, group, blob = frames[3]
    _, planes = unpack(basis, limit=1 << 20)
    _, coded = unpack(blob, limit=1 << 24)
    decoded, shift = decode_frame(header, chunk, group, blob, CPU)[0], int(coded["value_shift"][0])
    assert shift == shifts(part.ranking)[chunk]
    rows = decoded.bounds[1]  # of layer 0, head 0: the first unit
    scale = float(planes["value_step"][0, 0]) * 2 ** (shift / 2)
    steps = (decoded.values[:rows].double() - torch.tensor(planes["value_mean"][0, 0].tolist())) / scale
    q = steps @ torch.linalg.pinv((torch.tensor(planes["value_rows"][0, 0].tolist()).double() - ONE - 1) / ONE)
    kept = torch.from_numpy(planes["value_level"][0, 0].astype(np.int64) - shift >= LEVELS[0])
    assert float(q[:, ~kept].abs().max()) < 0.3 and 0 < int(kept.sum()) < SHAPE[3]
    assert float((q - q.round())[:, kept].abs().mean()) < 0.05  # the dtype rounds what was whole


# The basis


def test_rope_is_undone_with_the_base_that_the_keys_have(part: Part, basis: bytes) -> None:
    _, planes = unpack(basis, limit=1 << 20)
    half = SHAPE[3] // 2
    np.testing.assert_allclose(planes["turn"], BASE ** (-np.arange(half) / half), rtol=1e-6)
    undone = unturn(part.keys[0], 0, planes["turn"].astype(np.float64))
    torch.testing.assert_close(undone, rotate(part.keys[:1], 0, -1)[0], rtol=0, atol=1e-2)


def test_keys_without_rope_are_left_alone() -> None:
    part = made_up()
    keys = rotate(part.keys, 0, -1).to(torch.bfloat16)
    _, planes = unpack(fit_basis(iter([part._replace(keys=keys)])), limit=1 << 20)
    assert not planes["turn"].any()


def test_pairs_that_are_not_there_do_not_count(part: Part) -> None:
    present = torch.from_numpy(part.ranking.chunk_of < 3)
    broken = part.keys.clone()
    broken[~present] = 1e4
    some = part._replace(keys=broken, present=present)
    _, planes = unpack(fit_basis(iter([some])), limit=1 << 20)
    _, whole = unpack(fit_basis(iter([part])), limit=1 << 20)
    np.testing.assert_allclose(planes["key_mean"], whole["key_mean"], atol=0.5)


def test_no_segment_or_no_number_makes_no_basis(part: Part) -> None:
    with pytest.raises(CodecError, match="no sealed segment"):
        fit_basis(iter([]))
    keys = part.keys.clone()
    keys[0, 0, 9, 9] = float("nan")
    with pytest.raises(CodecError, match="not finite"):
        fit_basis(iter([part._replace(keys=keys)]))


class Elsewhere:
    """Keys or values as on another device: nothing can be done with a layer of them but to fetch it."""

    def __init__(self, rows: Tensor) -> None:
        self.shape, self.rows = rows.shape, rows

    def __iter__(self) -> Iterator[Any]:
        return (Layer(rows) for rows in self.rows)


class Layer:
    def __init__(self, rows: Tensor) -> None:
        self._rows = rows

    def cpu(self) -> Tensor:
        return self._rows


def test_a_basis_is_made_on_the_cpu_wherever_the_rows_are(part: Part, basis: bytes) -> None:
    there: Any = (Elsewhere(part.keys), Elsewhere(part.values))
    assert fit_basis(iter([part._replace(keys=there[0], values=there[1])])) == basis


def test_no_segment_is_kept_while_the_next_is_read() -> None:
    made: list[weakref.ref[Tensor]] = []
    alive = []

    def parts() -> Iterator[Part]:
        for start in (0, 1500, 3000):
            alive.append(sum(one() is not None for one in made))
            waiting = [made_up(start)]
            made.extend([weakref.ref(waiting[0].keys), weakref.ref(waiting[0].values)])
            yield waiting.pop()  # the generator keeps none

    fit_basis(parts())
    assert alive == [0, 0, 0]


def test_a_basis_that_is_not_finite_or_has_no_steps_is_refused(basis: bytes) -> None:
    head, planes = unpack(basis, limit=1 << 20)
    for name in ("turn", "key_mean", "value_step"):
        for bad in (np.nan, np.inf):
            lie = {**planes, name: np.full_like(planes[name], bad)}
            with pytest.raises(CorruptFrame, match="not finite"):
                Basis.from_bytes(pack(head, lie), 2, 2, 32)
    with pytest.raises(CorruptFrame, match="not above zero"):
        Basis.from_bytes(pack(head, {**planes, "key_step": np.zeros_like(planes["key_step"])}), 2, 2, 32)


def test_a_missing_damaged_or_foreign_basis_is_refused(part: Part, basis: bytes) -> None:
    header_bytes, _ = encode(part, basis)
    other = fit_basis(iter([made_up(seed=5)]))
    damaged = bytearray(basis)
    damaged[len(basis) // 2] ^= 1
    for wrong in (b"", bytes(damaged), other, header_bytes, pack({"kind": "basis"}, {})):
        with pytest.raises(CorruptFrame):
            SegmentHeader.from_bytes(header_bytes, wrong)
    assert SegmentHeader.from_bytes(header_bytes, basis).to_bytes() == header_bytes


def test_a_basis_of_another_shape_is_refused(basis: bytes) -> None:
    head, planes = unpack(basis, limit=1 << 20)
    for name, plane in planes.items():
        for wrong in (plane[..., 1:], plane.astype("<u2")):
            with pytest.raises(CorruptFrame):
                Basis.from_bytes(pack(head, {**planes, name: wrong}), 2, 2, 32)
    with pytest.raises(CorruptFrame):
        Basis.from_bytes(basis, 2, 2, 64)


def test_the_archive_is_no_codec_of_one_chunk_and_none_without_a_basis(part: Part, basis: bytes) -> None:
    keys, values = list(part.keys), list(part.values)
    with pytest.raises(CorruptFrame):
        encode_segment("archive", keys, values, part.ranking)
    with pytest.raises(UnknownCodec):
        encode_segment(["k8v8", "archive"], keys, values, part.ranking, basis)
    header, _ = encode_segment("archive", keys, values, part.ranking, basis)
    with pytest.raises(CorruptFrame, match="whole segment"):
        SegmentHeader.from_bytes(replace(header, codecs=("archive", "k8v8")).to_bytes(), basis)


def test_a_hostile_frame_is_refused(part: Part, basis: bytes) -> None:
    header, frames = _read(part, basis)
    chunk = int(part.ranking.chunk_of[0, 0, 0])  # that of a sink
    head, planes = unpack(frames[chunk][2], limit=1 << 24)
    decode_frame(header, chunk, 0, pack(head, planes), CPU)
    lies: list[Planes] = [{**planes, "more": np.zeros(1 << 22, np.uint8)}]
    for name, plane in planes.items():
        lies += [{**planes, name: plane[1:]}, {key: other for key, other in planes.items() if key != name}]
    lies += [{**planes, "key_shift": np.array([200], np.uint8)}]
    lies += [{**planes, "key_words": np.full_like(planes["key_words"], 0x7FC0)}]  # NaN in bfloat16
    beyond = planes["key_exact"].copy()
    beyond[-1] = 1 << 31
    lies += [{**planes, "key_exact": beyond}]
    for lie in lies:
        with pytest.raises(CorruptFrame):
            decode_frame(header, chunk, 0, pack(head, lie), CPU)


def test_a_header_that_begins_beyond_all_tokens_is_refused(part: Part, basis: bytes) -> None:
    header, _ = encode_segment("archive", list(part.keys), list(part.values), part.ranking, basis)
    far = replace(header, ranking=replace(part.ranking, start=2**31 - 10))
    with pytest.raises(CorruptFrame, match="no conversation"):
        SegmentHeader.from_bytes(far.to_bytes(), basis)
