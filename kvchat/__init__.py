"""kvchat: long conversations with a local language model, resumed without computing them again.

    with kvchat.open("trip") as chat:
        print(chat.ask("Where did we stay in Rome?").text)

Names are reached lazily: importing the package loads no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {
    "AsyncSession": ("kvchat.asynchronous", "AsyncSession"),
    "Config": ("kvchat.config", "Config"),
    "Session": ("kvchat.handle", "Session"),
    "Worker": ("kvchat.worker", "Worker"),
    "open": ("kvchat.opening", "open_session"),
    "open_async": ("kvchat.opening", "open_async"),
    **{
        name: ("kvchat.errors", name)
        for name in (
            "CapacityError",
            "CodecError",
            "ConfigError",
            "CorruptFrame",
            "FingerprintMismatch",
            "InputError",
            "KVChatError",
            "ModelError",
            "OutOfMemory",
            "SessionExists",
            "SessionNotFound",
            "StoreError",
            "UnknownCodec",
        )
    },
    **{
        name: ("kvchat.events", name)
        for name in ("Delta", "Notice", "Progress", "Reply", "Timings", "TurnDone", "Usage")
    },
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'kvchat' has no attribute {name!r}")
    module, attribute = _HOMES[name]
    return getattr(import_module(module), attribute)


def __dir__() -> list[str]:
    return __all__
