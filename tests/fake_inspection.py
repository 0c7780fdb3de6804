"""A turn to look at: which tokens are kept follows from where they stand, so that it is the same every time."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

from kvchat.inspecting import Bin, Inspection, Token

SAID = (
    ("user", "What did we decide about the dogs [b]park[/b] near the river, and who was there?"),
    (
        "assistant",
        "You decided to go on **Saturday** at ten.\n\nAnna and Tom were there: Tom brings the old ball, and Anna the "
        "leash that she bought in Lisbon last summer. If it rains, you meet at the museum instead.",
    ),
)


def token(
    text: str, role: str = "user", kept: float = 1.0, score: float | None = 1.0, protected: bool = False
) -> Token:
    return Token(text, role, kept, score, protected)


def inspection(turn: int, **more: Any) -> Inspection:
    """Of 30 layers and 3 heads."""
    words = [(role, word) for role, text in SAID for word in re.findall(r"\S+\s*", text)]
    scores = [(37 * place % 101) / 100 for place in range(len(words))]
    tokens = [
        token(word, role, max(0.0, 1.4 * score - 0.4), score, place < 4)
        for place, ((role, word), score) in enumerate(zip(words, scores, strict=True))
    ]
    heat = [[0.35 + 0.3 * math.sin(layer / 4 + head) - 0.01 * layer for head in range(3)] for layer in range(30)]
    given: dict[str, Any] = {
        "turn": turn,
        "tokens": tuple(tokens),
        "pairs": 3953,
        "kept": 1204,
        "heat": tuple(tuple(min(1.0, max(0.0, share)) for share in layer) for layer in heat),
        "tier": "part",
        "codec": "k8v4",
        "scorer": "snapkv",
        "bytes_in_memory": 18_000_000,
        "bytes_on_disk": 4_100_000,
        "histogram": tuple(_bins()),
        "protected": 4,
    }
    return Inspection(**(given | more))


def _bins() -> Iterator[Bin]:
    """Twenty; at the cut some heads keep what others do not."""
    for number in range(20):
        pairs = int(400 * math.exp(-(((number - 6) / 5) ** 2)) + 40 * math.exp(-(((number - 16) / 2) ** 2)))
        share = min(1.0, max(0.0, (number - 8) / 3))
        ends = number / 20, (number + 1) / 20
        yield from (Bin(*ends, int(part * pairs), kept) for part, kept in ((1 - share, False), (share, True)))
