"""The main screens look as stored: their text at two sizes, their colours in three themes."""

from __future__ import annotations

import re

import pytest
import textual

from tests.scenes import SCENES
from tests.shots import SHOTS, bare
from tests.snapshots import FOLDER, THEMES, Style, contrast, difference, taken

DIMMED = {"attach", "inspector"}
"""Where something is dimmed on purpose: the chat behind, and what was evicted."""


def styles(name: str, theme: str) -> list[Style]:
    """As stored."""
    text = (FOLDER / f"{name}-colours.txt").read_text("utf-8").split(f"{theme}\n")[1].split("kvchat-")[0]
    return [(one, behind, more) for one, behind, more in re.findall(r"  (\S+) on (\S+) ?(.*)", text)]


@pytest.mark.parametrize("name", SCENES)
async def test_a_screen_looks_as_stored(name: str) -> None:
    for file, text in (await taken(name)).items():
        if textual.__version__.startswith("8.2.") or not file.endswith("colours.txt"):
            assert not difference(file, text), difference(file, text)


@pytest.mark.parametrize("name", sorted(SCENES.keys() - DIMMED))
@pytest.mark.parametrize(("theme", "least"), [*zip(THEMES, (2.5, 2.3, 3.6), strict=True)])
def test_text_can_be_read_in_every_theme(name: str, theme: str, least: float) -> None:
    found = styles(name, theme)
    assert found and min(map(contrast, found)) >= least, min(found, key=contrast)
    assert contrast(found[0]) >= 4


@pytest.mark.parametrize("name", SCENES)
def test_themes_differ(name: str) -> None:
    assert len({tuple(styles(name, theme)) for theme in THEMES}) == 3


def test_contrast_is_that_of_the_web_guidelines() -> None:
    assert contrast(("#ffffff", "#000000", "")) == pytest.approx(21)
    assert contrast(("#777777", "#ffffff", "")) == pytest.approx(4.48, abs=0.01)


def test_screenshots_name_no_host_and_scenes_are_there() -> None:
    svg = '<svg xmlns="http://www.w3.org/2000/svg"><!-- Generated with Rich https://www.textualize.io -->\n<style>\n'
    svg += "    @font-face {\n src: url('https://x.y/F.woff2');\n }\n .a { font-family: Fira Code }</style></svg>"
    assert bare(svg).count("http") == 1 and "woff" not in bare(svg) and "Fira Code" in bare(svg)
    assert SHOTS.keys() <= SCENES.keys()
