"""The CUDA backend equals the reference: on a device, and without one over a plain stand-in for the flash kernel."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from kvchat.attention import reference, varlen
from kvchat.attention.merge import Partial
from kvchat.cache.segment import LayerKV
from tests.test_attention import SHAPES, random_rows

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def plain_varlen(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float,
    causal: bool,
) -> Partial:
    """What `flash.varlen` promises, sequence by sequence; rubbish where a sequence has no keys, as kernels write."""
    groups = query.shape[1] // keys.shape[1]
    out, lse = torch.full_like(query, torch.nan), query.new_full(query.shape[:2], torch.inf)
    starts = list(zip(cu_seqlens_q.tolist(), cu_seqlens_k.tolist(), strict=True))
    for (low_q, low_k), (high_q, high_k) in pairwise(starts):
        q, rows = high_q - low_q, high_k - low_k
        assert q <= max_seqlen_q and rows <= max_seqlen_k
        if rows:
            wide_keys, wide_values = (part[low_k:high_k].repeat_interleave(groups, 1) for part in (keys, values))
            logits = torch.einsum("qhd,khd->hqk", query[low_q:high_q], wide_keys) * scale
            if causal:
                hidden = torch.ones(q, rows, dtype=torch.bool).triu(rows - q + 1)
                logits = logits.masked_fill(hidden, -torch.inf)
            out[low_q:high_q] = torch.einsum("hqk,khd->qhd", logits.softmax(-1), wide_values)
            lse[low_q:high_q] = logits.logsumexp(-1).T
    return out, lse.T.contiguous().T


def random_case(
    groups: int, counts: tuple[int, ...], past: int, new: int, dim: int, dtype: torch.dtype
) -> tuple[Tensor, LayerKV, Tensor, Tensor]:
    """A query as RoPE leaves it, sealed rows, and a tail that is a view of a larger room."""
    heads = len(counts)
    query = torch.randn(new, heads * groups, dim, dtype=dtype).transpose(0, 1)
    keys, values = (torch.randn(heads, past + new + 7, dim, dtype=dtype)[:, : past + new] for _ in range(2))
    return query, random_rows(counts, dim, dtype), keys, values


@pytest.mark.parametrize(("groups", "counts", "past", "new"), SHAPES)
def test_it_asks_the_kernel_for_what_the_reference_computes(
    groups: int, counts: tuple[int, ...], past: int, new: int
) -> None:
    torch.manual_seed(0)
    query, rows, keys, values = random_case(groups, counts, past, new, 16, torch.float64)
    for sealed in (rows, None):
        expected = reference.attend(query, sealed, keys, values, 0.3)
        torch.testing.assert_close(varlen.attend(query, sealed, keys, values, 0.3, plain_varlen), expected)


def test_its_normaliser_equals_the_reference() -> None:
    torch.manual_seed(1)
    query, past, own = torch.randn(6, 7, 16), torch.randn(2, 11, 16), torch.randn(2, 7, 16)
    for seen in (past, past[:, :0]):
        torch.testing.assert_close(
            varlen.log_normaliser(query, seen, own, 0.5, plain_varlen), reference.log_normaliser(query, seen, own, 0.5)
        )


def test_keys_are_handed_to_the_kernel_where_they_lie() -> None:
    seen: set[int] = set()

    def watch(query: Tensor, keys: Tensor, values: Tensor, *args: Any) -> Partial:
        seen.update((keys.untyped_storage().data_ptr(), values.untyped_storage().data_ptr()))
        return plain_varlen(query, keys, values, *args)

    query, sealed, keys, values = random_case(2, (5, 0, 9), 4, 3, 16, torch.float32)
    varlen.attend(query, sealed, keys, values, 0.3, watch)
    assert seen == {part.untyped_storage().data_ptr() for part in (sealed.keys, sealed.values, keys, values)}


@cuda
@pytest.mark.parametrize(("groups", "counts", "past", "new"), [*SHAPES, (4, (700, 0, 301), 450, 333)])
@pytest.mark.parametrize("dim", [64, 96, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_cuda_backend_equals_the_reference(
    groups: int, counts: tuple[int, ...], past: int, new: int, dim: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(2)
    query, rows, keys, values = random_case(groups, counts, past, new, dim, dtype)
    query, keys, values = query.cuda(), keys.cuda(), values.cuda()
    on_device = LayerKV(rows.keys.cuda(), rows.values.cuda(), rows.positions.cuda(), rows.cu_seqlens)
    for sealed in (on_device, None):
        expected = reference.attend(query, sealed, keys, values, 0.1)
        torch.testing.assert_close(varlen.attend(query, sealed, keys, values, 0.1), expected, atol=2e-2, rtol=2e-2)


@cuda
@pytest.mark.parametrize("dim", [64, 128])
def test_the_cuda_normaliser_equals_the_reference(dim: int) -> None:
    torch.manual_seed(3)
    query, past, own = (torch.randn(n, 207, dim, dtype=torch.bfloat16, device="cuda") for n in (6, 2, 2))
    for seen in (past, past[:, :0]):
        torch.testing.assert_close(
            varlen.log_normaliser(query, seen, own, 0.1),
            reference.log_normaliser(query, seen, own, 0.1),
            atol=1e-3,
            rtol=1e-3,
        )
