"""A conversation as a page: all of its words, and nothing that a browser would run or fetch."""

from __future__ import annotations

from html.parser import HTMLParser
from typing import Any

import pytest

from kvchat.transcript_page import page, text_of
from tests.hostile import HOSTILE, is_harmless

TAGS = {
    *("html", "head", "meta", "title", "style", "body", "h1", "h2", "h3", "section", "p", "br", "a", "em"),
    *("strong", "s", "ul", "ol", "li", "pre", "code", "blockquote", "hr", "table", "thead", "tbody", "tr", "th", "td"),
}


class Read(HTMLParser):
    """What a page says, and what stands in it that could do something."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.words, self.wrong, self.links = "", list[str](), list[str]()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.links += [str(given.pop("href"))] if tag == "a" else []
        self.wrong += [tag] if tag not in TAGS else []
        self.wrong += [name for name in given if name.startswith("on") or name in ("src", "href", "srcset", "style")]

    def handle_data(self, data: str) -> None:
        self.words += data


def said(*texts: str) -> list[dict[str, Any]]:
    return [{"role": "user" if place % 2 == 0 else "assistant", "content": text} for place, text in enumerate(texts)]


def test_a_page_has_what_was_said_and_answers_as_markdown() -> None:
    answer = "In **Italy**:\n\n- a\n\n```py\nx < 1\n```\n\n| a |\n| - |\n| b |"
    text = page(said("Where\n  is *Rome*?", answer), "trip <1>")
    assert "<title>trip &lt;1&gt;</title>" in text and "Where\n  is *Rome*?</p>" in text
    assert "<strong>Italy</strong>" in text and "x &lt; 1\n</code>" in text and "<td>b</td>" in text
    assert text_of(said("Hi"), "html", "trip") == page(said("Hi"), "trip")
    assert text_of(said("Hi"), "jsonl", "trip").startswith('{"')


@pytest.mark.parametrize(
    "text",
    [
        *HOSTILE.values(),
        *("<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "![x](https://evil.example/x.png)"),
        *("</p></section><a", "[x](javascript:alert(1))", "[x](data:text/html,<script>)", "<style>*{"),
        *("[x](ms-msdt:/id)", "[x](//evil.example)", "[x](../a.hta)", "<smb://evil.example/x>"),
        "```<b onclick=x>\n</code><script>\n```",
    ],
)
def test_nothing_in_a_page_does_anything(text: str) -> None:
    written = page(said(text, text), text)
    read = Read(written)
    assert not read.wrong and is_harmless(written)
    assert all(link.startswith(("http://", "https://", "mailto:")) for link in read.links)
    assert "default-src 'none'" in written
