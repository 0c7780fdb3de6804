"""What tells one model's KV from another's: digests by name. Equal fingerprints: saved KV may be used again."""

from __future__ import annotations

import hashlib
import json
from typing import Any

TEXT_FIELDS = ("tokenizer", "template")
"""Fields on which stored token ids depend; if only others differ, KV is rebuilt from the same ids."""


def fingerprint_id(fingerprint: dict[str, str]) -> str:
    """One hash of a whole fingerprint."""
    return digest(fingerprint)


def fingerprint_difference(old: dict[str, str], new: dict[str, str]) -> list[str]:
    """The fields in which two fingerprints differ, sorted."""
    return sorted(field for field in old.keys() | new.keys() if old.get(field) != new.get(field))


def digest(value: Any) -> str:
    """16 hexadecimal digits that stand for a JSON value."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
