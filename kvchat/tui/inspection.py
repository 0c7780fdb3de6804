"""One turn's KV drawn: which heads keep it, how it is scored, and its words, dimmed where they were evicted.

Values go in, `Content` comes out. Characters say all that colours say, and no colour stands behind text: terminals of
sixteen colours have no shades. Words of the user and the model are never markup.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from textual.content import Content

from kvchat.figures import size
from kvchat.segment_map import one_line
from kvchat.terminal import neutralise

if TYPE_CHECKING:
    from kvchat.inspecting import Bin, Inspection, Token

Part = tuple[str, str]
"""Text and its style."""

STEPS = "·▁▂▃▄▅▆▇█"
"""Of a share from none to all."""
RAMP = ("$foreground 35%", "$primary 60%", "$primary", "$success 80%", "$success")
"""Colours of the same, from low to high."""
SHADES = ("$foreground 38%", "$foreground 49%", "$foreground 61%", "$foreground 75%", "$foreground")
"""Of words from evicted with a low score to kept."""
STRONG = (*["$foreground 60%"] * 2, *["$foreground 80%"] * 2, "$foreground")
"""Of the same where signs say it too."""
MARKS = (("«", "»"), ("«", "»"), ("‹", "›"), ("‹", "›"), ("", ""))
"""Around words of a shade where there are no colours."""
KEPT = len(SHADES) - 1
MUTED, HEADING, CUT = "$foreground-muted", "bold $text-accent", "bold $text-warning"
TIERS = {
    "memory": "in memory",
    "part": "in memory in part",
    "disk": "on disk only",
    "text": "text only",
    "tail": "exact in memory, not sealed yet",
}
LABEL, MEAN = 8, 6
"""Columns before and behind a row of the heat map."""
TALL = 6
"""Lines of the histogram."""
MOST_TOKENS = 20_000
"""That are shown."""


def head(found: Inspection, width: int) -> Content:
    """The turn in figures, and how much of it is kept as a bar."""
    share, tokens = found.kept / found.pairs if found.pairs else 0.0, len(found.tokens)
    label = f"{found.kept} of {found.pairs} pairs kept "
    room = max(8, min(40, width - len(label) - MEAN))
    full = round(room * share)
    bar = [("━" * full, RAMP[-1]), ("─" * (room - full), MUTED), (f" {share:>4.0%}", "bold")]
    facts = [f"{tokens} token{'s' * (tokens != 1)}", f"{found.protected} protected", _where(found.tier)]
    held = [f"{size(found.bytes_in_memory)} in memory", f"{size(found.bytes_on_disk)} on disk"]
    made = [f"codec {one_line(found.codec) or 'none'}", f"scorer {one_line(found.scorer) or 'none'}"]
    lines = [" · ".join(part for part in facts if part), " · ".join([*held, *made])]
    return Content.assemble((lines[0], "bold"), "\n", (lines[1], MUTED), "\n", label, *bar)


def _where(tier: str) -> str:
    return TIERS.get(tier) or one_line(tier)


def heat(found: Inspection, width: int) -> Content:
    """Layers from left to right, heads from top to bottom; each cell is the share of its pairs that is kept."""
    layers = found.heat
    if not layers or not layers[0]:
        return Content.assemble(("none of its KV is known", MUTED))
    room = max(10, width - LABEL - MEAN)
    cell = max(1, min(3, room // len(layers)))
    lines, band = list[list[Part]](), -(-len(layers) // -(-len(layers) * cell // room))
    for low in range(0, len(layers), band):
        lines += [_axis(low, min(band, len(layers) - low), cell), *_heads(layers[low : low + band], cell)]
    return _joined([*lines, _legend()])


def _axis(low: int, number: int, cell: int) -> list[Part]:
    every, text = 5 if cell > 1 else 10, ""
    for layer in range(low, low + number):
        if layer == low or (layer % every == 0 and len(text) < (layer - low) * cell):
            text = text.ljust((layer - low) * cell) + str(layer)
    return [("layer".ljust(LABEL) + text, MUTED)]


def _heads(layers: Sequence[Sequence[float]], cell: int) -> Iterator[list[Part]]:
    """A line a head, and its mean."""
    for head in range(len(layers[0])):
        shares = [layer[head] for layer in layers]
        steps = [(STEPS[_step(share)] * cell, RAMP[_level(share)]) for share in shares]
        mean = f"{sum(shares) / len(shares):>{MEAN - 1}.0%}"
        yield [(f"head {head}".ljust(LABEL), MUTED), *_merged(steps), (mean, MUTED)]


def _step(share: float) -> int:
    """Nothing and everything have signs of their own."""
    last = len(STEPS) - 1
    return 0 if share <= 0 else last if share >= 1 else max(1, min(last - 1, round(share * last)))


def _level(share: float) -> int:
    last = len(RAMP) - 1
    return 0 if share <= 0 else max(1, min(last, round(share * last)))


def _legend() -> list[Part]:
    shares = [step / (len(STEPS) - 1) for step in range(len(STEPS))]
    signs = _merged((sign, RAMP[_level(share)]) for sign, share in zip(STEPS, shares, strict=True))
    return [(" " * LABEL, ""), ("none ", MUTED), *signs, (" all of its pairs kept", MUTED)]


def histogram(found: Inspection, width: int) -> Content:
    """How many pairs have which score, those kept below those evicted, and where the cut is."""
    bins = _stacked(found.histogram)
    if not any(kept + evicted for _, _, kept, evicted in bins):
        return Content.assemble(("its pairs have no scores: there was nothing to evict yet", MUTED))
    most = max(kept + evicted for _, _, kept, evicted in bins)
    # Few bins are shown wide, many narrow.
    cell = max(1, min(8, (width - LABEL) // len(bins)))
    bins = bins[: max(1, width - LABEL)]
    lines = [_bars(bins, most, line, cell) for line in reversed(range(TALL))]
    return _joined([*lines, *_cut(bins, cell)])


Stack = tuple[float, float, int, int]
"""Lowest and highest score, pairs kept, pairs evicted."""


def _stacked(bins: Iterable[Bin]) -> list[Stack]:
    """Scores of which pairs were kept in some heads and not in others are one bin."""
    found = dict[tuple[float, float], list[int]]()
    for one in bins:
        found.setdefault((one.low, one.high), [0, 0])[0 if one.kept else 1] += one.pairs
    return [(low, high, kept, evicted) for (low, high), (kept, evicted) in sorted(found.items())]


def _bars(bins: Sequence[Stack], most: int, line: int, cell: int) -> list[Part]:
    """One line of all bars, counted from the bottom, in eighths."""
    parts = [((str(most) if line == TALL - 1 else "").rjust(LABEL - 1) + " ", MUTED)]
    gap = " " if cell > 2 else ""
    for _, _, kept, evicted in bins:
        whole = max(1, round(8 * TALL * (kept + evicted) / most)) if kept + evicted else 0
        lower = round(whole * kept / max(1, kept + evicted)) - 8 * line
        eighths = max(0, min(8, whole - 8 * line))
        style = RAMP[-1] if lower >= 4 or lower >= eighths > 0 else SHADES[2]
        parts.append((" ▁▂▃▄▅▆▇█"[eighths] * (cell - len(gap)) + gap, style))
    return [*_merged(parts)]


def _cut(bins: Sequence[Stack], cell: int) -> list[Part] | list[list[Part]]:
    """The axis: thin below evicted scores, thick below kept ones, and the score at which that changes."""
    mostly = [kept >= evicted and kept > 0 for _, _, kept, evicted in bins]
    first = mostly.index(True) if True in mostly else len(bins)
    columns, low, high = cell * len(bins), bins[0][0], bins[-1][1]
    at = first * cell
    axis = [(" " * LABEL, ""), ("╌" * at, MUTED), ("━" * (columns - at), RAMP[-1])]
    if 0 < at < columns:
        axis[1:] = [("╌" * at, MUTED), ("┃", CUT), ("━" * (columns - at - 1), RAMP[-1])]
    ends, middle = (f"{low:.3g}", f"{high:.3g}"), f"cut {bins[first][0]:.3g}" if 0 < at < columns else ""
    place = min(max(len(ends[0]) + 1, at - len(middle) // 2), max(0, columns - len(ends[1]) - len(middle) - 1))
    below = f"{ends[0].ljust(place)}{middle}"
    scale = [(" " * LABEL + below, MUTED), (ends[1].rjust(max(len(ends[1]) + 1, columns - len(below))), MUTED)]
    names = [(" " * LABEL, ""), ("╌ evicted", SHADES[2]), ("  ", ""), ("━ kept", RAMP[-1]), ("  by score", MUTED)]
    return [axis, scale, names]


def words(found: Inspection, marked: bool) -> Content:
    """The turn's text: evicted tokens dimmed by their score, protected ones underlined.

    marked: brackets say what is dimmed, for terminals without shades.
    """
    parts, role = list[Part](), None
    shown = zip(found.tokens[:MOST_TOKENS], shades(found.tokens), strict=False)
    for (said_by, is_protected, shade), group in groupby(
        shown, key=lambda one: (one[0].role, one[0].protected, one[1])
    ):
        if said_by != role:
            between = "" if not parts else "\n" if parts[-1][0].endswith("\n") else "\n\n"
            parts += [(between, ""), (one_line(said_by) or "template", HEADING), ("\n", "")]
            role = said_by
        text = "".join(neutralise(token.text) for token, _ in group)
        before, after = MARKS[shade] if marked else ("", "")
        style = (STRONG if marked else SHADES)[shade]
        parts.append((f"{before}{text}{after}", f"underline {style}" if is_protected else style))
    if (more := len(found.tokens) - MOST_TOKENS) > 0:
        parts.append((f"\n… and {more} more tokens", MUTED))
    return Content.assemble(*(part for part in parts if part[0]), "\n\n", *_meaning(marked))


def _look(shaded: tuple[Token, int]) -> tuple[str, bool, int]:
    return shaded[0].role, shaded[0].protected, shaded[1]


def shades(tokens: Sequence[Token]) -> list[int]:
    """0 to 4 for each token.

    Heads evict for themselves, so that of most tokens something is kept: as many tokens as the kept pairs come to are
    4, those of which most is kept and whose scores are highest; the others less, in that order. Protected ones are 4.
    """
    free = sorted(_worth(token) for token in tokens if not token.protected)
    dimmed = len(free) - round(sum(kept for kept, _ in free))
    found = list[int]()
    for token in tokens:
        place = bisect_left(free, _worth(token))
        is_whole = token.protected or token.kept >= 1 or place >= dimmed
        found.append(KEPT if is_whole else KEPT * place // dimmed)
    return found


def _worth(token: Token) -> tuple[float, float]:
    return token.kept, token.score or 0.0


def _meaning(marked: bool) -> list[Part]:
    """What the shades say."""
    protected = ("protected", f"underline {SHADES[KEPT]}")
    if marked:
        signs = "‹evicted›  «evicted, low score»  ", MUTED
        return [signs, protected]
    steps = [("■", one) for one in SHADES[:KEPT]]
    told = [("evicted: ", MUTED), ("low score ", SHADES[0]), *steps, (" high score", SHADES[KEPT - 1])]
    return [*told, ("  ", ""), ("kept", SHADES[KEPT]), ("  ", ""), protected]


def _merged(parts: Iterable[Part]) -> Iterator[Part]:
    """Neighbours of one style as one."""
    for style, group in groupby(parts, key=lambda part: part[1]):
        yield "".join(text for text, _ in group), style


def _joined(lines: Iterable[Sequence[Part]]) -> Content:
    return Content("\n").join([Content.assemble(*line) for line in lines])
