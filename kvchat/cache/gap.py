"""Positions that are left free in the open tail, where what a question brought back stands."""

from __future__ import annotations

from typing import NamedTuple


class Gap(NamedTuple):
    """Positions that are left free in the tail before a place, where other tokens stand."""

    place: int
    length: int

    def after(self, place: int) -> int:
        """By how much the position of the token at a place is larger because of it."""
        return self.length if place >= self.place else 0


NO_GAP = Gap(0, 0)
