"""The cells of a conversation's map: its segments, and tokens of which there is none, from its figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Cell:
    """A segment, or tokens of which there is none.

    start, end   its tokens
    first, last  its turns
    tier         memory, part, disk or text, as figures have it, or tail: exact in memory, not sealed yet
    held         part of its KV that is in memory, 0 to 1
    stored       part that is in the store
    position     where the network sees it now, None if it does not
    episode      number of the episode that most of its turns are of, None if that is not known
    host         part whose frames are in host memory, from where it comes back without the disk
    """

    start: int
    end: int
    first: int
    last: int
    tier: str
    held: float
    stored: float
    position: int | None
    recalled: bool
    nbytes: int = 0
    disk: int = 0
    episode: int | None = None
    host: float = 0.0

    @property
    def kind(self) -> str:
        """Its key in `segment_map.GLYPHS`."""
        if self.tier == "disk" and self.host >= 0.5:
            return "host"
        if self.tier != "part":
            return {"memory": "whole"}.get(self.tier, self.tier)
        return "most" if self.held >= 0.5 else "least"

    @property
    def turns(self) -> str:
        """Their numbers."""
        return str(self.first) if self.first == self.last else f"{self.first}-{self.last}"


def cells(stats: Mapping[str, Any], episodes: Sequence[Mapping[str, Any]] = ()) -> list[Cell]:
    """All tokens of a conversation, from its figures and episodes, in their order."""
    about = {turn: number for number, episode in enumerate(episodes) for turn in episode["turns"]}
    hosted, total = stats.get("in_host") or {}, stats["num_tokens"]
    found = [_cell(segment, about, hosted.get(segment["id"], 0)) for segment in stats["segments"]]
    seen, newest = stats.get("num_seen", 0), max(1, stats["num_turns"])
    end = found[-1].end if found else 0
    if seen > end:
        first = min(newest, found[-1].last + 1) if found else 1
        about_it = _most(about, first, newest)
        found.append(Cell(end, seen, first, newest, "tail", 1.0, 0.0, end - stats["offset"], False, episode=about_it))
    end = max(end, seen)
    if total > end:
        found.append(Cell(end, total, newest, newest, "text", 0.0, 0.0, None, False))
    return found


def _cell(segment: Mapping[str, Any], about: Mapping[int, int], hosted: int) -> Cell:
    (first, last), there = segment["turns"], segment["tier"] in ("memory", "part")
    tier = "tail" if segment["kind"] == "open" and there else segment["tier"]
    total = segment.get("rows_total", 0)
    held = 1.0 if segment["tier"] == "memory" else segment["rows"] / total if total else 0.0
    whole = segment["stored_chunks"] / max(1, segment["num_chunks"])
    return Cell(
        segment["start"],
        segment["end"],
        first,
        last,
        tier,
        held,
        segment["rows_stored"] / total if total else whole,
        segment["position"],
        segment["recalled"],
        segment.get("bytes_in_memory", 0),
        segment["bytes_on_disk"],
        _most(about, first, last),
        min(1.0, hosted / max(1, segment["num_chunks"])),
    )


def _most(about: Mapping[int, int], first: int, last: int) -> int | None:
    """The episode of most of these turns; the earliest of several."""
    found = [about[turn] for turn in range(first, last + 1) if turn in about]
    return max(dict.fromkeys(found), key=found.count) if found else None
