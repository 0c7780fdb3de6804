"""Sealed rows that lie as they were encoded read bit for bit as those that were decoded, whatever happens to them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kvchat.cache.coded import CodedKV, Form
from kvchat.cache.pack import Spans, before, pack, within
from kvchat.codecs import coded_frame, decode_frame, decoded, encode_segment
from kvchat.compress.compressor import rank
from kvchat.engine import Engine
from tests.test_correct import TURNS, Played
from tests.tiny import make_model

FORMS = {"raw": (16, 16), "k8v8": (8, 8), "k8v4": (8, 4), "k4v4": (4, 4), "k4v2": (4, 16), "eb5": (16, 16)}
CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def engines(request: pytest.FixtureRequest) -> tuple[Engine, Engine]:
    """One model, with rows encoded and decoded."""
    model = make_model("qwen2", request.param, heads=6, kv_heads=2)
    return Engine(model, 16, "encoded"), Engine(model, 16, "decoded")


def pair(engines: tuple[Engine, Engine], codec: str, turns: list[list[int]] | None = None) -> tuple[Played, Played]:
    """The same turns on both."""
    one, other = (Played(engine, 0.6, codec, turns) for engine in engines)
    return one, other


def assert_same(one: Played, other: Played) -> None:
    assert torch.equal(one.logits(), other.logits())
    assert one.cache.num_sealed_rows == other.cache.num_sealed_rows
    assert one.cache.pieces == other.cache.pieces
    assert [one.cache.rows(piece) for piece in one.cache.pieces] == [
        other.cache.rows(piece) for piece in other.cache.pieces
    ]


@pytest.mark.parametrize("codec", ["k8v8", "k8v4", "k4v4", "k4v2", "eb5"])
def test_encoded_rows_give_the_same_logits(engines: tuple[Engine, Engine], codec: str) -> None:
    one, other = pair(engines, codec)
    assert {form.form for layer in one.cache.layers for form in layer.forms} == {FORMS[codec]}
    assert_same(one, other)
    for keep in (0.3, 1.0, 0.1, 0.6):
        for played in (one, other):
            played.hold(keep)
        assert_same(one, other)


def test_codecs_by_rank_stand_in_one_order(engines: tuple[Engine, Engine]) -> None:
    one, other = (Played(engine, 1.0, ["k8v8", "k8v4", "k4v4", "k4v2"]) for engine in engines)  # type: ignore[arg-type]
    assert [form.form for form in one.cache.layers[0].forms] == [(8, 8), (8, 4), (4, 16), (4, 4)]
    assert_same(one, other)
    for layer, plain in zip(one.cache.layers, other.cache.layers, strict=True):
        assert torch.equal(layer.sealed.positions, plain.sealed.positions)
        assert torch.equal(layer.sealed.keys, plain.sealed.keys) and torch.equal(
            layer.sealed.values, plain.sealed.values
        )


@pytest.mark.parametrize("codec", ["k8v8", "k4v4"])
@pytest.mark.parametrize("position", [80, 72, 71, 44, 41, 40, 3])
def test_cutting_inside_a_segment(engines: tuple[Engine, Engine], codec: str, position: int) -> None:
    one, other = pair(engines, codec)
    for played in (one, other):
        played.tiers.crop(position)
    assert one.cache.num_seen == other.cache.num_seen == min(position, 72)
    assert_same(one, other)


@pytest.mark.parametrize("codec", ["k8v8", "k4v4"])
def test_encoded_rows_take_less_memory(codec: str) -> None:
    model = make_model("llama", torch.bfloat16, heads=4, kv_heads=2, head_dim=64)
    turns = [[(7 * i + 3 * turn) % 250 for i in range(300)] for turn in range(2)] + [TURNS[-1]]
    one, other = (Played(Engine(model, 64, how), 1.0, codec, turns) for how in ("encoded", "decoded"))  # type: ignore[arg-type]
    share = one.cache.sealed_bytes / other.cache.sealed_bytes
    assert share < {"k8v8": 0.56, "k4v4": 0.36}[codec], share


@pytest.mark.parametrize("codec", list(FORMS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_frame_stays_what_it_says(codec: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    keys, values = ([torch.randn(3, 77, 16, generator=generator).to(dtype) for _ in range(2)] for _ in range(2))
    scores = torch.rand(2, 3, 77, generator=generator)
    scores[1, 2] = 0
    header, frames = encode_segment(codec, keys, values, rank(scores, [False] * 77, (0.2, 0.5, 1.0), 100))
    blobs = list(frames)
    of_layer: dict[int, list[CodedKV]] = {}
    for chunk, group, blob in blobs:
        first, _ = header.layers(group)
        plain = decode_frame(header, chunk, group, blob, CPU)
        for index, (rows, expected) in enumerate(zip(coded_frame(header, chunk, group, blob), plain, strict=True)):
            assert rows.form == Form(*FORMS[codec])
            found = decoded(rows)
            assert torch.equal(found.keys, expected.keys) and torch.equal(found.values, expected.values)
            assert torch.equal(found.positions, expected.positions) and found.bounds == expected.bounds
            of_layer.setdefault(first + index, []).append(rows)
    for pieces in of_layer.values():
        whole = pack(pieces, [one.runs for one in pieces], CPU)
        again = pack([whole], [whole.runs[::-1]], CPU)
        assert np.array_equal(whole.runs, again.runs) and torch.equal(decoded(whole).keys, decoded(again).keys)
        if whole.form.key_bits == 8:
            assert len(whole.key_scale) == 3  # one unit a head, shared by the chunks
        cut = decoded(before(whole, 150))
        all_of_it = decoded(whole)
        kept = all_of_it.positions < 150
        assert torch.equal(cut.keys, all_of_it.keys[kept]) and torch.equal(cut.values, all_of_it.values[kept])


def plainly_within(rows: CodedKV, spans: Spans) -> list[list[int]]:
    """The runs of `within`, found by looking at every row."""
    group, positions, found = 32 if rows.form.key_bits == 4 else 1, rows.positions.tolist(), list[list[int]]()
    for head, first, length, unit, start, chunk in rows.runs.tolist():
        inside = [any(low <= positions[first + row] < high for low, high in spans) for row in range(length)]
        wanted = [any(inside[row - row % group :][:group]) for row in range(length)]
        for row in range(length):
            if wanted[row] and row and wanted[row - 1]:
                found[-1][2] += 1
            elif wanted[row]:
                found.append([head, first + row, 1, unit + (row // group if group > 1 else 0), start, chunk])
    return found


@pytest.mark.parametrize("codec", ["raw", "k8v8", "k4v4"])
@pytest.mark.parametrize("spans", [((103, 140),), ((0, 105), (170, 171), (190, 300)), ((500, 600),)])
def test_rows_of_some_tokens_are_found_as_by_looking_at_every_one(codec: str, spans: Spans) -> None:
    generator = torch.Generator().manual_seed(3)
    keys, values = ([torch.randn(3, 177, 16, generator=generator)] for _ in range(2))
    scores = torch.rand(1, 3, 177, generator=generator)
    header, frames = encode_segment(codec, keys, values, rank(scores, [False] * 177, (0.2, 0.5, 1.0), 100))
    for chunk, group, blob in frames:
        (rows,) = coded_frame(header, chunk, group, blob)
        found = within(rows, spans)
        assert found.runs[found.runs[:, 2] > 0].tolist() == plainly_within(rows, spans)
        packed, whole = decoded(pack([found], [found.runs], CPU)), decoded(rows)
        kept = [torch.arange(first, first + length) for _, first, length, *_ in found.runs.tolist()]
        assert torch.equal(packed.keys, whole.keys[torch.cat([torch.arange(0), *kept])])
