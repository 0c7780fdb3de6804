"""What one session's KV takes in memory, or would."""

from __future__ import annotations

from kvchat.residence.residence import Residence


def per_token(residence: Residence) -> int:
    """Bytes of a token's exact KV."""
    model = residence.engine.model
    return model.pairs_per_token * model.bytes_per_pair


def held_bytes(residence: Residence) -> int:
    """KV in memory of one session."""
    return residence.cache.sealed_bytes + residence.cache.tail_length * per_token(residence)


def expected_bytes(residence: Residence, tokens: int) -> int:
    """About what a session of so many tokens will have, nothing of which is in memory."""
    compress, cap = residence.config.compress, residence.cap
    tokens = min(tokens, residence.engine.model.context_window)
    older = max(0, tokens - compress.recent_tokens)
    rows = tokens - older + compress.keep_ratio * older
    return int((min(rows, cap.tokens) if cap else rows) * per_token(residence))


def is_gone(residence: Residence) -> bool:
    """Whether the store has nothing of a segment that is in memory: what it gave way with does not come back."""
    ids = {one.id for one in residence.tiers.residents} - residence.saver.superseded
    return any(not residence.saver.has(one) for one in ids - residence.store.stored_chunks(ids).keys())
