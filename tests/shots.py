"""Screenshots of the main screens: `python -m tests.shots docs/screens` writes them as SVG, the same each time."""

from __future__ import annotations

import asyncio
import re
import sys
from pathlib import Path

from tests.scenes import SCENES, acted, undated

SIZE = (110, 32)
SHOTS = {"chat": "kvchat-dark", "map": "kvchat-dark", "inspector": "kvchat-dark", "picker": "kvchat-light"}
"""Scenes and themes."""
MOST_BYTES = 300_000


def bare(svg: str) -> str:
    """Without fonts from the web and the advertisement: nothing is loaded when it is shown."""
    svg = re.sub(r"<!-- Generated with Rich.*?-->\n?", "", svg)
    return re.sub(r"\s*@font-face\s*\{.*?\}", "", svg, flags=re.DOTALL)


async def shot(name: str, theme: str) -> str:
    """A scene as SVG."""
    async with acted(SCENES[name], SIZE, theme) as (app, _):
        return undated(bare(app.export_screenshot(title="kvchat")))


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "docs/screens")
    folder.mkdir(parents=True, exist_ok=True)
    for name, theme in SHOTS.items():
        svg = asyncio.run(shot(name, theme))
        assert len(svg.encode()) < MOST_BYTES, f"{name} is too large"
        (folder / f"{name}.svg").write_text(svg, "utf-8")
        print(f"written: {folder / name}.svg, {len(svg.encode()) / 1000:.0f} kB")


if __name__ == "__main__":
    main()
