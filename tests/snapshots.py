"""Snapshots of the main screens as text, and of their colours in a dark, a light, and a theme of high contrast.

`python -m tests.snapshots` says what differs from the files in tests/snapshots, `--update` writes them anew.
"""

from __future__ import annotations

import asyncio
import difflib
import sys
from collections import Counter
from pathlib import Path

from textual.color import Color
from textual.pilot import Pilot

from kvchat.tui.app import ChatApp
from tests.scenes import SCENES, acted, shown, still

FOLDER = Path(__file__).parent / "snapshots"
SMALL, LARGE = (80, 24), (120, 40)
THEMES = ("kvchat-dark", "kvchat-light", "kvchat-contrast")
Style = tuple[str, str, str]
"""Colour of the text, of what is behind it, and bold, underline and the like."""


async def taken(name: str) -> dict[str, str]:
    """All snapshots of a scene, by the name of their file."""
    found = dict[str, str]()
    async with acted(SCENES[name], SMALL) as (app, pilot):
        found[f"{name}-80x24.txt"] = shown(app)
        await pilot.resize_terminal(*LARGE)
        await still(app, pilot)
        found[f"{name}-120x40.txt"] = shown(app)
        seen = [line for theme in THEMES for line in [theme, *listed(await worn(app, pilot, theme))]]
        found[f"{name}-colours.txt"] = "\n".join([*seen, ""])
    return found


async def worn(app: ChatApp, pilot: Pilot[None], theme: str) -> Counter[Style]:
    """The colours in a theme."""
    app.theme = theme
    await still(app, pilot)
    return colours(app)


def colours(app: ChatApp) -> Counter[Style]:
    """How many letters and digits have which style."""
    found = Counter[Style]()
    for strip in app.screen._compositor.render_strips():
        for segment in strip:
            style = segment.style
            letters = sum(char.isalnum() for char in segment.text)
            if style is None or not letters:
                continue
            words = ["bold", "italic", "underline", "reverse"]
            more = " ".join(word for word in words if getattr(style, word))
            found[_hex(style.color), _hex(style.bgcolor), more] += letters
    return found


def _hex(color: object) -> str:
    triplet = getattr(color, "triplet", None)
    return triplet.hex if triplet else "default"


def listed(styles: Counter[Style]) -> list[str]:
    """A line each, the most used first."""
    ordered = sorted(styles.items(), key=lambda item: (-item[1], item[0]))
    return [f"  {text} on {behind} {more}".rstrip() for (text, behind, more), _ in ordered]


def contrast(style: Style) -> float:
    """As WCAG defines it, 1 to 21."""
    dim, bright = sorted(_luminance(Color.parse(one)) for one in style[:2])
    return (bright + 0.05) / (dim + 0.05)


def _luminance(color: Color) -> float:
    parts = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in color.normalized]
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]


def difference(file: str, text: str) -> str:
    """What is not as stored, as lines of a diff; nothing if all is."""
    path = FOLDER / file
    before = path.read_text("utf-8") if path.is_file() else ""
    if before == text:
        return ""
    lines = difflib.unified_diff(before.splitlines(), text.splitlines(), f"stored {file}", "now", lineterm="")
    return "\n".join(lines) + "\nif that is right: python -m tests.snapshots --update"


def main() -> int:
    differ = 0
    for name in SCENES:
        for file, text in asyncio.run(taken(name)).items():
            told = difference(file, text)
            if told and "--update" in sys.argv:
                FOLDER.mkdir(exist_ok=True)
                (FOLDER / file).write_text(text, "utf-8")
                print(f"written: {file}")
            elif told:
                differ += 1
                print(told)
    return int(differ > 0)


if __name__ == "__main__":
    sys.exit(main())
