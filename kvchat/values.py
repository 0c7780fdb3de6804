"""Values of settings as people write and read them, and as a file or a session keeps them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, get_args

from pydantic import ByteSize

from kvchat.config import Config
from kvchat.errors import ConfigError

UNITS = (("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10))


def annotation(key: str) -> Any:
    """The type of a setting; None if there is none of that name."""
    section, _, name = key.partition(".")
    table = Config.model_fields.get(section)
    fields = getattr(table.annotation, "model_fields", {}) if table else {}
    return fields[name].annotation if name in fields else None


def value_of(config: Config, key: str) -> Any:
    """The value of the setting `key`, as in compress.keep_ratio. ConfigError names those that exist."""
    if annotation(key) is None:
        config.replaced({key: ""})  # says which are known
        raise ConfigError(f"there is no setting {key!r}")
    section, _, name = key.partition(".")
    return getattr(getattr(config, section), name)


def as_text(value: Any) -> str:
    """A value as it can be typed again: 256MiB, true, k8v8, eb5, map=f3 stop=f9; nothing for none."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, ByteSize):
        fits = ((unit, bits) for unit, bits in UNITS if value and value % (1 << bits) == 0)
        unit, bits = next(fits, ("", 0))
        return f"{value >> bits}{unit}"
    if isinstance(value, Mapping):
        return " ".join(f"{name}={one}" for name, one in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def from_text(key: str, text: str) -> Any:
    """What somebody typed for `key`, not checked yet: text, None, a list or a table."""
    kind, text = annotation(key), text.strip()
    kinds = (kind, *get_args(kind))
    if not text and type(None) in kinds:
        return None
    if dict in (getattr(one, "__origin__", None) for one in kinds):
        return {name: value for name, _, value in (word.partition("=") for word in text.split())}
    if tuple in (getattr(one, "__origin__", None) for one in kinds) and (text[:1] == "[" or "," in text):
        return _listed(key, text)
    return text


def _listed(key: str, text: str) -> list[Any]:
    if not text.startswith("["):
        return [part.strip() for part in text.split(",") if part.strip()]
    try:
        values = json.loads(text)
    except ValueError:
        raise ConfigError(f"setting {key}: {text!r} is not a list, as in 0.5, 1.0") from None
    return list(values)


def kept(config: Config, key: str, given: Any) -> Any:
    """What `config` made of the value `given` for `key`, as a file or a session keeps it; sizes stay as written."""
    value = value_of(config, key)
    if isinstance(value, ByteSize):
        text = str(given).strip()
        return int(value) if text.isdecimal() else text
    return list(value) if isinstance(value, tuple) else value
