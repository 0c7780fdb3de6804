"""Figures of a conversation: what it holds in memory and on disk, per segment and, in proportion, per turn."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from importlib.util import find_spec
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from kvchat.cache.coded import ROWS, START
from kvchat.cache.ragged import SegmentedCache
from kvchat.episodes.embedder import Embedder, find_embedder
from kvchat.episodes.listing import episodes
from kvchat.episodes.vectors import Vectors
from kvchat.fingerprint import fingerprint_id
from kvchat.residence.catalogue import Entry, positions
from kvchat.residence.residence import Residence
from kvchat.store.store import Message, SegmentRecord, SessionInfo, Store

if TYPE_CHECKING:
    from kvchat.session import Conversation

Covered = Sequence[tuple[SegmentRecord, int]]
"""As `Store.cover` gives it."""


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
        "device": model.device.type,
        "context_window": model.context_window,
        "num_turns": sum(message.role == "user" for message in path),
        "num_seen": residence.cache.num_seen,
        "num_tokens": conversation.num_tokens,
        "position": residence.cache.position,
        "offset": residence.cache.offset,
        "rebased": residence.cache.offset > 0,
        "num_pairs": dense,
        "num_kept": residence.cache.num_sealed_rows + tail,
        "keep_ratio": residence.config.compress.keep_ratio,
        "kv_budget": residence.config.compress.kv_budget,
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
        "segments": _stored(path, covered, _gaps(path, covered)),
    }


def episodes_of(conversation: Conversation) -> list[dict[str, Any]]:
    """What the turns are about, as far as it is known without computing vectors of them."""
    residence = conversation.residence
    embedder = find_embedder(residence.config.episodes, residence.engine)
    return stored_episodes(conversation.store, conversation.path, embedder, residence.config.episodes.clusters)


def stored_episodes(store: Store, path: Sequence[Message], embedder: Embedder, wanted: int = 0) -> list[dict[str, Any]]:
    """The episodes of turns that have vectors in the store; none without scikit-learn. The embedder is not run."""
    vectors = Vectors(store, embedder)
    unknown = {message.id for message in vectors.missing(path)}
    known = [replace(message, content="") if message.id in unknown else message for message in path]
    if find_spec("sklearn") is None or not any(message.content.strip() for message in known):
        return []
    return [asdict(episode) for episode in episodes(vectors, known, wanted)]


def bytes_of(records: Iterable[SegmentRecord]) -> int:
    """What segments take on disk, and what they share once."""
    records = list(records)
    return sum(one.nbytes for one in records) + sum(len(basis) for basis in {one.basis for one in records})


def store_room(store: Store) -> dict[str, int]:
    """Bytes that all sessions take, may take (0 = no limit), and that the disk has left and is to keep."""
    room = store.room()
    sizes = {"bytes_in_use": room.in_use, "disk_budget": room.disk_budget}
    return sizes | {"bytes_free": room.free, "min_free": room.min_free}


def list_segments(residence: Residence, path: Sequence[Message], covered: Covered) -> list[dict[str, Any]]:
    """Each segment of the path, in memory or not: tokens, turns, where it lies, rows, bytes in memory and on disk.

    Its tier is memory, part (some of its chunks are there), disk (none), or text (no KV is to be had). Its place is
    that of its first token in the conversation, its position where the network sees that, None if it does not.
    """
    model, cache = residence.engine.model, residence.cache
    known, covered_ids = {entry.id: entry for entry in residence.known if entry.id}, {one.id for one, _ in covered}
    held = {one.id: one.chunks for one in residence.tiers.residents} | {one.id: 1 for one, _ in residence.waiting}
    listed = _stored(path, covered, [one for one in residence.known if one.id not in covered_ids])
    rows, places, residents = (
        rows_held(cache),
        _positions(residence),
        {one.id: one for one in residence.tiers.residents},
    )
    recalled = _recalled(path)
    for segment in listed:
        start, chunks, entry = segment["start"], held.get(segment["id"], 0), known.get(segment["id"])
        dense = (segment["end"] - start) * model.pairs_per_token
        sizes = entry.sizes.tolist() if entry else [1] * segment["num_chunks"]
        resident = residents.get(segment["id"])
        there = sum(rows.get(low, 0) for low, _ in resident.stretches) if resident else dense if chunks else 0
        is_coded = cache.encoded and there and segment["kind"] == "sealed"
        segment |= {
            "tier": _tier(chunks, segment, lost=bool(entry and entry.lost)),
            "position": places.get(start) if chunks else None,
            "recalled": start in recalled,
            "chunks_held": chunks,
            "rows_stored": round(dense * sum(sizes[: segment["stored_chunks"]]) / max(1, sum(sizes))),
            "rows": there,
            "rows_total": dense,
            "bytes_in_memory": residence.tiers.nbytes(resident)
            if is_coded and resident
            else there * model.bytes_per_pair,
        }
    return listed


def rows_held(cache: SegmentedCache) -> dict[int, int]:
    """Pairs in memory of each sealed segment, by where it begins; as `Tiers.rows`, of all at once."""
    every = [form.runs for layer in cache.layers for form in layer.forms]
    if not every:
        return {}
    runs = np.concatenate(every)
    starts, which = np.unique(runs[:, START], return_inverse=True)
    counts = np.bincount(which.ravel(), weights=runs[:, ROWS], minlength=len(starts))
    return {int(start): int(count) for start, count in zip(starts, counts, strict=True)}


def _positions(residence: Residence) -> dict[int, int]:
    """Where the segments in memory stand for the network, by their start; waiting ones stand in the tail."""
    there = {one.start: one.stretches for one in residence.tiers.residents if one.chunks}
    sealed = [(one.start, one.stretch(*span)) for one in residence.known for span in there.get(one.start, ())]
    places = positions([stretch for _, stretch in sealed], residence.offset)
    found = {start: at for (start, _), at in zip(reversed(sealed), reversed(places), strict=True)}
    return found | {record.start: record.start - residence.offset for record, _ in residence.waiting}


def _recalled(path: Sequence[Message]) -> set[int]:
    """Where the segments begin that came back for the newest answer."""
    answer = next((message for message in reversed(path) if message.role == "assistant"), None)
    return set((answer.usage or {}).get("recalled", ())) if answer else set()


def _tier(chunks: int, segment: dict[str, Any], lost: bool = False) -> str:
    if chunks:
        return "memory" if chunks >= segment["num_chunks"] else "part"
    return "disk" if segment["stored_chunks"] and not lost else "text"


def _gaps(path: Sequence[Message], covered: Covered) -> list[Entry]:
    """Tokens of a path that no stored segment has."""
    bounds, gaps, end = Residence.bounds(path), list[Entry](), 0
    index = {bound: number for number, bound in reversed([*enumerate(bounds)])}
    for start, low in [*((one.start, bounds[index[one.start] + used]) for one, used in covered), (bounds[-1], 0)]:
        gaps += [Entry.missing(end, start)] if start > end else []
        end = low
    return gaps


def _stored(path: Sequence[Message], covered: Covered, others: Sequence[Entry] = ()) -> list[dict[str, Any]]:
    """Each segment as far as the store knows it, and `others`, which it does not have, in their order."""
    bounds, listed = Residence.bounds(path), list[dict[str, Any]]()
    index = {bound: number for number, bound in reversed([*enumerate(bounds)])}
    counts = [*accumulate(message.role == "user" for message in path)]
    for record, used in covered:
        first = index[record.start]
        told = {"codec": record.codec, "num_chunks": record.num_chunks, "stored_chunks": record.stored_chunks}
        told |= {"bytes_on_disk": record.nbytes, "seal_s": record.seal_s}
        listed.append({"id": record.id, "start": record.start, "end": bounds[first + used], "kind": record.kind} | told)
    for one in others:
        told = {"codec": "", "num_chunks": one.num_chunks, "stored_chunks": 0, "bytes_on_disk": 0, "seal_s": None}
        kind = "text" if one.lost else "sealed"
        listed.append({"id": one.id, "start": one.start, "end": one.end, "kind": kind} | told)
    for segment in listed:
        start, end = segment["start"], segment["end"]
        segment["turns"] = [max(1, counts[number]) for number in (index[start], index[end] - 1)]
        segment |= {"place": start, "tier": _tier(0, segment), "position": None, "recalled": False, "chunks_held": 0}
    return sorted(listed, key=lambda segment: segment["start"])


def _turns(conversation: Conversation, segments: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each turn's share of the segments that cover it, by its tokens."""
    path = conversation.path
    bounds, ends = conversation.residence.bounds(path), [segment["end"] for segment in segments]
    starts = [index for index, message in enumerate(path) if message.role == "user"]
    edges = [0, *(bounds[index] for index in starts[1:]), bounds[-1]]
    turns = []
    for turn, (low, high) in enumerate(pairwise(edges), 1):
        shares = {"rows": 0.0, "bytes_in_memory": 0.0, "bytes_on_disk": 0.0}
        for segment in segments[bisect_right(ends, low) : bisect_right(ends, high) + 1]:
            common = max(0, min(high, segment["end"]) - max(low, segment["start"]))
            for key in shares:
                shares[key] += segment[key] * common / (segment["end"] - segment["start"])
        turns.append({"turn": turn, "tokens": high - low, **{key: round(value) for key, value in shares.items()}})
    return turns
