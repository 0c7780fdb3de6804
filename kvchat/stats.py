"""Figures of a conversation: what it holds in memory and on disk, per segment and, in proportion, per turn."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from kvchat.fingerprint import fingerprint_id
from kvchat.records import turn_of
from kvchat.residence import Residence
from kvchat.store import Message, SegmentRecord, SessionInfo, Store

if TYPE_CHECKING:
    from kvchat.session import Conversation


def describe(conversation: Conversation) -> dict[str, Any]:
    """Everything `kvchat stats` shows; bytes are those of tensor storages and of the store's rows."""
    model, path, residence = conversation.engine.model, conversation.path, conversation.residence
    covered = residence.store.cover([message.id for message in path], residence.fingerprint)
    segments = list_segments(residence, path, covered)
    dense = residence.cache.num_seen * model.pairs_per_token
    tail = residence.cache.tail_length * model.pairs_per_token
    return {
        "name": conversation.info.name,
        "model": model.name,
        "context_window": model.context_window,
        "num_turns": sum(message.role == "user" for message in path),
        "num_seen": residence.cache.num_seen,
        "num_tokens": conversation.num_tokens,
        "num_pairs": dense,
        "num_kept": residence.cache.num_sealed_rows + tail,
        "keep_ratio": residence.config.compress.keep_ratio,
        "bytes_in_memory": residence.cache.sealed_bytes + tail * model.bytes_per_pair,
        "bytes_dense": dense * model.bytes_per_pair,
        "bytes_on_disk": bytes_of(record for record, _ in covered),
        "stored": sum(segment["rows_stored"] for segment in segments) / max(1, dense),
        "store": store_room(conversation.store),
        "segments": segments,
        "turns": _turns(conversation, segments),
        "last": conversation.last and conversation.last.to_dict() | {"seal_s": conversation.seal_s},
    }


def describe_stored(store: Store, info: SessionInfo) -> dict[str, Any]:
    """As `describe`, as far as the store knows: nothing of what memory holds."""
    path = store.path(info.tip)
    covered = store.cover([message.id for message in path], fingerprint_id(info.fingerprint))
    return {
        "name": info.name,
        "model": info.model,
        "num_turns": info.num_turns,
        "num_tokens": info.num_tokens,
        "bytes_on_disk": bytes_of(record for record, _ in covered),
        "stored": info.stored,
        "store": store_room(store),
        "segments": _stored(path, covered),
    }


def bytes_of(records: Iterable[SegmentRecord]) -> int:
    """What segments take on disk, and what they share once."""
    records = list(records)
    return sum(one.nbytes for one in records) + sum(len(basis) for basis in {one.basis for one in records})


def store_room(store: Store) -> dict[str, int]:
    """Bytes that all sessions take, may take (0 = no limit), and that the disk has left and is to keep."""
    room = store.room()
    sizes = {"bytes_in_use": room.in_use, "disk_budget": room.disk_budget}
    return sizes | {"bytes_free": room.free, "min_free": room.min_free}


def list_segments(
    residence: Residence, path: Sequence[Message], covered: Sequence[tuple[SegmentRecord, int]]
) -> list[dict[str, Any]]:
    """Each segment of the path, given as `Store.cover` does: tokens, turns, rows, bytes in memory and on disk."""
    model = residence.engine.model
    held = {one.id: one for one in residence.tiers.residents}
    waiting = {record.id for record, _ in residence.waiting}
    listed = _stored(path, covered)
    for segment, (record, _) in zip(listed, covered, strict=True):
        one, dense = held.get(record.id), (segment["end"] - segment["start"]) * model.pairs_per_token
        rows = residence.tiers.rows(one) if one else dense * (record.id in waiting)
        sizes = one.header.ranking.sizes if one else [1] * record.num_chunks
        segment |= {
            "chunks_held": one.chunks if one else int(record.id in waiting),
            "rows_stored": round(dense * float(sum(sizes[: record.stored_chunks]) / sum(sizes))),
            "rows": rows,
            "rows_total": dense,
            "bytes_in_memory": residence.cache.nbytes(one.start) if one else rows * model.bytes_per_pair,
        }
    return listed


def _stored(path: Sequence[Message], covered: Sequence[tuple[SegmentRecord, int]]) -> list[dict[str, Any]]:
    """Each segment as far as the store knows it."""
    bounds, listed = Residence.bounds(path), []
    for record, used in covered:
        first = bounds.index(record.start)
        listed.append(
            {
                "id": record.id,
                "start": record.start,
                "end": bounds[first + used],
                "kind": record.kind,
                "turns": [turn_of(path, first), turn_of(path, first + used - 1)],
                "codec": record.codec,
                "num_chunks": record.num_chunks,
                "stored_chunks": record.stored_chunks,
                "bytes_on_disk": record.nbytes,
                "seal_s": record.seal_s,
            }
        )
    return listed


def _turns(conversation: Conversation, segments: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each turn's share of the segments that cover it, by its tokens."""
    path = conversation.path
    bounds = conversation.residence.bounds(path)
    starts = [index for index, message in enumerate(path) if message.role == "user"]
    edges = [0, *(bounds[index] for index in starts[1:]), bounds[-1]]
    turns = []
    for turn, (low, high) in enumerate(pairwise(edges), 1):
        shares = {"rows": 0.0, "bytes_in_memory": 0.0, "bytes_on_disk": 0.0}
        for segment in segments:
            common = max(0, min(high, segment["end"]) - max(low, segment["start"]))
            for key in shares:
                shares[key] += segment[key] * common / (segment["end"] - segment["start"])
        turns.append({"turn": turn, "tokens": high - low, **{key: round(value) for key, value in shares.items()}})
    return turns
