"""KVzip's fast score equals its definition; rankings are exact, nested and protect what must stay."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvchat.compress.compressor import chunks_within, rank
from kvchat.compress.scorers import Subject
from kvchat.compress.scorers.kvzip import FIRST, LATER, KVzip, attention_received, attention_received_plainly, even_size

CUTS = (0.1, 0.3, 0.5, 1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("groups", "prefix", "chunk", "rows"), [(1, 0, 1, 3), (3, 5, 20, 31), (4, 2, 9, 9)])
def test_attention_received_equals_one_plain_softmax(
    groups: int, prefix: int, chunk: int, rows: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    query = torch.randn(2 * groups, rows, 16, dtype=dtype)
    parts = [torch.randn(2, n, 16, dtype=dtype) for n in (prefix, chunk, rows)]
    fast = attention_received(query, *parts, [0, rows - 1], 0.4)
    torch.testing.assert_close(
        fast, attention_received_plainly(query, *parts, [0, rows - 1], 0.4), atol=1e-5, rtol=1e-4
    )


def test_a_key_that_one_row_matches_exactly_scores_near_one() -> None:
    keys = torch.eye(8)[None] * 10
    score = attention_received(torch.eye(8)[None][:, 3:4] * 10, keys[:, :0], keys, keys[:, :1], [], 1.0)
    assert score[0, 3] > 0.99
    assert score[0, [0, 1, 2, 4, 5, 6, 7]].max() < 0.01


def test_skipped_rows_do_not_count() -> None:
    keys = torch.eye(8)[None] * 10
    query = torch.eye(8)[None][:, 3:5] * 10
    score = attention_received(query, keys[:, :0], keys, keys[:, :2], [0], 1.0)
    assert score[0, 4] > 0.99
    assert score[0, 3] < 0.01


def subject(tokens: int, before: tuple[int, ...]) -> Subject:
    return Subject(
        token_ids=tuple(range(100, 100 + tokens)),
        template=tuple(i % 5 == 0 for i in range(tokens)),
        protected=(False,) * tokens,
        before=before,
        prefix_keys=[torch.zeros(2, 0, 16)],
        encode=lambda text: (len(text),),
        ask=lambda content: (1, *content, 2),
    )


def test_passes_cover_the_segment_and_begin_where_the_last_one_ended() -> None:
    passes = list(KVzip(subject(45, ()), 20).passes())
    assert passes[0] == (1, len(FIRST), 2, *range(100, 123))
    # The eight spoken tokens before token 123: every fifth is a template token.
    assert passes[1] == (1, len(LATER), 113, 114, 116, 117, 118, 119, 121, 122, 2, *range(123, 145))
    assert len(passes) == 2


def test_a_later_segment_is_asked_for_by_the_words_before_it() -> None:
    assert next(iter(KVzip(subject(5, (7, 8)), 20).passes())) == (1, len(LATER), 7, 8, 2, *range(100, 105))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 4), st.integers(1, 3), st.integers(1, 30), st.floats(0, 1))
def test_chunks_are_nested_exact_and_hold_every_protected_pair(
    seed: int, layers: int, heads: int, tokens: int, share: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, 4, (layers, heads, tokens), generator=generator).float()
    protected = (torch.rand(tokens, generator=generator) < share).tolist()
    ranking = rank(scores, protected, CUTS, 7)
    assert (ranking.chunk_of[:, :, np.array(protected)] == 0).all()
    total, shield = scores.numel(), sum(protected) * layers * heads
    held = np.cumsum([np.count_nonzero(ranking.chunk_of == chunk) for chunk in range(len(CUTS))])
    assert held.tolist() == [max(int(cut * total + 1e-6), shield) for cut in CUTS]
    free = ~np.array(protected)
    for chunk in range(ranking.num_chunks):
        inside = scores.numpy()[:, :, free][ranking.chunk_of[:, :, free] == chunk]
        below = scores.numpy()[:, :, free][ranking.chunk_of[:, :, free] > chunk]
        assert not inside.size or not below.size or inside.min() >= below.max()


def test_equal_scores_rank_the_same_every_time() -> None:
    scores = torch.zeros(2, 3, 50)
    rankings = [rank(scores, [False] * 50, CUTS, 0).chunk_of for _ in range(3)]
    assert all((one == rankings[0]).all() for one in rankings)


@pytest.mark.parametrize(
    ("sizes", "keep", "held"),
    [((10, 20, 20, 50), 0.3, 2), ((10, 20, 20, 50), 0.29, 1), ((60, 0, 0, 40), 0.3, 1), ((5,), 1, 1)],
)
def test_the_budget_is_never_passed_but_for_the_first_chunk(sizes: tuple[int, ...], keep: float, held: int) -> None:
    assert chunks_within(np.array(sizes), keep) == held


@pytest.mark.parametrize(("tokens", "size", "chunks"), [(1, 2000, 1), (2500, 2000, 1), (2501, 2000, 2)])
def test_a_text_is_repeated_in_chunks_of_one_length(tokens: int, size: int, chunks: int) -> None:
    length = even_size(tokens, size)
    assert -(-tokens // length) == chunks and length <= size * 5 // 4
    assert tokens - (chunks - 1) * length > length - chunks, "none is much shorter than the others"
