"""The map of a conversation as a page of its own: no scripts, nothing from elsewhere, all text escaped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from kvchat.figures import size, summary
from kvchat.segment_cells import Cell, cells
from kvchat.segment_map import GLYPHS, one_line

STYLE = """\
:root { color-scheme: light dark; --page: #fff; --ink: #1d2125; --muted: #667080; --line: #d8dde3; --disk: #c9d3de;
  --memory: #2f9e62; --text: #d9534f; --tail: #8250df; --mark: #d97706 }
@media (prefers-color-scheme: dark) { :root { --page: #15181c; --ink: #e4e8ec; --muted: #93a0ad; --line: #2e353d;
  --disk: #3c4855; --memory: #3fb978; --text: #e5736f; --tail: #a586f0; --mark: #f0a93b } }
body { margin: 2rem auto; max-width: 72rem; padding: 0 1rem; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif }
h1 { font-size: 1.3rem; margin: 0 } h2 { font-size: 1rem; margin: 2rem 0 .5rem } p { margin: .2rem 0 }
.muted, th { color: var(--muted); font-weight: normal }
.map { display: flex; flex-wrap: wrap; gap: 6px 2px; margin: 1.5rem 0 1rem }
.cell { width: 12px; height: 46px; border-radius: 2px; display: flex; flex-direction: column-reverse; overflow: hidden }
.cell.gone { background: var(--text) }
.cell.recalled { outline: 2px solid var(--mark); outline-offset: 1px }
.cell.tail { background: var(--tail) }
.stored, .held { width: 100% } .stored { background: var(--disk); position: relative }
.held { background: var(--memory); position: absolute; bottom: 0 }
.legend span { margin-right: 1.2rem; white-space: nowrap } .legend i { display: inline-block; width: 12px; height: 12px;
  border-radius: 2px; margin-right: .35rem; vertical-align: -1px }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
th, td { text-align: right; padding: .15rem .6rem; border-bottom: 1px solid var(--line) }
th:nth-child(-n+2), td:nth-child(-n+2), th:last-child, td:last-child { text-align: left }
.wide { overflow-x: auto }
"""
LEGEND = (
    ("var(--memory)", "in memory"),
    ("var(--disk)", "on disk only"),
    ("var(--text)", "text only"),
    ("var(--tail)", "newest, not sealed yet"),
    ("transparent; outline: 2px solid var(--mark)", "recalled for the newest answer"),
)
COLUMNS = ("turns", "where", "tokens", "position", "in memory", "saved", "memory", "disk", "episode")


def page(stats: Mapping[str, Any], episodes: Sequence[Mapping[str, Any]] = ()) -> str:
    """The page of a conversation with these figures and episodes."""
    found, names = cells(stats, episodes), [one_line(str(episode["name"])) or "no name" for episode in episodes]
    title = escape(one_line(str(stats["name"])))
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">",
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{title}: segments</title><style>{STYLE}</style></head><body>",
        f"<h1>{title}</h1>",
        *(f'<p class="muted">{escape(one_line(line))}</p>' for line in summary(stats)),
        '<div class="map">',
        *(_bar(cell, names) for cell in found),
        "</div>",
        '<p class="legend muted">',
        *(f'<span><i style="background: {colour}"></i>{meaning}</span>' for colour, meaning in LEGEND),
        "</p>",
        *_episodes(names, episodes),
        *_table(found, names),
        "</body></html>",
    ]
    return "\n".join(parts) + "\n"


def _bar(cell: Cell, names: Sequence[str]) -> str:
    """As high as all of it; what memory holds at the bottom, then what only the store has."""
    stored = max(cell.stored, cell.held)
    kinds = f"cell{' recalled' * cell.recalled}{' tail' * (cell.tier == 'tail')}{' gone' * (stored < 1)}"
    told = f"turns {cell.turns}, tokens {cell.start}-{cell.end}: {_where(cell)}"
    if cell.episode is not None:
        told += f"; {names[cell.episode]}"
    if cell.tier == "tail":
        return f'<div class="{kinds}" title="{escape(told)}"></div>'
    held = f'<div class="held" style="height: {100 * cell.held / stored if stored else 0:.0f}%"></div>'
    inside = f'<div class="stored" style="height: {100 * stored:.0f}%">{held}</div>'
    return f'<div class="{kinds}" title="{escape(told)}">{inside}</div>'


def _where(cell: Cell) -> str:
    if cell.tier == "part":
        return f"{100 * cell.held:.0f}% in memory"
    return GLYPHS[cell.kind][2]


def _episodes(names: Sequence[str], episodes: Sequence[Mapping[str, Any]]) -> list[str]:
    if not episodes:
        return []
    rows = (f"<li>{escape(name)} ({len(one['turns'])} turns)</li>" for name, one in zip(names, episodes, strict=True))
    return ["<h2>Episodes</h2><ul>", *rows, "</ul>"]


def _table(found: Sequence[Cell], names: Sequence[str]) -> list[str]:
    head = "".join(f"<th>{name}</th>" for name in COLUMNS)
    return [
        f'<h2>Segments</h2><div class="wide"><table><thead><tr>{head}</tr></thead><tbody>',
        *(f"<tr>{''.join(f'<td>{escape(text)}</td>' for text in _row(cell, names))}</tr>" for cell in found),
        "</tbody></table></div>",
    ]


def _row(cell: Cell, names: Sequence[str]) -> list[str]:
    return [
        cell.turns,
        _where(cell) + ", recalled" * cell.recalled,
        f"{cell.start}-{cell.end}",
        "" if cell.position is None else str(cell.position),
        f"{100 * cell.held:.0f}%",
        f"{100 * cell.stored:.0f}%",
        size(cell.nbytes),
        size(cell.disk),
        "" if cell.episode is None else names[cell.episode],
    ]
