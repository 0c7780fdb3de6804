"""KVzip+ (KVzap, arXiv 2601.07891): KVzip, each probability times what the value adds, over the row's own state.

A probability counts as much as the value's norm behind W_o is large beside the state that enters attention there.

Letters: H KV heads, G query heads per KV head, R rows of a pass, M tokens of the chunk, D head_dim.
"""

from __future__ import annotations

from torch import Tensor

from kvchat.compress.aggregate import largest
from kvchat.compress.scorers.kvzip import KVzip
from kvchat.compress.scorers.values import output_norms


class KVzipPlus(KVzip):
    """Scores from 0 up, in float32 throughout."""

    _norms: Tensor

    def enter(self, layer: int, states: Tensor) -> None:
        """Take the norms of the states (R, n) of the running pass, before `observe` of the same layer."""
        self._norms = states.float().norm(dim=-1).clamp_min(1e-12)

    def observe(self, layer: int, query: Tensor, keys: Tensor, values: Tensor, scale: float) -> None:
        """Take the chunk's scores from one layer of the running pass."""
        assert self.subject.network is not None
        prefix, chunk = self.subject.prefix_keys[layer], keys[:, self._chunk]
        own = keys[:, keys.shape[1] - query.shape[1] :]
        adds = output_norms(values[:, self._chunk], self.subject.network.output_weight(layer), 2)
        share = self._share(layer) if self.subject.aggregate else adds[:, 0]
        joined = self._joined(
            *(self.subject.aggregate or largest, query, (prefix, chunk, own), scale, share),
            *(adds[:, :, None], self._norms[:, None]),
        )
        self._scores[layer].append(joined)
