"""Figures of turns and sessions as the chat screen shows them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from kvchat.events import Timings, TurnDone
from kvchat.figures import recalled, tokens


@dataclass
class Speed:
    """How fast an answer comes: pieces of text, which are nearly always tokens, and when."""

    began: float
    """When the turn was sent, as all times here in seconds of one clock."""
    first: float = 0.0
    newest: float = 0.0
    pieces: int = 0

    def count(self, now: float) -> None:
        """A piece came."""
        self.first = self.first if self.pieces else now
        self.newest = now
        self.pieces += 1

    def __str__(self) -> str:
        if not self.pieces:
            return ""
        return _speed(self.pieces - 1, self.newest - self.first, self.first - self.began)


def speed_of(timings: Timings) -> str:
    """The same of a turn that is done, by its tokens."""
    return _speed(len(timings.itl_s), sum(timings.itl_s), timings.ttft_s)


def _speed(tokens: int, seconds: float, ttft: float) -> str:
    first = f"first text {ttft:.1f} s"
    return f"{tokens / seconds:.1f} tokens/s · {first}" if tokens > 0 and seconds > 0 else first


def turn_line(done: TurnDone, stats: dict[str, Any] | Literal["sealing"] | None) -> str:
    """The numbers of one turn: what was reused and computed, then what is held, once its seal has been measured."""
    parts = [f"cached {done.usage.cached_tokens}", f"prefilled {done.usage.prefilled_tokens}"]
    if done.finish_reason != "stop":
        reasons = {"length": "cut at max_new_tokens", "context": "the context window is full"}
        parts.insert(0, reasons.get(done.finish_reason, "stopped"))
    if stats == "sealing":
        parts += [back] if (back := recalled(done.usage.recalled)) else []
        parts.append("sealing…")
    elif stats:
        parts += [back] if (back := recalled(done.usage.recalled, stats["segments"])) else []
        parts += [f"kept {stats['num_kept']}/{stats['num_pairs']} pairs", megabytes(stats["bytes_in_memory"])]
        seal_s = (stats.get("last") or {}).get("seal_s")
        parts += [f"sealed {seal_s:.1f} s"] if seal_s is not None else []
    return " · ".join(parts)


def stats_table(stats: dict[str, Any]) -> str:
    """The numbers of a session, and of its newest 20 turns."""
    lines = [
        f"{stats['name']} · {stats['model']} · {stats['num_turns']} turns",
        tokens(stats) + (f" · kv_budget {stats['kv_budget']}" if stats["kv_budget"] else ""),
        f"kept {stats['num_kept']}/{stats['num_pairs']} pairs · {megabytes(stats['bytes_in_memory'])} in memory · "
        f"{megabytes(stats['bytes_on_disk'])} on disk ({stats['stored']:.2f} of the pairs)",
    ]
    if stats["turns"]:
        lines += ["", f"{'turn':<5} {'tokens':>8} {'pairs':>10} {'memory':>10} {'disk':>10}"]
    for turn in stats["turns"][-20:]:
        memory, disk = megabytes(turn["bytes_in_memory"]), megabytes(turn["bytes_on_disk"])
        lines.append(f"{turn['turn']:<5} {turn['tokens']:>8} {turn['rows']:>10} {memory:>10} {disk:>10}")
    return "\n".join(lines)


def megabytes(count: int) -> str:
    """`count` bytes in MB, with one decimal place below 10."""
    return f"{count / 1e6:.1f} MB" if count < 9.95e6 else f"{count / 1e6:.0f} MB"
