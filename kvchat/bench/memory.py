"""Memory: what the held part of the history takes against all of it, and what a process grows by when it resumes."""

from __future__ import annotations

from typing import Any

from kvchat.bench.history import RATIOS, Subject, in_new_process


def memory(subject: Subject) -> dict[str, Any]:
    """Bytes of KV in memory at several ratios, and of a process that resumes with the settings' own."""
    conversation, held = subject.conversation, {}
    for keep_ratio in RATIOS:
        with subject.keeping(keep_ratio):
            held[keep_ratio] = conversation.stats()["bytes_in_memory"]
    dense = conversation.stats()["bytes_dense"]
    grown = in_new_process({"kind": "memory", "config": subject.config.model_dump(mode="json")})
    peak, restored = grown["peak_growth_bytes"], grown["restored_bytes"]
    return {
        "history_tokens": conversation.num_tokens,
        "dense_bytes": dense,
        **{f"keep_{keep_ratio}_bytes": nbytes for keep_ratio, nbytes in held.items()},
        **{f"keep_{keep_ratio}_over_dense": round(nbytes / dense, 3) for keep_ratio, nbytes in held.items()},
        "resume_keep_ratio": subject.config.compress.keep_ratio,
        **{f"resume_{name}": value for name, value in grown.items()},
        "resume_peak_over_restored": round(peak / restored, 3) if peak is not None else None,
    }
