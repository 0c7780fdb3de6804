"""How sealed KV is written down: frames (no torch), codecs, and segments made of both.

The names below are reached lazily, so that `kvchat.codecs.frame` can be had without loading torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvchat.codecs.coded import coded_frame, decoded
    from kvchat.codecs.encode import decode_frame, encode_segment, packed_bytes, param_bytes
    from kvchat.codecs.header import CODECS, SegmentHeader

_PLACES = {"CODECS": "header", "SegmentHeader": "header", "coded_frame": "coded", "decoded": "coded"}

__all__ = [
    "CODECS",
    "SegmentHeader",
    "coded_frame",
    "decode_frame",
    "decoded",
    "encode_segment",
    "packed_bytes",
    "param_bytes",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module(f"kvchat.codecs.{_PLACES.get(name, 'encode')}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
