"""What a re-base costs: the same replies, foretold by a session whose window is too small and by one whose is not."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from kvchat.config import Config
from kvchat.engine import Engine
from kvchat.errors import InputError
from kvchat.evals.cases import Case, Turn
from kvchat.evals.feeding import fed, new_conversation
from kvchat.evals.steady import rows
from kvchat.residence.residence import Residence


@dataclass(frozen=True, slots=True)
class Foretold:
    """A reply before it was fed.

    Attributes:
        turn, history: which, from 1, and the tokens before it.
        rows: a head on average in memory.
        offset: by how much positions are smaller than places.
        tokens, logprob: of the reply, and the natural log-probability of all of it.
    """

    turn: int
    history: int
    rows: float
    offset: int
    tokens: int
    logprob: float


@dataclass(frozen=True, slots=True)
class Cost:
    """What foretells the same replies less well.

    Attributes:
        when: which replies.
        rebases: that came before the last of them.
        replies, tokens: how many.
        before, after: perplexity without and with re-bases.
        rise: of the second over the first; 0.01 is 1%.
        error: the standard error of the rise, over replies.
        rows, rows_rebased: a head in memory, on average, of the one and the other.
    """

    when: str
    rebases: int
    replies: int
    tokens: int
    before: float
    after: float
    rise: float
    error: float
    rows: float
    rows_rebased: float


def costs(engine: Engine, config: Config, case: Case, window: int) -> list[Cost]:
    """Feed the case twice, with the model's window and as if it had only `window` positions.

    Rows: replies before the first re-base, those right after one, and all after the first.

    Raises:
        InputError: the smaller window is no smaller, or the case does not fill it.
    """
    own = engine.model.context_window
    if not 0 < window < own:
        raise InputError(f"--window must be below the model's own, which is {own}, got {window}")
    small = Engine(replace(engine.model, context_window=window), engine.chunk_size)
    plain, rebased = ([*_foretold(one, config, case)] for one in (engine, small))
    pairs = [pair for pair in zip(plain, rebased, strict=True) if not pair[0].offset]  # as long as it has not been
    moved = [bool(two.offset) for _, two in pairs]
    first = [
        two.offset > before for (_, two), before in zip(pairs, [0, *(two.offset for _, two in pairs)], strict=False)
    ]
    if not any(moved):
        raise InputError(f"{case.name} does not fill a window of {window} tokens; give a longer conversation")
    chosen = {"before": [not one for one in moved], "right after one": first, "all after": moved}
    of_each = {when: [pair for pair, one in zip(pairs, some, strict=True) if one] for when, some in chosen.items()}
    return [_cost(when, some) for when, some in of_each.items() if some]


def _foretold(engine: Engine, config: Config, case: Case) -> Iterator[Foretold]:
    """Every reply with a user's message before it, foretold, then fed."""
    with new_conversation(engine, config, Residence) as conversation:
        for number in fed(conversation, case, range(1, len(case.turns)), lambda _: None):
            if (asked := _pair(case.turns[number])) is None:
                continue
            residence = conversation.residence
            held, history = rows(residence), conversation.num_tokens
            values = [value for _, value in conversation.logprobs(*asked)]
            yield Foretold(number + 1, history, held, residence.cache.offset, len(values), sum(values))


def _pair(turn: Turn) -> tuple[str, str] | None:
    """What was asked and answered, of a turn of two messages."""
    roles = [message["role"] for message in turn]
    return (turn[0]["content"], turn[1]["content"]) if roles == ["user", "assistant"] else None


def _cost(when: str, pairs: Sequence[tuple[Foretold, Foretold]]) -> Cost:
    tokens = sum(one.tokens for one, _ in pairs)
    lost = [one.logprob - two.logprob for one, two in pairs]
    nats = sum(lost) / tokens
    spread = (
        math.sqrt(sum((loss - nats * one.tokens) ** 2 for loss, (one, _) in zip(lost, pairs, strict=True))) / tokens
    )
    offsets = [0, *(two.offset for _, two in pairs)]
    return Cost(
        when=when,
        rebases=len({offset for offset in offsets if offset}),
        replies=len(pairs),
        tokens=tokens,
        before=round(math.exp(-sum(one.logprob for one, _ in pairs) / tokens), 4),
        after=round(math.exp(-sum(two.logprob for _, two in pairs) / tokens), 4),
        rise=round(math.expm1(nats), 5),
        error=round(spread * math.exp(nats), 5),
        rows=round(sum(one.rows for one, _ in pairs) / len(pairs), 1),
        rows_rebased=round(sum(two.rows for _, two in pairs) / len(pairs), 1),
    )
