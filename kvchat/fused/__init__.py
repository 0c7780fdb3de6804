"""One kernel where a network's modules launch many: for the decode step, where a launch costs more than its arithmetic.

`prove` finds the modules for which a kernel may stand, and `fused` lets it while a step is captured.
"""

from __future__ import annotations

from kvchat.fused.modules import Forward, fused
from kvchat.fused.proof import prove

__all__ = ["Forward", "fused", "prove"]
