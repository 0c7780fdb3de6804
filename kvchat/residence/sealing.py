"""Score the finished turns at the head of the tail, once, against their own exact KV, and rank their pairs."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from kvchat.anatomy import Anatomy
from kvchat.cache.marks import Marks
from kvchat.cache.ragged import SegmentedCache
from kvchat.cache.segment import Ranking
from kvchat.codecs import SegmentHeader
from kvchat.compress.aggregate import AGGREGATORS
from kvchat.compress.compressor import rank
from kvchat.compress.gates import Gate
from kvchat.compress.order import ORDERS, by_shares, coverage_cut, ordered
from kvchat.compress.policies import Policies
from kvchat.compress.scorers import Scorer, Subject, find_scorer
from kvchat.engine import Engine
from kvchat.errors import CorruptFrame
from kvchat.events import Progress
from kvchat.learned import SHARES, learned_kind, load_shares, load_weights, version
from kvchat.model import Model
from kvchat.residence.room import Cap
from kvchat.sections import CompressConfig
from kvchat.store.store import Message, SegmentRecord
from kvchat.template import ChatTemplate

Expect = Callable[[int], None]
"""Told of so many tokens that are computed next, beside the tail."""
TOLD = 8
"""Tokens before a segment that its scorer is told."""
LOOKING = frozenset({"kvzip+", "expected_attention", "gate", "kvp"})
"""Scorers that ask for parts of the network."""
SHARING = frozenset({"lifted", "defensive"})
"""Aggregates that do."""


class Ranker:
    """How segments are ranked: settings, and what was learned for them, which is read once.

    Raises:
        ConfigError, InputError: they cannot be ranked so.
    """

    def __init__(self, model: Model, config: CompressConfig) -> None:
        kind = learned_kind(config)
        self.config = config
        self.make = find_scorer(config.scorer)
        self.compare = way(model, config)
        self.method = config.method(version(model, config))
        """Part of a segment's name."""
        self.weights = load_weights(model, kind, config) if kind else None
        self._gate = Gate(self.weights) if self.weights is not None and kind == "gate" else None
        if self.weights is not None and kind == "kvp":
            Policies(self.weights)  # raises if they are not
        if config.scorer in LOOKING or config.aggregate in SHARING:
            _ = Anatomy(model).attentions

    def marks(self) -> Marks | None:
        """What asks the gate while tokens are computed, if that is the scorer."""
        return Marks(self._gate) if self._gate else None


def way(model: Model, config: CompressConfig) -> Callable[[Tensor], Tensor]:
    """How pairs of different layers and heads compare. Raises InputError."""
    if config.allocate in SHARES:
        return partial(by_shares, shares=load_shares(model, config))
    return ORDERS[config.allocate]


def rank_turns(
    engine: Engine,
    cache: SegmentedCache,
    path: Sequence[Message],
    first: int,
    last: int,
    ranker: Ranker,
    expect: Expect = lambda tokens: None,
) -> Generator[Progress, None, tuple[Ranking, list[float]]]:
    """Rank the pairs of messages [first, last), whose tokens begin the tail; the cache is left as it was.

    Also the cumulative fractions at which the ranking is cut. `expect` is told the length of each pass before it runs.
    """
    subject = describe(engine.model.template, cache, path, first, last, ranker.config)
    scores = yield from score(engine, cache, subject, ranker, expect)
    return ranked(scores, subject.protected, cache.tail_start, ranker.config, ranker.compare)


def ranked(
    scores: Tensor, protected: Sequence[bool], start: int, config: CompressConfig, compare: Callable[[Tensor], Tensor]
) -> tuple[Ranking, list[float]]:
    """A segment's ranking by scores (L, H, T), and the cumulative fractions at which it is cut.

    Args:
        protected: T flags. start: position of the first token.
        compare: how pairs of different layers and heads compare; see `way`.
    """
    order = ordered(scores, protected, compare)
    cuts = cuts_of(config) if config.allocate != "coverage" else cuts_of(config, coverage_cut(order, config.coverage))
    return rank(order, protected, cuts, start), cuts


def score(
    engine: Engine,
    cache: SegmentedCache,
    subject: Subject,
    ranker: Ranker,
    expect: Expect = lambda tokens: None,
) -> Generator[Progress, None, Tensor]:
    """Scores (L, H, T) of a segment whose tokens begin the tail; `expect` as for `rank_turns`."""
    config, start, end = ranker.config, cache.tail_start, cache.tail_start + len(subject.token_ids)
    keys, values = cache.tail(start, end)
    marks = None
    if config.scorer == "gate":
        blank = torch.full([len(keys), *keys[0].shape[:2]], torch.nan, device=engine.model.device)
        marks = cache.marks.take(start, end, blank) if cache.marks else blank
    subject = replace(
        subject,
        start=start - cache.offset,
        keys=keys,
        values=values,
        aggregate=AGGREGATORS.get(config.aggregate),
        network=engine.anatomy,
        learned=ranker.weights,
        marks=marks,
    )
    scorer = ranker.make(subject, pass_length(engine, cache, config))
    yield from run_passes(engine, cache, scorer, subject.token_ids, expect)
    return scorer.scores()


def read_header(record: SegmentRecord, model: Model) -> SegmentHeader:
    """A stored segment's header. Raises CodecError, also if it is not that of this segment and model."""
    header = SegmentHeader.of(record, (model.num_hidden_layers, model.num_key_value_heads, model.head_dim))
    if header.dtype != model.dtype:
        raise CorruptFrame(f"the header is of another model: KV in {header.dtype}, expected {model.dtype}")
    return header


def run_passes(
    engine: Engine,
    cache: SegmentedCache,
    scorer: Scorer,
    ids: tuple[int, ...],
    expect: Expect = lambda tokens: None,
) -> Generator[Progress, None, None]:
    """Run what the scorer wants to see of a segment of these tokens; `expect` as for `rank_turns`."""
    done, total = 0, len(ids)
    for tokens in scorer.passes():
        if isinstance(tokens, range):  # of the segment, which begins the tail
            start = cache.tail_start + tokens.start
            engine.observe(cache, ids[tokens.start : tokens.stop], scorer, start)
        else:
            expect(len(tokens))
            engine.observe(cache, tokens, scorer)
        done = min(total, done + len(tokens))
        yield Progress("seal", done, total)


def pass_length(engine: Engine, cache: SegmentedCache, config: CompressConfig) -> int:
    """About how many tokens of a segment one pass repeats, or a quarter more.

    Passes stand behind the conversation, and near the end of the window, or of what memory may take, must be shorter.
    """
    most = max(256, engine.model.context_window - cache.position - 64) * 4 // 5
    cap = Cap.of(config, engine.model)
    return min(config.score_chunk, most, max(64, cap.reserve - 64) * 4 // 5 if cap else most)


def cuts_of(config: CompressConfig, *more: float) -> list[float]:
    """Cumulative fractions at which a ranking is cut."""
    return sorted({*config.rank_chunks, config.keep_ratio, *more})


def describe(
    template: ChatTemplate,
    cache: SegmentedCache,
    path: Sequence[Message],
    first: int,
    last: int,
    config: CompressConfig,
) -> Subject:
    """The segment of messages [first, last) as its scorer sees it."""
    covered, start = path[first:last], sum(len(message.token_ids) for message in path[:first])
    ids = [token for message in covered for token in message.token_ids]
    unspoken = template_tokens(covered)
    protected = shielded(path, first, last, config)
    sample = template.user("x", first=False)
    low, high = sample.content_span

    def encode(text: str) -> tuple[int, ...]:
        piece = template.user(text, first=False)
        return piece.ids[slice(*piece.content_span)]

    return Subject(
        token_ids=tuple(ids),
        template=tuple(unspoken),
        protected=tuple(protected),
        before=_spoken_last(path[:first]),
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
    return shielded(path, 0, len(path), config)


def shielded(path: Sequence[Message], first: int, last: int, config: CompressConfig) -> list[bool]:
    """`protected_tokens` of messages [first, last) alone."""
    prefix = prefix_length(path, config.num_sink_tokens) - sum(len(message.token_ids) for message in path[:first])
    kept = config.protect == "template"
    return [index < prefix or (kept and unspoken) for index, unspoken in enumerate(template_tokens(path[first:last]))]


def _spoken_last(path: Sequence[Message]) -> tuple[int, ...]:
    """The last TOLD tokens of a path that are someone's words; what is far back is not looked at."""
    found: list[int] = []
    for message in reversed(path):
        flags = zip(message.token_ids, template_tokens([message]), strict=True)
        found = [token for token, unspoken in flags if not unspoken] + found
        if len(found) >= TOLD:
            break
    return tuple(found[-TOLD:])


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
