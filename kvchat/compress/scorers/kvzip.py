"""KVzip (arXiv 2505.23416): a pair matters as much as the model attends to it while it repeats the text.

The segment is repeated in chunks, teacher-forced, after a user's message that asks for it. The hidden states of the
pass see the whole cache; only the score's softmax is confined to the prefix, the chunk and the pass's own tokens. A
pair's score is its largest probability over the queries of its group and all rows of the pass, but for rows of
template tokens. Asked to join them otherwise (`compress.aggregate`), it makes the probabilities of all rows.

Letters: H KV heads, G query heads per KV head, R rows of a pass, M tokens of the chunk, P tokens of the prefix, D
head_dim.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kvchat.attention import has_kernels, log_normaliser
from kvchat.compress.aggregate import Aggregator
from kvchat.compress.scorers.base import Pass, Subject
from kvchat.compress.scorers.values import value_share

FIRST = "Repeat the conversation above, word for word."
LATER = "Repeat, word for word, the part of the conversation above that begins with: "


class KVzip:
    """Scores in [0, 1], in float32 throughout."""

    def __init__(self, subject: Subject, chunk_size: int) -> None:
        self.subject = subject
        self.chunk_size = chunk_size
        self._scores: list[list[Tensor]] = [[] for _ in subject.prefix_keys]
        self._chunk = slice(0, 0)
        self._skipped = torch.empty(0, dtype=torch.int64)

    def passes(self) -> Iterator[Pass]:
        """One request to repeat, with the repetition, per chunk."""
        ids = self.subject.token_ids
        size = even_size(len(ids), self.chunk_size)
        for start in range(0, len(ids), size):
            self._chunk = slice(start, min(start + size, len(ids)))
            spoken = [token for token, other in zip(ids[:start], self.subject.template, strict=False) if not other]
            before = tuple(spoken[-8:]) or self.subject.before
            request = self.subject.ask(self.subject.encode(LATER if before else FIRST) + before)
            flags = self.subject.template[self._chunk]
            rows = [len(request) + i for i, unspoken in enumerate(flags) if unspoken]
            # On the device once a pass, so that no layer waits for a copy.
            self._skipped = torch.tensor(rows, dtype=torch.int64, device=self.subject.prefix_keys[0].device)
            yield request + ids[self._chunk]

    def observe(self, layer: int, query: Tensor, keys: Tensor, values: Tensor, scale: float) -> None:
        """Take the chunk's scores from one layer of the running pass."""
        prefix, chunk = self.subject.prefix_keys[layer], keys[:, self._chunk]
        own = keys[:, keys.shape[1] - query.shape[1] :]
        if self.subject.aggregate is None:
            scores = attention_received(query, prefix, chunk, own, self._skipped, scale)
        else:
            scores = self._joined(self.subject.aggregate, query, (prefix, chunk, own), scale, self._share(layer))
        self._scores[layer].append(scores)

    def _joined(
        self,
        aggregate: Aggregator,
        query: Tensor,
        keys: tuple[Tensor, Tensor, Tensor],
        scale: float,
        share: Tensor,
        adds: Tensor | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:
        """What an aggregator makes of the rows that count, (H, M), one head after the other.

        Args:
            keys: of prefix, chunk and pass.
            share: of the chunk's values, (H, M).
            adds, rows: what probabilities are multiplied with, (H, G, 1, M), and divided by, (R, 1).
        """
        counted = torch.ones(query.shape[1], dtype=torch.bool, device=query.device)
        counted[self._skipped] = False
        scores = []
        for head, group in enumerate(query.chunk(len(share))):
            prefix, chunk, own = (part[head, None] for part in keys)
            weights = reconstruction_attention(group, prefix, chunk, own, scale)
            if adds is not None and rows is not None:
                weights = weights * adds[head, None] / rows
            scores.append(aggregate(weights[:, :, counted], share[head, None]))
        return torch.cat(scores)

    def _share(self, layer: int) -> Tensor:
        """Each head's part of what the chunk's values can add to the states, (H, M)."""
        assert self.subject.network is not None
        values = self.subject.values[layer][:, self._chunk]
        return value_share(values, self.subject.network.output_weight(layer))

    def scores(self) -> Tensor:
        """(L, H, T) float32; zero where logits overflow, of numbers near the dtype's largest."""
        return torch.stack([torch.cat(parts, dim=1) for parts in self._scores]).nan_to_num(0.0, 0.0, 0.0)


def even_size(tokens: int, chunk_size: int) -> int:
    """Tokens of a chunk, if all are to be of about `chunk_size` or up to a quarter more, and of one length.

    A chunk of a few tokens would cost nearly as much as a full one: all that is sealed is read for it.
    """
    return max(1, -(-tokens // max(1, -(-tokens * 4 // (chunk_size * 5)))))


def attention_received(
    query: Tensor, prefix: Tensor, chunk: Tensor, own: Tensor, skipped: list[int] | Tensor, scale: float
) -> Tensor:
    """Largest attention probability that each key of the chunk receives, (H, M) float32.

    The maximum is taken before exponentiation: in tiles where kernels can run, else head by head, so the (R, M)
    probabilities of all heads never exist.

    Args:
        query: (H * G, R, D); prefix: (H, P, D); chunk: (H, M, D); own: (H, R, D), seen causally.
        skipped: indices of rows that do not count.
        scale: factor on the logits.
    """
    if has_kernels(query.device, query.dtype):
        from kvchat.attention import received  # needs Triton

        return received.attention_received(query, prefix, chunk, own, skipped, scale)
    heads, rows = chunk.shape[0], query.shape[1]
    lse = log_normaliser(query, torch.cat([prefix, chunk], dim=1), own, scale).reshape(heads, -1, rows)
    lse[:, :, skipped] = torch.inf
    grouped = query.view(heads, -1, rows, query.shape[-1])
    best = [
        torch.addmm(-lse[h].reshape(-1, 1), grouped[h].flatten(0, 1).float(), chunk[h].float().T, alpha=scale).amax(0)
        for h in range(heads)
    ]
    return torch.stack(best).exp()


def attention_received_plainly(
    query: Tensor, prefix: Tensor, chunk: Tensor, own: Tensor, skipped: list[int] | Tensor, scale: float
) -> Tensor:
    """The definition of `attention_received`: one softmax over prefix, chunk and own keys."""
    weights = reconstruction_attention(query, prefix, chunk, own, scale)
    counted = torch.ones(query.shape[1], dtype=torch.bool, device=query.device)
    counted[skipped] = False
    return weights[:, :, counted].amax((1, 2))


def reconstruction_attention(query: Tensor, prefix: Tensor, chunk: Tensor, own: Tensor, scale: float) -> Tensor:
    """Probabilities (H, G, R, M) float32 that all rows pay to the chunk's keys; arguments as `attention_received`."""
    groups, rows, past = query.shape[0] // chunk.shape[0], query.shape[1], prefix.shape[1] + chunk.shape[1]
    keys = torch.cat([prefix, chunk, own], dim=1).repeat_interleave(groups, 0).float()
    logits = query.float() @ keys.mT * scale
    hidden = torch.ones(rows, rows, dtype=torch.bool, device=query.device).triu(1)
    logits[:, :, past:] = logits[:, :, past:].masked_fill(hidden, -torch.inf)
    weights = logits.softmax(-1)[:, :, prefix.shape[1] : past]
    return weights.view(len(chunk), groups, rows, -1)
