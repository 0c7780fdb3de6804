"""The largest attention probability that each key receives, in tiles on a CUDA device: KVzip's score.

Two kernels. The first gives every query row's log-sum-exp over prefix, chunk and its own keys by an online softmax, as
flash attention does (arXiv 2205.14135) but without values. The second takes a block of the chunk's keys past all rows
and keeps their largest logit less log-sum-exp. Neither writes a logit to memory, and keys are read where they lie, by
every query head of their group. Exponents are of 2: the scale carries the factor log2(e).

Letters: H KV heads, G query heads per KV head, R rows of a pass, M tokens of the chunk, P tokens of the prefix, D
head_dim.
"""

# mypy: disable-error-code="import-untyped, untyped-decorator"

from __future__ import annotations

import math
from itertools import chain

import torch
import triton
import triton.language as tl
from torch import Tensor


def attention_received(
    query: Tensor, prefix: Tensor, chunk: Tensor, own: Tensor, skipped: list[int] | Tensor, scale: float
) -> Tensor:
    """As `compress.scorers.kvzip.attention_received_plainly`, with float32 accumulators.

    Args:
        query: (H * G, R, D); prefix: (H, P, D); chunk: (H, M, D); own: (H, R, D), seen causally. All of one dtype;
            views are welcome if elements of a row lie side by side.
        skipped: indices of rows that do not count; a tensor on the device spares a copy to it.
        scale: factor on the logits.

    Returns:
        (H, M) float32.
    """
    assert all(part.stride(-1) == 1 for part in (query, prefix, chunk, own))
    num_heads, rows, dim = query.shape
    heads, count, _ = chunk.shape
    block_d = triton.next_power_of_2(dim)
    # Two blocks on the way and one that stays take at most 96 KiB of shared memory.
    large, small = (128, 64) if block_d <= 128 else (64, 64)
    shape = {"GROUPS": num_heads // heads, "DIM": dim, "BLOCK_D": block_d, "num_warps": 4, "num_stages": 2}
    # On a CPU Triton's interpreter runs, which has no bfloat16 product.
    shape["WIDE"] = query.device.type == "cpu"
    queries, *parts = ((part, part.stride(0), part.stride(1)) for part in (query, own, prefix, chunk))
    lse = torch.empty(num_heads, rows, dtype=torch.float32, device=query.device)
    best = torch.empty(num_heads, count, dtype=torch.float32, device=query.device)
    scale *= math.log2(math.e)
    with torch.cuda.device_of(query):  # type: ignore[no-untyped-call]
        _normalise[(triton.cdiv(rows, large), num_heads)](
            *queries, *chain(*parts), lse, rows, prefix.shape[1], count, scale, **shape, ROWS=large, KEYS=small
        )
        lse[:, skipped] = torch.inf
        _receive[(triton.cdiv(count, large), num_heads)](
            *queries, *parts[-1], lse, best, rows, count, scale, **shape, ROWS=small, KEYS=large
        )
    return best.view(heads, -1, count).amax(1).exp2()


@triton.jit
def _dot(left: tl.tensor, right: tl.tensor, WIDE: tl.constexpr) -> tl.tensor:
    """Product of two blocks in float32."""
    if WIDE:
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, input_precision="ieee")


@triton.jit(do_not_specialize=("rows", "prefix_count", "chunk_count"))
def _normalise(
    query: tl.tensor,
    query_head: tl.tensor,
    query_row: tl.tensor,
    own: tl.tensor,
    own_head: tl.tensor,
    own_row: tl.tensor,
    prefix: tl.tensor,
    prefix_head: tl.tensor,
    prefix_row: tl.tensor,
    chunk: tl.tensor,
    chunk_head: tl.tensor,
    chunk_row: tl.tensor,
    lse: tl.tensor,
    rows: tl.tensor,
    prefix_count: tl.tensor,
    chunk_count: tl.tensor,
    scale: tl.tensor,
    GROUPS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
) -> None:
    """Base-2 log-sum-exp of a block of rows of one query head."""
    head = tl.program_id(1).to(tl.int64)
    group = head // GROUPS
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    dims = tl.arange(0, BLOCK_D)
    wanted = (row < rows)[:, None] & (dims < DIM)[None, :]
    block = tl.load(query + head * query_head + row[:, None] * query_row + dims[None, :], mask=wanted, other=0.0)
    best = tl.full((ROWS,), -float("inf"), tl.float32)
    total = tl.full((ROWS,), 0.0, tl.float32)
    # Every row sees its first own key, so `best` is finite after the first block, whatever is masked later.
    end = tl.minimum(rows, (tl.program_id(0) + 1) * ROWS)
    best, total = _pass_keys(
        best, total, block, row, own + group * own_head, own_row, end, scale, True, DIM, BLOCK_D, WIDE, KEYS
    )
    best, total = _pass_keys(
        best,
        total,
        block,
        row,
        prefix + group * prefix_head,
        prefix_row,
        prefix_count,
        scale,
        False,
        DIM,
        BLOCK_D,
        WIDE,
        KEYS,
    )
    best, total = _pass_keys(
        best,
        total,
        block,
        row,
        chunk + group * chunk_head,
        chunk_row,
        chunk_count,
        scale,
        False,
        DIM,
        BLOCK_D,
        WIDE,
        KEYS,
    )
    tl.store(lse + head * rows + row, best + tl.log2(total), mask=row < rows)


@triton.jit
def _pass_keys(
    best: tl.tensor,
    total: tl.tensor,
    block: tl.tensor,
    row: tl.tensor,
    keys: tl.tensor,
    key_row: tl.tensor,
    count: tl.tensor,
    scale: tl.tensor,
    CAUSAL: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WIDE: tl.constexpr,
    KEYS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Take `count` keys into the running maximum and sum of every row of a block."""
    dims = tl.arange(0, BLOCK_D)
    for first in range(0, count, KEYS):
        key = first + tl.arange(0, KEYS)
        wanted = (dims < DIM)[:, None] & (key < count)[None, :]
        part = tl.load(keys + key[None, :] * key_row + dims[:, None], mask=wanted, other=0.0)
        logits = _dot(block, part, WIDE) * scale
        seen = (key < count)[None, :]
        if CAUSAL:
            seen = seen & (key[None, :] <= row[:, None])
        logits = tl.where(seen, logits, -float("inf"))
        higher = tl.maximum(best, tl.max(logits, 1))
        total = total * tl.exp2(best - higher) + tl.sum(tl.exp2(logits - higher[:, None]), 1)
        best = higher
    return best, total


@triton.jit(do_not_specialize=("rows", "chunk_count"))
def _receive(
    query: tl.tensor,
    query_head: tl.tensor,
    query_row: tl.tensor,
    chunk: tl.tensor,
    chunk_head: tl.tensor,
    chunk_row: tl.tensor,
    lse: tl.tensor,
    received: tl.tensor,
    rows: tl.tensor,
    chunk_count: tl.tensor,
    scale: tl.tensor,
    GROUPS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
) -> None:
    """Largest base-2 logarithm of the probability that a block of keys receives from one query head."""
    head = tl.program_id(1).to(tl.int64)
    key = tl.program_id(0) * KEYS + tl.arange(0, KEYS)
    dims = tl.arange(0, BLOCK_D)
    wanted = (key < chunk_count)[:, None] & (dims < DIM)[None, :]
    keys = chunk + (head // GROUPS) * chunk_head
    block = tl.load(keys + key[:, None] * chunk_row + dims[None, :], mask=wanted, other=0.0)
    best = tl.full((KEYS,), -float("inf"), tl.float32)
    for first in range(0, rows, ROWS):
        row = first + tl.arange(0, ROWS)
        within = (dims < DIM)[:, None] & (row < rows)[None, :]
        part = tl.load(query + head * query_head + row[None, :] * query_row + dims[:, None], mask=within, other=0.0)
        # A row past the end or one that does not count has an infinite log-sum-exp.
        normaliser = tl.load(lse + head * rows + row, mask=row < rows, other=float("inf"))
        logits = _dot(block, part, WIDE) * scale - normaliser[None, :]
        best = tl.maximum(best, tl.max(logits, 1))
    tl.store(received + head * chunk_count + key, best, mask=key < chunk_count)
