"""Answers as they are drawn: how text is cut into parts, what streaming shows, and that nothing in it is obeyed."""

from __future__ import annotations

import random
import re
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import pytest
from textual.app import App, ComposeResult
from textual.containers import VerticalScroll
from textual.pilot import Pilot

from kvchat.tui import code
from kvchat.tui.answer import Answer
from kvchat.tui.code import CodeBlock
from kvchat.tui.lines import Lines, row_starts
from kvchat.tui.markdown_lines import inline, lines_of, parser
from kvchat.tui.splitting import LONGEST_LINE, MOST_SHOWN, SECTION, Clipper, Splitter, Step, clip, code_blocks
from kvchat.tui.thought import Heading, Thought
from tests.tui_host import wait_until

MIXED = """# Title

Some **bold** words and a list:

- one
  - inner
- two
   ```python
   def f(x):
       return x
   ```
| a | b |
|---|---|
| 1 | 2 |

> quoted

```
plain
```

The [end](http://example.org/x)."""
REASONED = "<think>\nOne moment.\nIt is 4.\n</think>\n\nThe answer is **4**."


class Host(App[None]):
    def compose(self) -> ComposeResult:
        yield VerticalScroll()

    @property
    def shown(self) -> str:
        strips = self.screen._compositor.render_strips()
        return "\n".join("".join(part.text for part in strip).rstrip() for strip in strips)


@asynccontextmanager
async def showing(answer: Answer, size: tuple[int, int] = (80, 60)) -> AsyncIterator[tuple[Host, Pilot[None]]]:
    host = Host()
    async with host.run_test(size=size) as pilot:
        await host.query_one(VerticalScroll).mount(answer)
        await pilot.pause()
        yield host, pilot


def split(text: str) -> list[tuple[str, str, str]]:
    return joined(Splitter().feed(text, final=True))


def joined(steps: Sequence[Step]) -> list[tuple[str, str, str]]:
    """Steps as values, neighbours that add to one part joined."""
    found: list[tuple[str, str, str]] = []
    for step in steps:
        if step.act == "add" and found and found[-1][0] == "add":
            found[-1] = ("add", step.kind, found[-1][2] + step.text)
        else:
            found.append((step.act, step.kind, step.text))
    return found


# -- cutting ---------------------------------------------------------------------------------------------------------


def test_prose_code_and_reasoning_are_parts() -> None:
    found = split("<think>\nhm\n</think>\n\nSee:\n\n```py\nx\n```\nDone")
    assert found == [
        *(("open", "thought", ""), ("add", "thought", "\nhm\n"), ("close", "thought", "")),
        *(("open", "prose", ""), ("add", "prose", "See:\n\n"), ("close", "prose", "")),
        *(("open", "code", "py"), ("add", "code", "x\n"), ("close", "code", "")),
        *(("open", "prose", ""), ("add", "prose", "Done"), ("close", "prose", "")),
    ]


@pytest.mark.parametrize(
    "text",
    [
        MIXED,
        REASONED,
        "<think>a</think>b",
        "<think>never ends",
        "no beginning\n</think>\nanswer with `` ` and <think>in the middle</think>",
        "~~~\n```\n~~~ \n~~~~\nopen to the end",
        "```a\n`` `\n ```` \nafter\n\n\n",
    ],
)
def test_pieces_of_any_size_are_cut_as_the_whole(text: str) -> None:
    source, whole = random.Random(7), split(text)
    for _ in range(60):
        splitter, steps, place = Splitter(), list[Step](), 0
        while place < len(text):
            size = source.choice((1, 2, 3, 9, 30))
            steps += splitter.feed(text[place : place + size])
            place += size
        assert joined([*steps, *splitter.feed("", final=True)]) == whole


def test_text_is_held_back_only_while_it_may_be_a_mark() -> None:
    splitter = Splitter()
    assert joined(splitter.feed("Hel")) == [("open", "prose", ""), ("add", "prose", "Hel")]
    assert joined(splitter.feed("lo\n``")) == [("add", "prose", "lo\n")]
    assert joined(splitter.feed("x`` is")) == [("add", "prose", "``x`` is")]
    assert joined(splitter.feed("\n```")) == [("add", "prose", "\n")]
    assert joined(splitter.feed("py\n"))[1:] == [("open", "code", "py")]


def test_long_prose_goes_on_in_another_part_at_a_paragraph_but_not_in_a_list() -> None:
    paragraphs = "word " * (SECTION // 5 + 1) + "\n\nnext\n\n"
    assert [step[0] for step in split(paragraphs)].count("open") == 2
    assert [step[0] for step in split("- word" * SECTION + "\n\n- next\n")].count("open") == 1


def test_what_a_screen_cannot_hold_is_left_out_and_counted() -> None:
    assert clip("a" * (LONGEST_LINE + 5) + "\nb") == "a" * LONGEST_LINE + " … (+5 characters, copied with the rest)\nb"
    much = clip("line\n" * MOST_SHOWN)
    assert len(much) < MOST_SHOWN + 100 and "copied with the rest" in much
    text = ("x" * 9000 + "\n") * 3
    clipper = Clipper()
    assert "".join(clipper.feed(text[at : at + 77]) for at in range(0, len(text), 77)) + clipper.end() == clip(text)


def test_the_code_of_an_answer_is_had_without_fences_and_indentation() -> None:
    assert code_blocks(MIXED) == ["def f(x):\n    return x", "plain"]
    assert code_blocks("```\n" + "y" * 10_000) == ["y" * 10_000]


# -- lines -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words", "rows"),
    [
        ("one two three", True, ["one two ", "three"]),
        ("one two three", False, ["one two th", "ree"]),
        ("unbreakable-word", True, ["unbreakabl", "e-word"]),
        ("漢字漢字漢字", False, ["漢字漢字漢", "字"]),
        ("", True, [""]),
    ],
)
def test_lines_are_wrapped_by_the_cells_they_take(text: str, words: bool, rows: list[str]) -> None:
    starts = row_starts(text, 10, words)
    assert [text[start:end] for start, end in zip(starts, [*starts[1:], None], strict=True)] == rows


def test_lists_quotes_and_links_become_lines_with_marks() -> None:
    lines = lines_of(parser().parse("3. a\n   - b\n4. c\n\n> d\n> > e\n\n[x](http://y.z) <http://y.z> `c`"))
    assert [line.first.plain + line.text.plain for line in lines] == [
        *("3. a", "   ◦ b", "4. c", "", "▌ d", "▌ ", "▌ ▌ e", ""),
        "x ‹http://y.z› http://y.z c",
    ]
    assert lines[1].rest.plain == "     "


async def test_lines_that_are_added_piece_by_piece_are_those_of_the_whole() -> None:
    host = Host()
    async with host.run_test(size=(40, 20)) as pilot:
        whole, grown = Lines("one\ntwo\n\nthree"), Lines()
        await host.query_one(VerticalScroll).mount(whole, grown)
        for piece in ("o", "ne\nt", "wo\n", "\nthr", "ee"):
            grown.add(piece)
            await pilot.pause()
        assert grown.plain == whole.plain == "one\ntwo\n\nthree"
        assert grown.num_lines == whole.num_lines == 4


# -- drawing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [MIXED, REASONED])
async def test_a_streamed_answer_looks_as_a_finished_one(text: str) -> None:
    async with showing(Answer(text)) as (host, _):
        expected = host.shown
    answer = Answer(clock=lambda: 0.0)
    async with showing(answer) as (host, pilot):
        for at in range(0, len(text), 9):
            await answer.grow(text[at : at + 9])
            if at % 27 == 0:
                await answer._due()
        await answer.finish(text)
        await pilot.pause()
        await wait_until(lambda: host.shown.replace(" for 0 s", "") == expected)
        assert answer.source == answer.text == text


async def test_what_a_streamed_answer_says_is_seen_before_it_ends() -> None:
    answer = Answer()
    async with showing(answer) as (host, _):
        await answer.grow("Look:\n\n```python\nx = 1\ny")
        await wait_until(lambda: "x = 1" in host.shown and "y" in host.shown)
        assert "```" not in host.shown
        await answer.grow(" = 2\n")
        await wait_until(lambda: "y = 2" in host.shown)


async def test_code_is_coloured_once_and_only_when_it_is_complete(monkeypatch: pytest.MonkeyPatch) -> None:
    coloured = list[str]()
    real = code.coloured
    monkeypatch.setattr(code, "coloured", lambda text, language: coloured.append(text) or real(text, language))
    answer = Answer()
    async with showing(answer) as (host, pilot):
        await answer.grow("```python\n")
        for number in range(30):
            await answer.grow(f"value = {number}\n")
            await answer._due()
        await pilot.pause()
        assert coloured == [] and "value = 29" in host.shown
        await answer.finish(answer.text + "```\n")
        await wait_until(lambda: coloured)
        await wait_until(lambda: host.query_one(CodeBlock)._lines[0].text.spans)
        assert len(coloured) == 1 and coloured[0].startswith("value = 0\nvalue = 1\n")


async def test_drawing_waits_ten_times_as_long_as_it_took() -> None:
    now = 0.0
    answer = Answer(clock=lambda: now)
    async with showing(answer) as (_, pilot):
        await answer.grow("a")
        await answer._due()
        await pilot.pause()
        assert answer._earliest == pytest.approx(Answer.SHORTEST)
        answer._rest(begun=-0.05)
        assert answer._earliest == pytest.approx(0.5)
        answer._rest(begun=-7.0)
        assert answer._earliest == pytest.approx(Answer.LONGEST)


async def test_reasoning_is_folded_into_its_length_and_opens_by_key_or_click() -> None:
    async with showing(Answer(REASONED)) as (host, pilot):
        assert "▸ thought · 5 words" in host.shown and "moment" not in host.shown
        assert "The answer is 4." in host.shown
        host.query_one(Answer).toggle_thoughts()
        await pilot.pause()
        assert "▾ thought · 5 words" in host.shown and "One moment.\n" in host.shown
        await pilot.click(Heading)
        assert "moment" not in host.shown


async def test_reasoning_that_is_being_written_tells_its_time_and_may_be_open() -> None:
    now = 10.0
    answer = Answer(clock=lambda: now)
    async with showing(answer) as (host, pilot):
        await answer.grow("<think>let me")
        await answer._due()
        answer.toggle_thoughts()
        now = 13.0
        await answer.grow(" see")
        await answer._due()
        await pilot.pause()
        assert "▾ thinking… 3 s · 3 words" in host.shown and "let me see" in host.shown
        await answer.finish(answer.text)  # its end never comes
        await pilot.pause()
        assert "▾ thought for 3 s · 3 words" in host.shown and "let me see" in host.shown
        assert len(host.query(Thought)) == 1


async def test_reasoning_whose_beginning_stood_in_the_prompt_is_folded_at_its_end() -> None:
    answer = Answer()
    async with showing(answer) as (host, pilot):
        await answer.grow("I should add.\n\nTwo and two.\n")
        await answer._due()
        await pilot.pause()
        assert "Two and two." in host.shown
        await answer.finish(answer.text + "</think>\n\nFour.")
        await pilot.pause()
        assert "▸ thought · 6 words" in host.shown and "Four." in host.shown and "Two and two." not in host.shown


async def test_an_answer_that_ends_otherwise_than_it_was_streamed_is_drawn_anew() -> None:
    answer = Answer()
    async with showing(answer) as (host, pilot):
        await answer.grow("wrong ```")
        await answer.finish("right")
        await pilot.pause()
        assert "right" in host.shown and "wrong" not in host.shown


async def test_a_link_that_is_defined_later_is_shown() -> None:
    answer = Answer()
    async with showing(answer) as (host, pilot):
        await answer.grow("See [it][1].\n\nMore.\n\n")
        await answer._due()
        await answer.finish(answer.text + "[1]: http://example.org\n")
        await pilot.pause()
        assert "See it ‹http://example.org›." in host.shown


HOSTILE = {
    "escapes": "\x1b]0;title\x07 \x1b[2J \x9b1m \r hidden \x08\x7f",
    "bidi": "abc \u202edef\u202c \u2066x\u2069",
    "markup": "[red]x[/red] [@click=app.quit]y[/] $text {{z}} <b>w</b> &amp; \\[",
    "nested": ">" * 500 + " x\n" + "- " * 500 + "x\n" + "[" * 2000 + "*" * 2000,
    "table": "|" * 600 + "\n" + "|-" * 600 + "|\n",
    "fences": "```" + "`" * 900 + "\n```\n~~~\n\x1b[31m```\n" * 3,
    "tags": "</think></think>\n<think><think>\n</think>\n</think>\n",
    "headings": "# [x](javascript:alert(1)) ![i](file:///etc/passwd)\n===\n---\n",
    "wide": "漢" * 3000 + "\u0301" * 3000,
}


@pytest.mark.parametrize("name", HOSTILE)
async def test_hostile_text_is_shown_and_breaks_nothing(name: str) -> None:
    text = HOSTILE[name]
    answer = Answer()
    async with showing(answer, size=(60, 30)) as (host, pilot):
        for at in range(0, len(text), 400):
            await answer.grow(text[at : at + 400])
            await answer._due()
        await answer.finish(text)
        await answer.grow("")
        await pilot.pause()
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", host.shown.replace("\n", ""))
        assert answer.text == text


async def test_a_line_of_a_megabyte_is_cut_for_the_screen_only() -> None:
    text = "x" * 1_000_000
    async with showing(Answer(text)) as (host, _):
        answer = host.query_one(Answer)
        assert "(+996000 characters, copied with the rest)" in " ".join(host.shown.split())
        assert answer.text == text and answer.size.height < 100


async def test_text_is_selected_in_code_as_it_was_written() -> None:
    async with showing(Answer("```\n" + "abcdefghij" * 9 + "\nnext\n```")) as (host, pilot):
        block = host.query_one(CodeBlock)
        await pilot.mouse_down(block, offset=(2, 1))
        await pilot.hover(block, offset=(6, 3))
        await pilot.mouse_up(block, offset=(6, 3))
        assert (host.screen.get_selected_text() or "").rstrip("\n") == "abcdefghij" * 9 + "\nnext"


def test_lines_end_where_the_model_ends_them() -> None:
    (token,) = parser().parseInline("Old pond\na frog leaps in")
    assert inline(token.children or []).plain == "Old pond\na frog leaps in"
