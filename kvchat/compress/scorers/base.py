"""The contract of scorers, what they are told about the segment, and what those that need no pass share.

Letters: L layers, H KV heads, G query heads per KV head, T tokens of the segment, P tokens of the prefix, D head_dim, n
width of the network's states.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from kvchat.compress.aggregate import Aggregator


class Network(Protocol):
    """What a scorer may ask of the network beside its passes: see `kvchat.anatomy`."""

    def output_weight(self, layer: int) -> Tensor:
        """W_o of each query head, (H * G, D, n)."""

    def rotate(self, states: Tensor, positions: Tensor) -> Tensor:
        """RoPE of (H, q, D) states by (q,) positions, float32; negative ones turn back."""


@dataclass(frozen=True, slots=True)
class Subject:
    """A segment about to be sealed: the first T tokens of the open tail."""

    token_ids: tuple[int, ...]
    """T ids."""
    template: tuple[bool, ...]
    """T flags: tokens that nobody said, of the template and the system prompt."""
    protected: tuple[bool, ...]
    """T flags: tokens that are never evicted."""
    before: tuple[int, ...]
    """The last ids before the segment that are no template tokens, at most 8; empty for the first segment."""
    prefix_keys: Sequence[Tensor]
    """Keys of the protected beginning of the conversation, (H, P, D) a layer; P is 0 for the first segment."""
    encode: Callable[[str], tuple[int, ...]]
    """Text to ids, as inside a message."""
    ask: Callable[[tuple[int, ...]], tuple[int, ...]]
    """Ids of a user's message to the whole message with its template tokens and the opening of the reply."""
    start: int = 0
    """Position of the first token."""
    keys: Sequence[Tensor] = ()
    """The segment's exact keys, (H, T, D) a layer, with their RoPE."""
    values: Sequence[Tensor] = ()
    """Its exact values, as the keys."""
    aggregate: Aggregator | None = None
    """How a scorer that observes attention joins what it sees; None: its own way."""
    network: Network | None = None
    """The network's parts."""
    learned: Mapping[str, Tensor] | None = None
    """Weights that `kvchat fit` made for this scorer and model."""
    marks: Tensor | None = None
    """What the gate said of each pair while its token was computed, (L, H, T), NaN where it did not look."""


Pass = tuple[int, ...] | range
"""Token ids to run behind the segment, or tokens of the segment to run once more where they stand."""


class Scorer(Protocol):
    """Scores one segment, once. With a method `enter` it also sees what enters attention: `kvchat.cache.ragged`."""

    def passes(self) -> Iterable[Pass]:
        """What to run on a scratch tail, one pass after the other."""

    def observe(self, layer: int, query: Tensor, keys: Tensor, values: Tensor, scale: float) -> None:
        """The tap of those passes: see `kvchat.cache.ragged.Tap`."""

    def scores(self) -> Tensor:
        """(L, H, T) float32, higher = keep; infinite: before all that are not."""


class Newest:
    """What scorers share that look at what a segment's last tokens attend to, and keep these before all others.

    Args:
        tokens: so many of the last.
    """

    def __init__(self, subject: Subject, tokens: int) -> None:
        self.subject = subject
        self._tokens = tokens
        self._scores: list[Tensor] = []

    def passes(self) -> Iterator[Pass]:
        """The last tokens, once."""
        if self._tokens:
            end = len(self.subject.token_ids)
            yield range(end - self._tokens, end)

    def _add(self, scores: Tensor) -> None:
        """Take one layer's scores (H, T - tokens)."""
        self._scores.append(torch.nn.functional.pad(scores, (0, self._tokens), value=torch.inf))

    def scores(self) -> Tensor:
        """(L, H, T) float32, infinite for the last tokens; of a segment too short for any the newest come first."""
        if self._scores:
            return torch.stack(self._scores)
        keys = self.subject.keys
        newest = torch.arange(len(self.subject.token_ids), dtype=torch.float32, device=keys[0].device)
        return newest.expand(len(keys), len(keys[0]), -1).clone()


class Alone:
    """A scorer that looks at the segment's own keys and values alone: no pass, hardly any time.

    Nothing says that scores of two heads compare; `compress.allocate` need not compare them.
    """

    def __init__(self, subject: Subject, chunk_size: int) -> None:
        self.subject = subject

    def passes(self) -> Iterator[Pass]:
        """None."""
        return iter(())

    def observe(self, layer: int, query: Tensor, keys: Tensor, values: Tensor, scale: float) -> None:
        """Never called."""
