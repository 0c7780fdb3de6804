"""Score the finished turns at the head of the tail, once, against their own exact KV, and rank their pairs."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from kvchat.cache.ragged import SegmentedCache
from kvchat.cache.segment import Ranking
from kvchat.codecs import SegmentHeader
from kvchat.compress.compressor import rank
from kvchat.compress.order import ORDERS
from kvchat.compress.scorers import SCORERS, Scorer, Subject
from kvchat.config import CompressConfig
from kvchat.engine import Engine
from kvchat.errors import CorruptFrame
from kvchat.events import Progress
from kvchat.model import Model
from kvchat.store import Message, SegmentRecord
from kvchat.template import ChatTemplate


def rank_turns(
    engine: Engine, cache: SegmentedCache, path: Sequence[Message], first: int, last: int, config: CompressConfig
) -> Generator[Progress, None, Ranking]:
    """Rank the pairs of messages [first, last), whose tokens begin the tail; the cache is left as it was."""
    subject = describe(engine.model.template, cache, path, first, last, config)
    keys, values = cache.tail(cache.tail_start, cache.tail_start + len(subject.token_ids))
    subject = replace(subject, keys=keys, values=values)
    scorer = SCORERS[config.scorer](subject, pass_length(engine, cache, config))
    yield from run_passes(engine, cache, scorer, len(subject.token_ids))
    return rank(ORDERS[config.allocate](scorer.scores()), subject.protected, cuts_of(config), cache.tail_start)


def read_header(record: SegmentRecord, model: Model) -> SegmentHeader:
    """A stored segment's header. Raises CodecError, also if it is not that of this segment and model."""
    header = SegmentHeader.of(record, (model.num_hidden_layers, model.num_key_value_heads, model.head_dim))
    if header.dtype != model.dtype:
        raise CorruptFrame(f"the header is of another model: KV in {header.dtype}, expected {model.dtype}")
    return header


def run_passes(engine: Engine, cache: SegmentedCache, scorer: Scorer, total: int) -> Generator[Progress, None, None]:
    """Run what the scorer wants to see, of a segment of `total` tokens."""
    done = 0
    for ids in scorer.passes():
        engine.observe(cache, ids, scorer)
        done = min(total, done + len(ids))
        yield Progress("seal", done, total)


def pass_length(engine: Engine, cache: SegmentedCache, config: CompressConfig) -> int:
    """About how many tokens of a segment one pass repeats, or a quarter more.

    Passes stand behind the conversation, and near the window's end must be shorter.
    """
    return min(config.score_chunk, max(256, engine.model.context_window - cache.num_seen - 64) * 4 // 5)


def cuts_of(config: CompressConfig) -> list[float]:
    """Cumulative fractions at which a ranking is cut."""
    return sorted({*config.rank_chunks, config.keep_ratio})


def describe(
    template: ChatTemplate,
    cache: SegmentedCache,
    path: Sequence[Message],
    first: int,
    last: int,
    config: CompressConfig,
) -> Subject:
    """The segment of messages [first, last) as its scorer sees it."""
    bounds = [0, *accumulate(len(message.token_ids) for message in path)]
    ids = [token for message in path for token in message.token_ids]
    unspoken, protected = template_tokens(path), protected_tokens(path, config)
    start, end = bounds[first], bounds[last]
    spoken = [token for token, other in zip(ids[:start], unspoken, strict=False) if not other]
    sample = template.user("x", first=False)
    low, high = sample.content_span

    def encode(text: str) -> tuple[int, ...]:
        piece = template.user(text, first=False)
        return piece.ids[slice(*piece.content_span)]

    return Subject(
        token_ids=tuple(ids[start:end]),
        template=tuple(unspoken[start:end]),
        protected=tuple(protected[start:end]),
        before=tuple(spoken[-8:]),
        prefix_keys=prefix_keys(cache, min(prefix_length(path, config.num_sink_tokens), start)),
        encode=encode,
        ask=lambda content: sample.ids[:low] + content + sample.ids[high:] + template.generation_prompt,
    )


def template_tokens(path: Sequence[Message]) -> list[bool]:
    """Whether each token of a path is no one's words: template tokens and the system prompt."""
    flags = []
    for message in path:
        low, high = message.content_span if message.role != "system" else (len(message.token_ids),) * 2
        flags += [not low <= i < high for i in range(len(message.token_ids))]
    return flags


def protected_tokens(path: Sequence[Message], config: CompressConfig) -> list[bool]:
    """Whether each token of a path is never evicted: system prompt and sinks, and the template's if that is set."""
    prefix = prefix_length(path, config.num_sink_tokens)
    kept = config.protect == "template"
    return [index < prefix or (kept and unspoken) for index, unspoken in enumerate(template_tokens(path))]


def prefix_length(path: Sequence[Message], num_sink_tokens: int) -> int:
    """Tokens at the beginning of the conversation that every head keeps: the system prompt, or else the sinks."""
    return max(len(path[0].token_ids) if path[0].role == "system" else 0, num_sink_tokens)


def prefix_keys(cache: SegmentedCache, length: int) -> list[Tensor]:
    """Keys (H, P, D) a layer of the tokens before position `length`, which every head keeps."""
    keys = []
    for layer in cache.layers:
        rows = layer.sealed_before(length)
        heads = [rows.keys[low:high] for low, high in pairwise(rows.bounds)]
        # As many as all heads have: fewer than `length` only if more sinks are wanted now than at sealing.
        least = min(len(head) for head in heads)
        keys.append(torch.stack([head[:least] for head in heads]))
    return keys
