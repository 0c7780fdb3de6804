"""What `Session.stats` gives, as words: for the plain terminal and the screen alike."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

MOST_RANGES = 4
"""Runs of turns that are named; more are only counted."""


def format_stats(stats: Mapping[str, Any]) -> str:
    """All of it, or the part of it that the store knows, as a few lines."""
    disk, held = f"{size(stats['bytes_on_disk'])} on disk ({part(stats['stored'])})", "num_kept" in stats
    lines = [f"{stats['name']}: {stats['model']}"]
    if held:
        lines += [
            f"{stats['num_turns']} turns, {tokens(stats)}",
            f"{stats['num_kept']} of {stats['num_pairs']} KV pairs held (keep_ratio {stats['keep_ratio']:.2f}"
            f"{budget(stats)}), {size(stats['bytes_in_memory'])} in memory, {disk}",
        ]
    else:
        lines.append(f"{stats['num_turns']} turns, {stats['num_tokens']} tokens, {disk}")
    lines.append(format_room(**stats["store"]))
    if "bandwidths" in stats:
        from kvchat.bandwidths import told  # which the screen's first paint need not wait for

        lines.append(told(stats["bandwidths"]))
    lines += _segments(stats["segments"]) if held else [_segment(segment, held) for segment in stats["segments"]]
    return "\n".join(lines)


def summary(stats: Mapping[str, Any]) -> list[str]:
    """The whole in two lines."""
    disk = f"{size(stats['bytes_on_disk'])} on disk ({part(stats['stored'])})"
    if "num_kept" not in stats:
        return [f"{stats['model']} · {stats['num_turns']} turns · {stats['num_tokens']} tokens", disk]
    held = f"{stats['num_kept']} of {stats['num_pairs']} KV pairs held (keep_ratio {stats['keep_ratio']:.2f}"
    return [
        f"{stats['model']} · {stats['num_turns']} turns · {tokens(stats)}",
        f"{held}{budget(stats)}) · {size(stats['bytes_in_memory'])} in memory · {disk}",
    ]


def tokens(stats: Mapping[str, Any]) -> str:
    """How much of the window is used, and how long the conversation is."""
    if not stats["rebased"]:
        return f"{stats['num_seen']} of {stats['context_window']} tokens"
    window = f"{stats['position']} of {stats['context_window']} tokens in the window"
    return f"{window}, {stats['num_tokens']} in all (re-based)"


def meter(total: int, offset: int, window: int) -> str:
    """The same, short: of a conversation of so many tokens whose positions are `offset` smaller."""
    if not offset:
        return f"{total} / {window} tokens"
    return f"{total - offset} / {window} in the window, {count(total)} in all"


def budget(stats: Mapping[str, Any]) -> str:
    """The limit of memory, if there is one."""
    return f", kv_budget {stats['kv_budget']}" if stats["kv_budget"] else ""


def recalled(starts: Sequence[int], segments: Sequence[Mapping[str, Any]] = ()) -> str:
    """What came back for an answer: segments by where they begin, or their turns if it is known which; or nothing."""
    if not starts:
        return ""
    turns = [segment["turns"] for segment in segments if segment["start"] in starts]
    runs = [*_runs(turns)]
    number = sum(last - first + 1 for first, last in runs)
    if not runs:
        return f"recalled {len(starts)} segment{'s' * (len(starts) != 1)}"
    named = [str(first) if first == last else f"{first}-{last}" for first, last in runs]
    if len(runs) > MOST_RANGES:
        return f"recalled {number} turns"
    return f"recalled turn{'s' * (number != 1)} {', '.join(named)}"


def _runs(turns: Sequence[Sequence[int]]) -> Iterator[tuple[int, int]]:
    """First and last turns, joined where they touch."""
    low = high = 0
    for first, last in sorted((first, last) for first, last in turns):
        if high and first <= high + 1:
            high = max(high, last)
            continue
        if high:
            yield low, high
        low, high = first, last
    if high:
        yield low, high


def count(number: int) -> str:
    """231k and the like; whole below ten thousand."""
    if number < 10_000:
        return str(number)
    return f"{number / 1e3:.0f}k" if number < 999_500 else f"{number / 1e6:.1f}M"


def _segments(segments: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """A line each; several one after the other of which nothing is in memory are one."""
    for tier, group in groupby(segments, key=lambda one: one["tier"]):
        run = list(group)
        if tier not in ("disk", "text") or len(run) < 3:
            yield from (_segment(segment, True) for segment in run)
            continue
        where, disk = "on disk" if tier == "disk" else "text only", sum(segment["bytes_on_disk"] for segment in run)
        span = f"turns {run[0]['turns'][0]}-{run[-1]['turns'][1]}: tokens {run[0]['start']}-{run[-1]['end']}"
        yield f"  {len(run)} segments {where}, {span}, {size(disk)}"


def _segment(segment: Mapping[str, Any], held: bool) -> str:
    first, last = segment["turns"]
    turns = f"turn {first}" if first == last else f"turns {first}-{last}"
    parts = [f"  {segment['kind']:6} {turns}: tokens {segment['start']}-{segment['end']}"]
    parts += [f"{segment['rows']}/{segment['rows_total']} rows"] if held else []
    parts += [segment["codec"]] if segment["codec"] else []
    parts.append(size(segment["bytes_on_disk"]))
    position = segment["position"]
    parts += [f"at {position}"] if position not in (None, segment["start"]) else []
    parts += ["recalled"] if segment["recalled"] else []
    return ", ".join(parts)


def part(stored: float) -> str:
    """How much of a session's KV is saved."""
    return "text only" if stored < 0.005 else "all" if stored > 0.995 else f"{stored:.2f}"


def format_room(bytes_in_use: int, disk_budget: int, bytes_free: int, min_free: int) -> str:
    """What all sessions take of the disk, and may take."""
    budget = f" of {size(disk_budget)} (store.disk_budget)" if disk_budget else ""
    floor = f", of which {size(min_free)} stay free (store.min_free)" if min_free else ""
    return f"{size(bytes_in_use)} in use{budget}, {size(bytes_free)} free on the disk{floor}"


def size(num_bytes: float) -> str:
    """12.3 MB and the like."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000 or unit == "GB":
            break
        num_bytes /= 1000
    return f"{num_bytes:.0f} B" if unit == "B" else f"{num_bytes:.1f} {unit}"
