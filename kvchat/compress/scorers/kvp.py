"""KVP (arXiv 2602.10238): a policy for each KV head, fitted to what later turns of conversations read (`kvchat fit`).

The fit scales a head's scores to the log of the attention that a later token pays, so that heads compare.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvchat.compress.policies import Policies
from kvchat.compress.scorers.base import Alone


class KVP(Alone):
    """Scores by the weights in the subject's `learned`. Raises InputError if they are not those of policies."""

    def scores(self) -> Tensor:
        """(L, H, T) float32: attention that a later token pays."""
        subject = self.subject
        assert subject.learned is not None and subject.network is not None
        policies, rows = Policies(subject.learned), zip(subject.keys, subject.values, strict=True)
        rotate, start = subject.network.rotate, subject.start
        scores = [policies(layer, keys, values, start, rotate) for layer, (keys, values) in enumerate(rows)]
        return torch.stack(scores).nan_to_num().clamp(-80, 80).exp()
