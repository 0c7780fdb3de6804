"""Texts that would drive a terminal, break a layout or be taken for markup, and what is harmless."""

from __future__ import annotations

import re

from kvchat.terminal import FLOOD, UNSAFE

HOSTILE = {
    "clear": "\x1b[2J\x1b[H",
    "colour": "\x1b[31mred\x1b[0m",
    "cursor": "\x1b[999A\x1b[999Dover",
    "modes": "\x1b[?1049h\x1b[?1003h\x1b[?2004l\x1b[>4;2m\x1bc",
    "title": "\x1b]0;owned\x07",
    "link": "\x1b]8;;http://evil.example\x1b\\click\x1b]8;;\x1b\\",
    "clipboard": "\x1b]52;c;cm0gLXJm\x07",
    "colours of the terminal": "\x1b]4;1;#000000\x1b\\\x1b]11;?\x07",
    "device control": '\x1bP$q"p\x1b\\\x1bP1;1|17/68\x1b\\',
    "picture": "\x1b_Gf=100,a=T;AAAA\x1b\\",
    "report": "\x1b[6n\x1b[c\x1b[21t",
    "unfinished": "\x1b[",
    "C1": "\x9b2J\x9d0;t\x9c\x90q\x9c\x85\x8d",
    "bell and shift": "\x07\x07\x0e\x0fabc\x00",
    "backspace": "safe\b\b\b\bevil\x7f\x7f",
    "return": "rm -rf /\rls      ",
    "feeds": "a\x0bb\x0cc\x1cd\x1ee",
    "separators": "a\u2028b\u2029c",
    "bidi override": "user\u202etxt.exe\u202c",
    "bidi isolate": "\u2067abc\u2069\u2066\u202b\u202a",
    "zero width": "a" + "\u200b" * 300 + "b",
    "marks": "Z" + "\u0301\u0335\u0489" * 200 + "o",
    "Thai marks": "ก" + "\u0e47" * 300,
    "variations": "☃" + "\ufe0f" * 300,
    "tags": "a" + "".join(chr(0xE0000 + code) for code in range(0x20, 0x60)),
    "joiners": "👩" + "\u200d" * 300 + "💻",
    "Rich markup": "[bold red]x[/bold red][link=file:///etc/passwd]y[/link][/]",
    "Textual markup": "[@click=app.quit]quit[/] [$error]x[/] [reverse]z",
    "page": '<script>alert(1)</script><img src=x onerror="alert(2)">&lt;',
    "escaped": "http://a.example/%1b%5d52;c;cm0gLXJm%1b%5c &#x202e;txt &#x85; ![&#x2067;](http://a.example/%9b)",
    "tabs": "\t" * 100 + "end",
    "long word": "x" * 1_000_000,
    "long wide line": "日本語 " * 20_000,
}
ON_A_LINE = {name: text for name, text in HOSTILE.items() if not re.search(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", text)}
"""Those that the store takes for a title; what they do to a layout is left to see."""


def is_harmless(text: str, bold: bool = False) -> bool:
    """Whether a terminal would only show it; `bold` allows bold for what was found."""
    if bold:
        text = re.sub(r"\x1b\[(?:1|22)m", "", text)
    return not UNSAFE.search(text) and not FLOOD.search(text)
