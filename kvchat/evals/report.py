"""Result lines as a table: means with bootstrap intervals, and how far each method is from kvchat's own.

Pairs and bytes are fractions of the full cache's, bytes as encoded and against bfloat16. An interval is the middle 95%
of means over resampled data: conversations are drawn with replacement, then questions (or facts) within each. With one
conversation it speaks of its questions only.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kvchat.evals.grid import Line

Table = npt.NDArray[np.float64]
"""(questions, 2): a figure and its weight; the mean is the sum of figures over the sum of weights."""

RESAMPLES = 1000

DISTANCE: dict[str, tuple[str, str | None]] = {
    "KL": ("kl", "tokens"),
    "agree": ("agree", "tokens"),
    "log-prob": ("logprob", "tokens"),
}
RECALL: dict[str, tuple[str, str | None]] = {"recall": ("match", None), "log-prob": ("logprob", "tokens")}
COLUMNS: dict[str, dict[str, tuple[str, str | None]]] = {
    "fidelity": DISTANCE,
    "choice": DISTANCE,
    "recall": RECALL,
    "far": RECALL,
    "locomo": {"F1": ("f1", None), "exact": ("match", None), "log-prob": ("logprob", "tokens")},
}
"""Column to the figure and the weight that it is a mean by; methods are compared in the first."""

_SHOWN = ("compress.scorer", "compress.keep_ratio", "codec.name")
"""Settings that have a column."""
_CHOSEN = ("compress.aggregate", "compress.allocate", "compress.coverage")
"""Those that a choice is named by."""
_LATER = {"recall": "turns later", "far": "tokens later"}
"""What distances between a fact and its question are counted in."""
_OURS = {"choice": "kvzip, global"}
"""What others are compared with, where it is not the session with KVzip."""


@dataclass(frozen=True, slots=True)
class Group:
    """All lines of one setting, over conversations."""

    model: str
    task: str
    method: str
    keep: float
    codec: str
    other: tuple[str, ...]
    """Settings that differ between groups, as text."""

    @classmethod
    def of(cls, line: Line, varying: Collection[str]) -> Group:
        """The group that a line belongs to; `varying` are the settings that tell groups apart."""
        method, hidden = line["method"], _CHOSEN if line["method"] == "choice" else ()
        if method == "choice":
            method = f"{line['scorer']}, {line['settings']['compress.allocate']}"
        elif method == "session":
            method = f"{line['scorer']} per turn"
        other = {key: line["settings"][key] for key in sorted({*varying} - {*hidden}) if key in line["settings"]}
        model = f"{line['model']} in {line['dtype']}"
        return cls(model, line["task"], method, line["keep"], line["codec"], tuple(map(_text, other.items())))


def _text(setting: tuple[str, Any]) -> str:
    key, value = setting
    return f"{key.partition('.')[2]} {'+'.join(map(str, value)) if isinstance(value, list) else value}"


def grouped(lines: Iterable[Line]) -> dict[Group, list[Line]]:
    """Lines by setting, every method from the most to the least kept."""
    lines = list(lines)
    given = [line["settings"] for line in lines if line["settings"]]
    # A setting that lines of another version lack tells them apart too.
    seen = {key: {json.dumps(settings.get(key)) for settings in given} for key in {k for s in given for k in s}}
    varying = [key for key, found in seen.items() if len(found) > 1 and key not in _SHOWN]
    groups: dict[Group, list[Line]] = {}
    for line in lines:
        groups.setdefault(Group.of(line, varying), []).append(line)
    return dict(sorted(groups.items(), key=lambda item: _order(item[0])))


def _order(group: Group) -> tuple[Any, ...]:
    return group.model, group.task, group.codec, -group.keep, group.method, group.other


def values(lines: Sequence[Line], figure: str, weight: str | None = None) -> list[Table]:
    """A figure and its weight for each question, an array a conversation; one asked at several turns is one row."""
    tables = []
    for line in lines:
        rows: dict[str, list[float]] = {}
        for q in line["questions"]:
            row = rows.setdefault(q["id"].partition("@")[0], [0.0, 0.0])
            row[:] = row[0] + q[figure], row[1] + (q[weight] if weight else 1.0)
        tables.append(np.array(list(rows.values()), float))
    return tables


def mean(tables: Sequence[Table]) -> float:
    """Weighted mean over all questions."""
    figure, weight = np.concatenate(tables).sum(axis=0)
    return float(figure / weight)


def interval(tables: Sequence[Table], seed: int = 0) -> tuple[float, float]:
    """The 95% bootstrap interval of the mean."""
    source, means = np.random.default_rng(seed), []
    for _ in range(RESAMPLES):
        drawn = [tables[index] for index in source.integers(len(tables), size=len(tables))]
        picked = [table[source.integers(len(table), size=len(table))] for table in drawn]
        means.append(mean(picked))
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def difference(ours: Sequence[Line], theirs: Sequence[Line], figure: str, weight: str | None) -> list[Table]:
    """Theirs minus ours, question by question, for the conversations and questions that both have."""
    mine = {(line["case"], q["id"]): q[figure] for line in ours for q in line["questions"]}
    paired = []
    for line in theirs:
        both = [q for q in line["questions"] if (line["case"], q["id"]) in mine]
        less = [{**q, figure: q[figure] - mine[line["case"], q["id"]]} for q in both]
        paired += [{**line, "questions": less}] if less else []
    return values(paired, figure, weight)


def markdown(lines: Sequence[Line]) -> str:
    """One table a model and task."""
    groups = grouped(lines)
    parts = []
    for model, task in dict.fromkeys((group.model, group.task) for group in groups):
        chosen = {group: found for group, found in groups.items() if (group.model, group.task) == (model, task)}
        parts.append(_table(task, model, chosen))
    return "\n\n".join(parts) + "\n"


def _table(task: str, model: str, groups: Mapping[Group, list[Line]]) -> str:
    lines = [line for found in groups.values() for line in found]
    far = _distances(lines) if task in _LATER else []
    first, *others = COLUMNS[task]
    names = ["method", "keep", "codec", "pairs", "bytes", f"{first} [95%]", *others]
    names += [f"{first}, {distance} {_LATER[task]}" for distance in far]
    names += ["of the full cache's"] if task == "recall" else []
    names.append(f"{first}, difference from ours [95%]")
    rows = [_row(task, group, groups, far) for group in groups]
    most = max(sum(len(line["questions"]) for line in found) for found in groups.values())
    cases = sorted({line["case"] for line in lines})
    head = f"**{task}, {model}**: {most} questions on {len(cases)} conversation(s): {', '.join(cases)}"
    return "\n".join([head, "", _cells(names), _cells(["---"] * len(names)), *rows])


def _distances(lines: Sequence[Line]) -> list[int]:
    return sorted({q["distance"] for line in lines for q in line["questions"]})


def _row(task: str, group: Group, groups: Mapping[Group, list[Line]], far: Sequence[int]) -> str:
    lines = groups[group]
    shares = [number(mean(values(lines, share))) for share in ("pairs", "bytes")]
    cells = [", ".join([group.method, *group.other]), f"{group.keep:g}", group.codec, *shares]
    for place, (figure, weight) in enumerate(COLUMNS[task].values()):
        tables = values(lines, figure, weight)
        cells.append(number(mean(tables)) + (f" [{_span(interval(tables))}]" if not place else ""))
    cells += [number(np.mean([q["match"] for x in lines for q in x["questions"] if q["distance"] == n])) for n in far]
    if task == "recall":
        cells.append(_share(group, groups))
    return _cells([*cells, _difference(task, group, groups)])


def _share(group: Group, groups: Mapping[Group, list[Line]]) -> str:
    """Of the facts that the full cache gives, those that this setting gives."""
    full = [line for other, lines in groups.items() if other.method == "full" for line in lines]
    known = {(line["case"], q["id"]) for line in full for q in line["questions"] if q["match"]}
    found = [q["match"] for line in groups[group] for q in line["questions"] if (line["case"], q["id"]) in known]
    return number(sum(found) / len(found)) if found else ""


def _difference(task: str, group: Group, groups: Mapping[Group, list[Line]]) -> str:
    """From KVzip per turn at the same keep and codec, which has as many pairs."""
    ours = Group(group.model, group.task, _OURS.get(task, "kvzip per turn"), group.keep, group.codec, group.other)
    if group == ours or ours not in groups:
        return ""
    figure, weight = next(iter(COLUMNS[task].values()))
    tables = difference(groups[ours], groups[group], figure, weight)
    return f"{number(mean(tables))} [{_span(interval(tables))}]" if tables else ""


def _span(ends: tuple[float, float]) -> str:
    return ", ".join(number(end) for end in ends)


def number(value: Any) -> str:
    """Three significant digits, no exponent unless it is tiny."""
    return f"{value:.1e}" if 0 < abs(value) < 1e-4 else f"{value:#.3g}"


def _cells(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
