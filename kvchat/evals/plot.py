"""Result lines as a picture: quality against resident bytes, one line a method and codec."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from kvchat.errors import InputError
from kvchat.evals.grid import Line
from kvchat.evals.report import COLUMNS, Group, grouped, mean, values


def draw(lines: Sequence[Line], file: Path) -> None:
    """Write a PNG, SVG or PDF of one panel a model and task.

    Raises:
        InputError: matplotlib is not installed.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    groups = grouped(lines)
    panels = list(dict.fromkeys((group.model, group.task) for group in groups))
    figure = Figure(figsize=(7, 4.5 * len(panels)), layout="constrained")
    for panel, axes in zip(panels, figure.subplots(len(panels), squeeze=False)[:, 0], strict=True):
        name, (what, weight) = next(iter(COLUMNS[panel[1]].items()))
        for label, chosen in _curves([group for group in groups if (group.model, group.task) == panel]).items():
            points = sorted(
                (mean(values(groups[group], "bytes")), mean(values(groups[group], what, weight))) for group in chosen
            )
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, linewidth=1, label=label)
        axes.set(
            title=f"{panel[1]}, {panel[0]}", xlabel="encoded bytes / bytes of the full cache in bfloat16", ylabel=name
        )
        axes.set_xscale("log")
        if name == "KL":
            axes.set_yscale("log")
        axes.grid(True, alpha=0.3)
        axes.legend(fontsize=7)
    save(figure, file)


def save(figure: Any, file: Path) -> None:
    """Write a matplotlib figure. Raises InputError for a suffix that it does not know."""
    try:
        figure.savefig(file, dpi=150)
    except ValueError as error:
        raise InputError(f"{file}: {error}") from None


def require_matplotlib() -> None:
    """Raises InputError if matplotlib is not installed."""
    if find_spec("matplotlib") is None:
        raise InputError("plots need matplotlib; pip install 'kvchat[eval]'")


def _curves(groups: Sequence[Group]) -> dict[str, list[Group]]:
    """Groups that differ only in how much is kept."""
    curves: dict[str, list[Group]] = {}
    for group in groups:
        curves.setdefault(", ".join([group.method, group.codec, *group.other]), []).append(group)
    return curves
