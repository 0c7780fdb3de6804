"""What conversations that a fit has not seen say of it.

A gate is compared with KVzip's own scores by rank correlation (Spearman). Policies are compared with other scorers by
the attention of later segments that is retained if a part of a segment's pairs is kept; protected pairs, which are kept
in any case, do not count.

Letters: L layers, H KV heads, T tokens of a segment that can be evicted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvchat.compress.gates import Gate
from kvchat.compress.order import ORDERS
from kvchat.compress.scorers import SCORERS, Network, Subject
from kvchat.evals.plot import require_matplotlib, save
from kvchat.fitting.collecting import Segment

KEEPS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
ALLOCATIONS = ("uniform", "layer", "global")
ALONE = ("kvp", "keydiff", "knorm", "lagkv", "streaming", "random")
"""Scorers that need no pass."""

Row = dict[str, Any]


def spearman(one: Tensor, other: Tensor) -> float:
    """Rank correlation of two vectors; 0 if one is constant."""
    ranks = torch.stack([_ranks(one), _ranks(other)])
    spread = ranks - ranks.mean(1, keepdim=True)
    product = spread.square().sum(1).prod().sqrt()
    return float(spread.prod(0).sum() / product) if product > 0 else 0.0


def _ranks(values: Tensor) -> Tensor:
    """Ranks, those of equal values their mean, float64."""
    _, places, counts = torch.unique(values, return_inverse=True, return_counts=True)
    ranks: Tensor = (counts.cumsum(0) - (counts - 1) / 2).double()[places]
    return ranks


def correlations(segments: Sequence[Segment], weights: Mapping[str, Tensor]) -> Row:
    """Of a gate with KVzip: over all pairs of a segment, and within a head; means over segments."""
    gate, pairs, heads = Gate({name: part.cpu() for name, part in weights.items()}), list[float](), list[float]()
    for segment in segments:
        free, target = segment.candidates, segment.tensor("kvzip")
        told = torch.stack([gate(layer, segment.tensor("states", layer)) for layer in range(len(target))])
        told, target = told[:, :, free], target[:, :, free]
        pairs.append(spearman(told.flatten(), target.flatten()))
        each = zip(told.flatten(0, 1), target.flatten(0, 1), strict=True)
        heads.append(sum(spearman(*pair) for pair in each) / (told.shape[0] * told.shape[1]))
    return {"all pairs": sum(pairs) / len(pairs), "within a head": sum(heads) / len(heads), "segments": len(segments)}


def retained(scores: Tensor, later: Tensor, allocate: str) -> list[float]:
    """Part of all later attention (L, H, T) that the best pairs by scores (L, H, T) get, at each of `KEEPS`."""
    order = ORDERS[allocate](scores).flatten().argsort(descending=True, stable=True)
    mass = later.flatten()[order].double().cumsum(0)
    return [float(mass[max(0, round(keep * len(mass)) - 1)] / mass[-1]) for keep in KEEPS]


def retained_masses(
    segments: Sequence[Segment], weights: Mapping[str, Tensor], network: Network, device: torch.device
) -> list[Row]:
    """A row for each way to compare heads and each scorer, means over segments; "oracle" knows what comes."""
    found: dict[tuple[str, str], list[list[float]]] = {}
    for segment in segments:
        subject, free, later = _subject(segment, weights, network, device), segment.candidates, segment.later()
        scores = {name: SCORERS[name](subject, len(free)).scores().cpu() for name in ALONE}
        scores |= {"kvzip": segment.tensor("kvzip"), "oracle": later}
        for allocate in ALLOCATIONS:
            for name, told in scores.items():
                curve = retained(told[:, :, free], later[:, :, free], allocate)
                found.setdefault((allocate, name), []).append(curve)
    return [
        {"heads": allocate, "scorer": name, **_by_keep(torch.tensor(curves).mean(0).tolist())}
        for (allocate, name), curves in found.items()
    ]


def _by_keep(curve: Sequence[float]) -> Row:
    return {f"{keep:g}": round(value, 4) for keep, value in zip(KEEPS, curve, strict=True)}


def _subject(segment: Segment, weights: Mapping[str, Tensor], network: Network, device: torch.device) -> Subject:
    """The segment as a scorer that needs no pass sees it."""
    keys, values = (segment.tensor(name).to(device) for name in ("keys", "values"))
    ids = tuple(segment.tensor("ids").tolist())
    nothing: Callable[[Any], tuple[int, ...]] = lambda _: ()  # noqa: E731
    return Subject(
        token_ids=ids,
        template=(False,) * len(ids),
        protected=tuple((~segment.candidates).tolist()),
        before=(),
        prefix_keys=[part[:, :0] for part in keys],
        encode=nothing,
        ask=nothing,
        start=segment.start,
        keys=list(keys),
        values=list(values),
        network=network,
        learned={name: part.to(device) for name, part in weights.items()},
    )


def draw(rows: Sequence[Row], file: Path) -> None:
    """Retained mass by the part that is kept, a panel for each way to compare heads. Raises InputError."""
    require_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.5), layout="constrained")
    for allocate, axes in zip(ALLOCATIONS, figure.subplots(1, len(ALLOCATIONS), sharey=True), strict=True):
        for row in rows:
            if row["heads"] == allocate:
                axes.plot(KEEPS, [row[f"{keep:g}"] for keep in KEEPS], marker="o", markersize=3, label=row["scorer"])
        axes.set(title=f"heads: {allocate}", xlabel="part of the pairs kept", ylabel="later attention retained")
        axes.grid(True, alpha=0.3)
        axes.legend(fontsize=7)
    save(figure, file)
