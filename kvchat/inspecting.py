"""What became of the tokens of one turn: of each how much is kept, by layer and head, by rank, and where it lies.

Only the turn's own tokens count, also where they lie in a segment with those of other turns.

Letters: L layers, H KV heads, n tokens, C rank chunks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from kvchat.branching import question_at, questions
from kvchat.cache.segment import Ranking
from kvchat.errors import CodecError
from kvchat.residence.catalogue import Entry
from kvchat.residence.loading import Resident
from kvchat.residence.residence import Residence
from kvchat.residence.sealing import read_header, shielded
from kvchat.store.store import SegmentRecord

if TYPE_CHECKING:
    from kvchat.session import Conversation

Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Token:
    """One token of a turn.

    text       what it adds to the text, nothing in it neutralised; a character of several tokens is in its last one's
    role       whose message it is in
    kept       part of its pairs that memory holds, 0 to 1
    score      how its pairs rank in their segment, 0 (worst) to 1; None: they are not ranked
    protected  it is never evicted
    """

    text: str
    role: str
    kept: float
    score: float | None
    protected: bool


@dataclass(frozen=True, slots=True)
class Bin:
    """Pairs with scores from `low` to `high`, and whether memory holds them."""

    low: float
    high: float
    pairs: int
    kept: bool


@dataclass(frozen=True, slots=True)
class Inspection:
    """One turn, the first with the system prompt.

    tokens     all of them
    pairs      of all layers and heads
    kept       of them in memory
    heat       L rows of H: the part of the turn's pairs that is kept
    tier       memory, part (some of it), disk (none), text (there is no KV), or tail: exact, not sealed yet
    codec      of its segments, "" where it has none
    scorer     how they are ranked, "" where they are not
    bytes_in_memory, bytes_on_disk  its share of the segments that it lies in
    histogram  its ranked pairs by the scores that their segments' chunks have, lowest first
    protected  tokens that are never evicted
    """

    turn: int
    tokens: tuple[Token, ...]
    pairs: int
    kept: int
    heat: tuple[tuple[float, ...], ...]
    tier: str
    codec: str
    scorer: str
    bytes_in_memory: int
    bytes_on_disk: int
    histogram: tuple[Bin, ...]
    protected: int


@dataclass(frozen=True, slots=True)
class _Part:
    """Tokens of a turn that lie in one segment, or in none: (L, H, n) which of their pairs are kept.

    ranking, chunk_of  of their segment and, (L, H, n), of them; None: they are not ranked
    """

    kept: Flags
    tier: str
    codec: str = ""
    scorer: str = ""
    memory: float = 0.0
    disk: float = 0.0
    ranking: Ranking | None = None
    chunk_of: npt.NDArray[np.uint8] | None = None


def inspect(conversation: Conversation, turn: int) -> Inspection:
    """What became of a turn, from 1.

    Raises:
        InputError: there is no such turn.
    """
    path, residence = conversation.path, conversation.residence
    question_at(path, turn)
    conversation.save()
    conversation.unseen(conversation.restore())
    starts = [0, *questions(path)[1:], len(path)]
    first, last = starts[turn - 1], starts[turn]
    bounds = residence.bounds(path)
    parts = [*_parts(residence, bounds[first], bounds[last])]
    kept = np.concatenate([part.kept for part in parts], axis=2)
    tokens = _tokens(conversation, first, last, kept, [score for part in parts for score in _ranks(part)])
    return Inspection(
        turn,
        tokens,
        kept.size,
        int(kept.sum()),
        tuple(tuple(row) for row in kept.mean(axis=2).tolist()),
        _tier(parts),
        _names(part.codec for part in parts),
        _names(part.scorer for part in parts),
        round(sum(part.memory for part in parts)),
        round(sum(part.disk for part in parts)),
        _histogram(parts),
        sum(token.protected for token in tokens),
    )


def _parts(residence: Residence, low: int, high: int) -> Iterator[_Part]:
    """All tokens at places [low, high), in their order."""
    held = {one.start: one for one in residence.tiers.residents}
    for entry in residence.known:
        start, end = max(low, entry.start), min(high, entry.end)
        if start < end:
            yield _sealed(residence, entry, held.get(entry.start), start, end)
    seen = residence.cache.num_seen
    edges = [residence.cache.tail_start, *(record.start for record, _ in residence.waiting), residence.num_saved, seen]
    for begin, finish in pairwise(sorted(set(edges))):
        start, end = max(low, begin), min(high, finish)
        if start < end:
            yield _tail(residence, start, end)
    if max(low, seen) < high:
        yield _Part(_all(residence, high - max(low, seen), False), "text")


def _all(residence: Residence, tokens: int, kept: bool) -> Flags:
    model = residence.engine.model
    return np.full((model.num_hidden_layers, model.num_key_value_heads, tokens), kept)


def _tail(residence: Residence, start: int, end: int) -> _Part:
    """Tokens of the tail, which are in memory as they were computed, and saved so if they wait."""
    tokens, model = end - start, residence.engine.model
    memory = tokens * model.pairs_per_token * model.bytes_per_pair
    kept = _all(residence, tokens, True)
    for waiting, used in residence.waiting:
        if waiting.start <= start < used:
            record = residence.store.segment(waiting.id)
            return _Part(kept, "tail", waiting.codec, memory=memory, disk=_share(record, tokens))
    return _Part(kept, "tail", memory=memory)


def _share(record: SegmentRecord | None, tokens: int) -> float:
    """Bytes on disk of so many tokens of a segment."""
    return record.nbytes * tokens / (record.end - record.start) if record else 0.0


def _sealed(residence: Residence, entry: Entry, resident: Resident | None, start: int, end: int) -> _Part:
    """Tokens of a sealed segment, of which memory may hold something."""
    record = residence.store.segment(entry.id) if entry.id else None
    ranking = resident.header.ranking if resident else None
    with suppress(CodecError):
        if ranking is None and record and not entry.lost:
            ranking = read_header(record, residence.engine.model).ranking
    if ranking is None:
        return _Part(_all(residence, end - start, False), "text")
    chunk_of = ranking.chunk_of[:, :, start - ranking.start : end - ranking.start]
    kept = chunk_of < (resident.chunks if resident else 0)
    if resident and resident.part.spans:
        kept = kept & _inside(resident, start, end)
    tier = "memory" if kept.all() else "part" if kept.any() else "disk" if record and record.stored_chunks else "text"
    codec = record.codec if record else ",".join(resident.header.codecs) if resident else ""
    disk = _share(record, end - start)
    memory = _memory(residence, resident, int(kept.sum()))
    return _Part(kept, tier, codec, ranking.method, memory, disk, ranking, chunk_of)


def _inside(resident: Resident, start: int, end: int) -> Flags:
    """Which tokens at places [start, end) are in memory of a segment of which only some came back."""
    flags = np.zeros(end - start, np.bool_)
    for low, high in resident.part.spans:
        flags[max(0, low - start) : max(0, high - start)] = True
    return flags


def _memory(residence: Residence, resident: Resident | None, pairs: int) -> float:
    """Bytes that so many pairs of a segment take in memory."""
    if not resident or not pairs:
        return 0.0
    if not residence.cache.encoded:
        return pairs * residence.engine.model.bytes_per_pair
    return residence.tiers.nbytes(resident) * pairs / max(1, residence.tiers.rows(resident))


def _tier(parts: Sequence[_Part]) -> str:
    """Where a turn lies that is in several places."""
    tiers = {part.tier for part in parts}
    if len(tiers) == 1:
        return tiers.pop()
    if tiers <= {"memory", "tail"}:
        return "memory"
    return "disk" if tiers <= {"disk", "text"} else "part"


def _names(names: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(name for some in names for name in some.split(",") if name))


def _ranks(part: _Part) -> list[float] | list[None]:
    """Of each token how its pairs rank in their segment on average, 0 (worst) to 1."""
    if part.ranking is None or part.chunk_of is None or part.ranking.num_chunks == 1:
        return [None] * part.kept.shape[2]
    ends = np.cumsum(part.ranking.sizes) / part.ranking.sizes.sum()
    middles = 1 - (ends + np.concatenate([[0.0], ends[:-1]])) / 2
    ranks: list[float] = middles[part.chunk_of].mean(axis=(0, 1)).tolist()
    return ranks


def _histogram(parts: Sequence[_Part]) -> tuple[Bin, ...]:
    """A bin for each rank chunk that pairs of these lie in; chunks of different segments with equal bounds are one."""
    counts = Counter[tuple[float, float, bool]]()
    for part in parts:
        if part.ranking is None or part.chunk_of is None:
            continue
        edges = _edges(part.ranking)
        for chunk in np.unique(part.chunk_of).tolist():
            inside = part.chunk_of == chunk
            for kept, pairs in ((True, int((inside & part.kept).sum())), (False, int((inside & ~part.kept).sum()))):
                counts[edges[chunk + 1], edges[chunk], kept] += pairs
    return tuple(Bin(low, high, pairs, kept) for (low, high, kept), pairs in sorted(counts.items()) if pairs)


def _edges(ranking: Ranking) -> list[float]:
    """C + 1 falling bounds of the scores of a segment's chunks: of each only the middle is known.

    Where not even that is, it is the rank that counts, from 1 (best) to 0.
    """
    scores = ranking.scores
    if scores is None or len(scores) != ranking.num_chunks or not np.isfinite(scores).all():
        ends: list[float] = (1 - np.cumsum(ranking.sizes) / ranking.sizes.sum()).tolist()
        return [1.0, *ends]
    inner = [(one + other) / 2 for one, other in pairwise(scores)]
    if not inner:
        return [scores[0], scores[0]]
    lowest = 2 * scores[-1] - inner[-1]
    return [2 * scores[0] - inner[0], *inner, max(0.0, lowest) if scores[-1] >= 0 else lowest]


def _tokens(
    conversation: Conversation, first: int, last: int, kept: Flags, scores: Sequence[float | None]
) -> tuple[Token, ...]:
    """The tokens of messages [first, last) of the path."""
    path, template = conversation.path, conversation.engine.model.template
    config = conversation.residence.config.compress
    texts, roles = list[str](), list[str]()
    for message in path[first:last]:
        texts += template.shown(message.token_ids, message.content_span)
        roles += [message.role] * len(message.token_ids)
    flags = shielded(path, first, last, config)
    parts: list[float] = kept.mean(axis=(0, 1)).tolist()
    return tuple(map(Token, texts, roles, parts, scores, flags))
