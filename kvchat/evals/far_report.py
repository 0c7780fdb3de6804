"""What far recall found, as tables: by distance, along the feeding, and whether all is there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from kvchat.evals.grid import Line
from kvchat.evals.report import grouped, number


def markdown(lines: Sequence[Line]) -> str:
    """All tables of result lines of `far`."""
    parts = [table([*by_distance(lines)])]
    seen: list[Any] = []
    for line in lines:
        if line["spans"] and line["spans"] not in seen:
            seen.append(line["spans"])
            told = f"**along the feeding, {line['model']}, {line['case']}**, at the end of every stretch"
            parts.append("\n\n".join([told, table(line["spans"]), table([line["record"]])]))
    return "\n\n".join(parts) + "\n"


def by_distance(lines: Sequence[Line]) -> Iterator[dict[str, Any]]:
    """A row a setting and distance.

    Tokens back, right answers with recall and those of a session that is given the right turn alone, segments of
    which more was brought back, questions for which that with the fact was one of them, the part of it that was there
    when the question was asked, and milliseconds: of recall, the most of it, and of the first token without it.
    """
    for group, found in grouped(lines).items():
        questions = [question for line in found for question in line["questions"]]
        for distance in sorted({question["distance"] for question in questions}):
            mine = [question for question in questions if question["distance"] == distance]
            yield {
                "setting": ", ".join([group.method, *group.other]),
                "asked at": distance,
                "tokens back": _mean(mine, "back"),
                "questions": len(mine),
                "recall": _mean(mine, "match"),
                "right turn alone": _mean(mine, "alone_match"),
                "log-prob": _mean(mine, "logprob"),
                "of the turn alone": _mean(mine, "alone_logprob"),
                "segments brought": _mean(mine, "brought"),
                "the right one": _mean(mine, "came"),
                "its pairs there": _mean(mine, "right"),
                "recall ms": _mean(mine, "recall_ms"),
                "at most": max(question["recall_ms"] for question in mine),
                "first token ms": _mean(mine, "first_ms"),
            }


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows with the same names."""
    names = list(rows[0])
    cells = [names, ["---"] * len(names), *([_text(row[name]) for name in names] for row in rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def _mean(questions: Sequence[Mapping[str, Any]], figure: str) -> float:
    return sum(float(question[figure]) for question in questions) / len(questions)


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else number(value)
    return str(value)
