"""KVzip's score in tiles equals one plain softmax: on a CUDA device, or without one in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kvchat.compress.scorers.kvzip import attention_received, attention_received_plainly

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"

pytest.importorskip("triton", reason="Triton is not installed")

TOLERANCE = {torch.bfloat16: 2e-3, torch.float16: 2e-3, torch.float32: 2e-5}

SHAPES = [
    # KV heads, groups, rows, prefix, chunk, head_dim
    (torch.bfloat16, (1, 1, 1, 0, 1, 64)),
    (torch.float16, (1, 1, 1, 2, 1, 96)),
    (torch.bfloat16, (2, 3, 7, 5, 3, 64)),
    (torch.float32, (2, 3, 7, 5, 3, 96)),
    (torch.float32, (1, 4, 131, 0, 130, 64)),
    (torch.bfloat16, (1, 7, 33, 70, 65, 64)),
    (torch.float16, (2, 1, 65, 1, 129, 96)),
    (torch.bfloat16, (1, 2, 20, 3, 40, 256)),
]


def random_parts(
    heads: int, groups: int, rows: int, prefix: int, chunk: int, dim: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Query, prefix, chunk and own keys as they come: the last two are views of a tail with room to spare."""
    room = torch.randn(heads, chunk + rows + 9, dim, dtype=dtype, device=DEVICE)
    query = torch.randn(rows, heads * groups, dim, dtype=dtype, device=DEVICE).transpose(0, 1) * 2
    start = torch.randn(heads, prefix, dim, dtype=dtype, device=DEVICE)
    return query, start, room[:, :chunk], room[:, chunk : chunk + rows]


@pytest.mark.parametrize(("dtype", "shape"), SHAPES)
def test_tiles_equal_one_plain_softmax(dtype: torch.dtype, shape: tuple[int, int, int, int, int, int]) -> None:
    from kvchat.attention import received

    if CUDA and dtype == torch.float32:
        pytest.skip("16-bit floats only")
    torch.manual_seed(0)
    parts = random_parts(*shape, dtype)
    skipped = [0, shape[2] - 1] if shape[2] > 2 else []
    tiled = received.attention_received(*parts, skipped, 0.125)
    plain = attention_received_plainly(*parts, skipped, 0.125)
    assert tiled.dtype == torch.float32
    torch.testing.assert_close(tiled, plain, rtol=TOLERANCE[dtype], atol=1e-7)


def test_skipped_rows_are_a_list_or_a_tensor() -> None:
    from kvchat.attention import received

    parts = random_parts(1, 2, 9, 3, 4, 64, torch.float16)
    every_other = torch.arange(0, 9, 2, device=DEVICE)
    by_tensor = received.attention_received(*parts, every_other, 0.125)
    assert by_tensor.equal(received.attention_received(*parts, every_other.tolist(), 0.125))
    assert not by_tensor.equal(received.attention_received(*parts, [], 0.125))


def test_a_key_that_nobody_looks_at_receives_nothing() -> None:
    from kvchat.attention import received

    query = torch.zeros(2, 3, 64, dtype=torch.float16, device=DEVICE)
    query[..., 0] = 30.0
    chunk = torch.zeros(1, 2, 64, dtype=torch.float16, device=DEVICE)
    chunk[0, :, 0] = torch.tensor([30.0, -30.0])
    own = torch.zeros(1, 3, 64, dtype=torch.float16, device=DEVICE)
    score = received.attention_received(query, chunk[:, :0], chunk, own, [], 1.0)
    torch.testing.assert_close(score.cpu(), torch.tensor([[1.0, 0.0]]), atol=1e-7, rtol=1e-4)


def test_rows_that_do_not_count_leave_no_score() -> None:
    from kvchat.attention import received

    query, prefix, chunk, own = random_parts(1, 2, 5, 3, 4, 64, torch.float16)
    score = received.attention_received(query, prefix, chunk, own, list(range(5)), 0.125)
    assert score.tolist() == [[0.0] * 4]


@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
def test_the_scorer_uses_tiles_and_writes_no_logits() -> None:
    parts = random_parts(2, 4, 700, 10, 600, 128, torch.bfloat16)
    plain = attention_received_plainly(*parts, [3], 0.1)
    attention_received(*parts, [3], 0.1)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.testing.assert_close(attention_received(*parts, [3], 0.1), plain, rtol=2e-3, atol=1e-7)
    # One head's logits would be 1.7 MB; `assert_close` and both results take less.
    assert torch.cuda.max_memory_allocated() - before < 700 * 600 * 4
