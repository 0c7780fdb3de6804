"""How much work a turn more is: tokens of forward passes, by any method."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from kvchat.config import Config
from kvchat.engine import Engine
from kvchat.evals.cases import Case
from kvchat.evals.feeding import Make, fed, new_conversation, ready


@dataclass(slots=True)
class Work:
    """Tokens that have passed through the network, prefilled, decoded, or to score."""

    tokens: int = 0


@dataclass(frozen=True, slots=True)
class Added:
    """What a turn more costs behind a history of `turns` turns and `history` tokens.

    Attributes:
        tokens: of forward passes, of all turns since the last of these the mean.
        ready: those after it until a question can be asked.
    """

    turns: int
    history: int
    tokens: float
    ready: int

    @property
    def all(self) -> float:
        """For a turn and to be ready for the next question."""
        return self.tokens + self.ready


@contextmanager
def counting(engine: Engine) -> Iterator[Work]:
    """Inside, forward passes are counted, but for those of captured steps."""
    work = Work()

    def count(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        ids = given[0] if given else named["input_ids"]
        work.tokens += int(ids.shape[-1])

    hook = engine.model.network.base_model.register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield work
    finally:
        hook.remove()


def added(engine: Engine, config: Config, make: Make, case: Case, probes: Sequence[int]) -> list[Added]:
    """What turns cost that are fed one at a time, up to each of these numbers of turns."""
    found, before = list[Added](), (0, 0)
    with counting(engine) as work, new_conversation(engine, config, make) as conversation:
        for turns in fed(conversation, case, range(1, max(probes) + 1), lambda _: None):
            if turns not in probes:
                continue
            tokens = (work.tokens - before[0]) / (turns - before[1])
            begun = work.tokens
            with ready(conversation, "What did we talk about?"):
                found.append(Added(turns, conversation.num_tokens, tokens, work.tokens - begun))
            before = work.tokens, turns
    return found
