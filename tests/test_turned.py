"""Rows of segments that have moved, read with a turned query, against the reference over keys that are turned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

from kvchat.anatomy import Anatomy
from kvchat.attention import reference
from kvchat.attention.ragged_decode import DecodePlan, Shape, Tuning, ragged_decode
from kvchat.attention.turned import Rotate, TurnedQuery
from kvchat.attention.worklist import WorkList
from kvchat.cache.coded import ROWS, START, CodedKV, Form
from kvchat.cache.pack import merged
from kvchat.cache.segment import LayerKV
from kvchat.errors import InputError
from tests.test_ragged_decode import CODECS, DEVICE, coded, error, exact, on_device, ranked, tails
from tests.tiny import FAMILIES, make_model

TOKENS = 30
SHIFTS = {0: 0, 1 * TOKENS: -7, 2 * TOKENS: 900, 3 * TOKENS: -7, 4 * TOKENS: 0, 5 * TOKENS: 31}
"""Of segments; those that have moved as far do not stand together."""


def rope(states: Tensor, positions: Tensor, width: int = 0, interleaved: bool = False) -> Tensor:
    """RoPE of the first `width` channels, or all."""
    width = width or states.shape[-1]
    turning, rest = states[..., :width].float(), states[..., width:].float()
    angle = positions[:, None].double() * 1e4 ** -(torch.arange(0, width, 2, device=states.device) / width)
    angle = angle.repeat_interleave(2, -1) if interleaved else torch.cat([angle, angle], -1)
    if interleaved:
        other = torch.stack([-turning[..., 1::2], turning[..., ::2]], -1).flatten(-2)
    else:
        other = torch.cat([-turning[..., width // 2 :], turning[..., : width // 2]], -1)
    return torch.cat([turning * angle.cos().float() + other * angle.sin().float(), rest], -1)


def moved(part: CodedKV, shifts: Mapping[int, int]) -> LayerKV:
    """What the codes stand for, in float32, every key turned by as much as its segment has moved."""
    rows = exact(part)
    by = np.repeat([shifts[start] for start in part.runs[:, START].tolist()], part.runs[:, ROWS])
    return replace(rows, keys=rope(rows.keys[None], torch.from_numpy(by))[0])


def query_of(heads: int, dim: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.randn(heads, dim, generator=torch.Generator().manual_seed(1)).to(dtype).to(DEVICE)


def truth_of(query: Tensor, parts: list[CodedKV], shifts: Mapping[int, int], tail: tuple[Tensor, ...]) -> Tensor:
    sealed = merged(parts, [moved(part, shifts) for part in parts])
    keys, values = (rows[:, : int(tail[2])].cpu().float() for rows in tail[:2])
    return reference.attend(query.cpu().float()[:, None], sealed, keys, values, 0.125)[:, 0]


def decode(parts: list[CodedKV], groups: int, shifts: Mapping[int, int], programs: int = 6, tile: int = 64) -> float:
    """Relative error of `ragged_decode`."""
    heads, dim, dtype = parts[0].num_heads, parts[0].head_dim, parts[0].dtype
    query, tail = query_of(heads * groups, dim, dtype), tails(heads, 17, dim, dtype)
    turned = TurnedQuery(rope, heads * groups, dim, dtype, DEVICE)
    turned.arrange(shifts.values())
    variants = turned.variants(shifts)
    given = [(on_device(part), WorkList.build(part, programs, tile, variants)) for part in parts]
    out, _ = ragged_decode(turned.of(query), given, *tail, 0.125, variants=turned.num_variants)
    return error(out, truth_of(query, parts, shifts, tail))


def segments(codec: str, heads: int = 3, dim: int = 64, seed: int = 0, dtype: torch.dtype = torch.float16) -> CodedKV:
    return coded(codec, ranked(heads, TOKENS, seed, len(SHIFTS)), dim, dtype)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize(("groups", "dim", "programs"), [(3, 96, 16), (1, 64, 3)])
def test_every_form_is_near_the_reference_over_turned_keys(codec: str, groups: int, dim: int, programs: int) -> None:
    part = segments(codec, dim=dim)
    assert decode([part], groups, SHIFTS, programs) < 2e-3
    query, tail = query_of(3 * groups, dim), tails(3, 17, dim, torch.float16)
    unmoved, truth = (truth_of(query, [part], shifts, tail) for shifts in (dict.fromkeys(SHIFTS, 0), SHIFTS))
    assert error(unmoved, truth) > 0.1  # it would be seen


def test_forms_side_by_side_and_more_than_sixteen_queries_a_head() -> None:
    assert decode([segments(codec, 2, seed=seed) for seed, codec in enumerate(CODECS)], 17, SHIFTS) < 2e-3


@pytest.mark.parametrize("codec", CODECS)
def test_bfloat16(codec: str) -> None:
    # The interpreter cuts bfloat16 off where the device rounds.
    assert decode([segments(codec, dtype=torch.bfloat16)], 4, SHIFTS) < (6e-3 if DEVICE.type == "cuda" else 2e-2)


def test_more_groups_than_programs_are_given_more_once() -> None:
    forms = {Form(8, 8): Tuning(64, 4, 2, 3), Form(16, 16): Tuning(32, 4, 2, 2)}
    parts = [segments(codec, 2) for codec in ("k8v8", "raw")]
    query, tail = query_of(4, 64), tails(2, 3, 64, torch.float16)
    turned = TurnedQuery(rope, 4, 64, torch.float16, DEVICE)
    plan, given = DecodePlan(Shape(2, 2, 64), forms, DEVICE, 2), [on_device(part) for part in parts]

    def result(shifts: Mapping[int, int]) -> tuple[bool, Tensor]:
        same = turned.arrange(shifts.values())
        same &= plan.update([(part, plan.work(part, turned.variants(shifts))) for part in given])
        out = torch.empty_like(query)
        plan.run(turned.of(query), *tail, out, 0.125)
        return same, out

    rest = dict.fromkeys(SHIFTS, 0)
    _, before = result(rest)
    assert error(before, truth_of(query, parts, rest, tail)) < 1e-3
    same, out = result(SHIFTS)
    assert not same and error(out, truth_of(query, parts, SHIFTS, tail)) < 2e-3
    other = {start: -shift for start, shift in SHIFTS.items()}
    same, out = result(other)
    assert same and error(out, truth_of(query, parts, other, tail)) < 2e-3
    same, out = result(rest)
    assert same
    torch.testing.assert_close(out, before, atol=1e-3, rtol=1e-3)


def test_a_query_that_nothing_wants_turned_is_read_itself() -> None:
    turned, query = TurnedQuery(rope, 4, 64, torch.float16, DEVICE), query_of(4, 64)
    assert turned.arrange([]) and turned.arrange([0, 0]) and turned.num_variants == 1
    assert turned.of(query) is query and turned.variants({0: 0, 30: 0}) == {}
    for codec in CODECS:
        plain, none = (WorkList.build(segments(codec), 5, 64, variants) for variants in ({}, {0: 0, TOKENS: 0}))
        assert all(np.array_equal(getattr(plain, name), getattr(none, name)) for name in ("programs", "tiles", "spans"))


def assert_turned(turned: TurnedQuery, rotate: Rotate, query: Tensor, shifts: list[int]) -> None:
    """Variants are the query turned back, and it itself as it is."""
    rows = turned.of(query).view(turned.num_variants, *query.shape)
    variants = turned.variants(dict(enumerate(shifts)))
    assert len(set(variants.values())) == len(shifts) and torch.equal(rows[0], query)
    for number, shift in enumerate(shifts):
        truth = rotate(query[:, None].float(), torch.tensor([-shift], device=DEVICE))[:, 0]
        torch.testing.assert_close(rows[variants[number]].float(), truth.to(query.dtype).float(), atol=1e-2, rtol=1e-2)


def test_variants_grow_and_keep_their_places() -> None:
    turned, query = TurnedQuery(rope, 5, 96, torch.bfloat16, DEVICE), query_of(5, 96, torch.bfloat16)
    steps = [([5], False, 2), ([5], True, 2), ([5, -7], False, 4), ([5, 8], True, 4), ([8], True, 4), ([8, 5], True, 4)]
    for shifts, same, variants in [*steps, ([5, 8, 1], True, 4), ([*range(1, 20)], False, 32)]:
        place = turned.variants({0: 5})[0] if 5 in turned._variants else None
        assert turned.arrange(shifts) == same and turned.num_variants == variants
        assert 5 not in shifts or place in (None, turned.variants({0: 5})[0])
        assert_turned(turned, rope, query, shifts)


@pytest.mark.parametrize("family", [*FAMILIES, "glm"])  # glm: half of the channels, neighbours paired
def test_every_family_turns_as_its_network_does(family: str) -> None:
    rotate = Anatomy(make_model(family, layers=1, head_dim=64, device=DEVICE.type)).rotate
    turned, query = TurnedQuery(rotate, 4, 64, torch.float32, DEVICE), query_of(4, 64, torch.float32)
    shifts = [-3000, -1, 4, 100]
    turned.arrange(shifts)
    assert_turned(turned, rotate, query, shifts)
    keys = torch.randn(4, 64, device=DEVICE)
    for number, variant in turned.variants(dict(enumerate(shifts))).items():
        by = torch.tensor([shifts[number]], device=DEVICE)
        ours = (turned.of(query).view(-1, 4, 64)[variant] * keys).sum(-1)
        torch.testing.assert_close(ours, (query * rotate(keys[:, None], by)[:, 0]).sum(-1), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("width", "interleaved"), [(0, True), (24, False), (24, True)])
def test_any_pairs_of_channels_and_some_that_stay(width: int, interleaved: bool) -> None:
    def rotate(states: Tensor, positions: Tensor) -> Tensor:
        return rope(states, positions, width, interleaved)

    turned, query = TurnedQuery(rotate, 3, 96, torch.float16, DEVICE), query_of(3, 96)
    turned.arrange([3, -2000])
    assert_turned(turned, rotate, query, [3, -2000])


def test_what_is_no_rotation_of_pairs_is_refused() -> None:
    def mixed(states: Tensor, positions: Tensor) -> Tensor:
        return rope(states, positions) + 0.1 * positions[:, None] * states.flip(-1)

    turned = TurnedQuery(mixed, 2, 64, torch.float16, DEVICE)
    with pytest.raises(InputError, match="in pairs"):
        turned.arrange([3])
    assert turned.num_variants == 1 and turned.variants({0: 0}) == {}
