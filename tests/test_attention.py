"""Every backend equals `reference.attend`, and the reference equals dense attention with the evicted pairs masked."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kvchat.attention import reference, sdpa
from kvchat.attention.merge import merge
from kvchat.cache.segment import LayerKV

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2}

SHAPES = [
    # groups, rows each KV head keeps, tail before the new tokens, new tokens
    (1, (5, 3), 4, 1),
    (4, (0, 7), 0, 1),
    (7, (0, 0), 3, 17),
    (3, (6, 6, 6), 9, 5),
    (2, (1, 0, 33, 2), 0, 2),
    (3, (1201, 0, 700), 5, 1),
    (3, (1201, 1201, 1201), 901, 1),
    (2, (1202,), 1001, 1),
]


def random_rows(counts: tuple[int, ...], dim: int, dtype: torch.dtype) -> LayerKV:
    bounds = torch.tensor([0, *counts]).cumsum(0).int()
    rows = int(bounds[-1])
    positions = torch.arange(rows, dtype=torch.int32)
    return LayerKV(torch.randn(rows, dim, dtype=dtype), torch.randn(rows, dim, dtype=dtype), positions, bounds)


def dense_masked(query: Tensor, keys: Tensor, values: Tensor, hidden: Tensor, scale: float) -> Tensor:
    """Plain softmax over (H, K, D) keys of which `hidden` (H, q, K) are not seen."""
    groups = query.shape[0] // keys.shape[0]
    keys, values, hidden = (part.repeat_interleave(groups, 0) for part in (keys, values, hidden))
    logits = (query @ keys.mT * scale).masked_fill(hidden, -torch.inf)
    return logits.softmax(-1) @ values


@pytest.mark.parametrize(("groups", "counts", "past", "new"), SHAPES)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_cpu_backend_equals_the_reference(
    groups: int, counts: tuple[int, ...], past: int, new: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    heads, dim = len(counts), 16
    query = torch.randn(heads * groups, new, dim, dtype=dtype)
    keys, values = (torch.randn(heads, past + new, dim, dtype=dtype) for _ in range(2))
    rows = random_rows(counts, dim, dtype)
    for sealed in (rows, None):
        expected = reference.attend(query, sealed, keys, values, 0.3)
        torch.testing.assert_close(
            sdpa.attend(query, sealed, keys, values, 0.3), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype]
        )


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
@pytest.mark.parametrize("rows", [1, 1500, 1501, 1502, 1504])
def test_one_new_token_sees_every_row_once_however_many_threads_there_are(threads: int, rows: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        test_the_cpu_backend_equals_the_reference(3, (rows, rows // 2), rows, 1, torch.float32)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("groups", "counts", "past", "new"), SHAPES[:5])
def test_the_reference_equals_dense_attention_with_evicted_pairs_masked(
    groups: int, counts: tuple[int, ...], past: int, new: int
) -> None:
    torch.manual_seed(1)
    heads, dim, history = len(counts), 16, 40
    keys, values = (torch.randn(heads, history + past + new, dim, dtype=torch.float64) for _ in range(2))
    kept = torch.zeros(heads, history, dtype=torch.bool)
    for head, count in enumerate(counts):
        kept[head, torch.randperm(history)[:count]] = True
    sealed = LayerKV(
        keys[:, :history][kept],
        values[:, :history][kept],
        torch.arange(history, dtype=torch.int32).expand(heads, -1)[kept],
        torch.tensor([0, *counts]).cumsum(0).int(),
    )
    query = torch.randn(heads * groups, new, dim, dtype=torch.float64)
    future = torch.ones(new, past + new, dtype=torch.bool).triu(past + 1)
    hidden = torch.cat([~kept[:, None].expand(-1, new, -1), future.expand(heads, -1, -1)], -1)
    torch.testing.assert_close(
        reference.attend(query, sealed, keys[:, history:], values[:, history:], 0.25),
        dense_masked(query, keys, values, hidden, 0.25),
    )


def test_one_flipped_pair_is_seen() -> None:
    torch.manual_seed(2)
    rows = random_rows((9, 9), 16, torch.float32)
    query, tail = torch.randn(4, 1, 16), torch.randn(2, 3, 16)
    before = reference.attend(query, rows, tail, tail, 1.0)
    rows.values[4] += 1
    assert (reference.attend(query, rows, tail, tail, 1.0) - before).abs().max() > 1e-3


def test_merging_parts_equals_attention_over_all_keys_in_any_order() -> None:
    torch.manual_seed(3)
    query, keys, values = (torch.randn(2, n, 16, dtype=torch.float64) for n in (5, 30, 30))
    parts = [
        sdpa.dense(query, keys[:, low:high], values[:, low:high], 1.0) for low, high in ((0, 1), (1, 12), (12, 30))
    ]
    expected = (query @ keys.mT).softmax(-1) @ values
    for order in ((0, 1, 2), (2, 0, 1), (1, 2, 0)):
        torch.testing.assert_close(merge([parts[i] for i in order])[0], expected)


def test_the_normaliser_equals_the_reference() -> None:
    torch.manual_seed(4)
    query, past, own = torch.randn(6, 7, 16), torch.randn(2, 11, 16), torch.randn(2, 7, 16)
    for seen in (past, past[:, :0]):
        torch.testing.assert_close(
            sdpa.log_normaliser(query, seen, own, 0.5), reference.log_normaliser(query, seen, own, 0.5)
        )
