"""A conversation as a page of its own: no scripts, nothing from elsewhere; what looks like HTML in it is text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from markdown_it import MarkdownIt

from kvchat import transcript
from kvchat.segment_map import one_line
from kvchat.terminal import neutralise

STYLE = """\
:root { color-scheme: light dark; --page: #fff; --ink: #1d2125; --muted: #667080; --line: #d8dde3; --asked: #f1f4f7 }
@media (prefers-color-scheme: dark) { :root { --page: #15181c; --ink: #e4e8ec; --muted: #93a0ad; --line: #2e353d;
  --asked: #1e242a } }
body { margin: 2rem auto; max-width: 48rem; padding: 0 1rem; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, sans-serif; overflow-wrap: anywhere }
h1 { font-size: 1.3rem } section { margin: 1.5rem 0 } section > h2 { font-size: .85rem; color: var(--muted); margin: 0 }
.said { white-space: pre-wrap; background: var(--asked); border-radius: 6px; padding: .6rem .9rem; margin: .3rem 0 }
pre { overflow-x: auto; border: 1px solid var(--line); border-radius: 6px; padding: .6rem .9rem }
pre, code { font-family: ui-monospace, monospace; font-size: .9em }
blockquote { border-left: 3px solid var(--line); margin-left: 0; padding-left: 1rem; color: var(--muted) }
table { border-collapse: collapse } th, td { border: 1px solid var(--line); padding: .2rem .6rem; text-align: left }
"""


class Reader(MarkdownIt):
    """Markdown, in which a link leads to a page or an address: any other could open a program or a file.

    An image is a link: it would be asked for from wherever the model says; the policy forbids it too.
    """

    def __init__(self) -> None:
        super().__init__("gfm-like", {"html": False, "breaks": True})
        self.disable("image")

    def validateLink(self, url: str) -> bool:
        """Whether this becomes a link; if not, it stays text."""
        return url.lower().startswith(("http://", "https://", "mailto:"))


def text_of(messages: Sequence[Mapping[str, str]], format: str, name: str) -> str:
    """The conversation as a file: as the page for "html", else as `transcript.write` does it."""
    return page(messages, name) if format == "html" else transcript.write(messages, format, name)


def page(messages: Sequence[Mapping[str, str]], name: str) -> str:
    """The page of a conversation of that name: answers as the Markdown that they are, all else as it was typed."""
    parser = Reader()
    title = escape(one_line(name))
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">",
        '<meta name="referrer" content="no-referrer">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{title}</title><style>{STYLE}</style></head><body>",
        f"<h1>{title}</h1>",
        *(_section(message["role"], message["content"], parser) for message in messages),
        "</body></html>",
    ]
    # The whole: Markdown turns `&#x202e;` and `%1b` in a link into the characters themselves.
    return neutralise("\n".join(parts) + "\n")


def _section(role: str, text: str, parser: MarkdownIt) -> str:
    said = parser.render(text) if role == "assistant" else f'<p class="said">{escape(text)}</p>'
    return f"<section><h2>{escape(role)}</h2>\n{said}</section>"
