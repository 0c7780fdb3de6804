"""Model output cannot drive the terminal."""

from __future__ import annotations

import json
import re
import unicodedata

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from kvchat.terminal import FLOOD, MOST_MARKS, UNSAFE, Stream, neutralise, on_a_row, to_json

FLOODS = ["\u0301" * 500, "\u200b" * 500, "\ufe0f" * 500, "\u200d\ufe0f" * 300, "\U000e0041" * 400, "\u0e47" * 99]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[31mred\x1b[0m", "␛[31mred␛[0m"),
        ("\x1b]0;owned\x07", "␛]0;owned␇"),
        ("\x1b]52;c;cm0gLXJm\x1b\\", "␛]52;c;cm0gLXJm␛\\"),
        ("\x9b2J\x9d0;t\x9c", "�2J�0;t�"),
        ("a\x00b\x08c\x7f", "a␀b␈c␡"),
        ("user\u202etxt.exe\u202c \u2067x\u2069", "user�txt.exe� �x�"),
        ("one\r\ntwo\rthree", "one\ntwothree"),
        ("a\u2028b\x85c\x0cd", "a\nb�c␌d"),
        ("half \ud83d", "half �"),
    ],
)
def test_control_characters_lose_their_effect_and_stay_visible(text: str, shown: str) -> None:
    assert neutralise(text) == shown


def test_ordinary_text_is_unchanged() -> None:
    text = "# Tab\there\n* naïve café, 日本語, עברית, العربية, 👩‍💻 [bold]not markup[/bold]\n"
    assert neutralise(text) == text


@pytest.mark.parametrize("text", ["👨‍👩‍👧‍👦", "🏴󠁧󠁢󠁥󠁮󠁧󠁿", "❤️‍🔥", "1️⃣", "🏳️‍🌈", "בְּרֵאשִׁ֖ית", "ที่นี่", "مُحَمَّدٌ", "Việt"])
def test_signs_and_writing_made_of_several_characters_stay_whole(text: str) -> None:
    apart = unicodedata.normalize("NFD", text)
    assert (neutralise(text), neutralise(apart)) == (text, apart)
    assert "".join(map(Stream().step, text)) == text


@pytest.mark.parametrize("flood", FLOODS, ids=lambda flood: f"U+{ord(flood[0]):04X}")
def test_a_flood_of_characters_without_width_is_cut(flood: str) -> None:
    assert neutralise(f"a{flood}b") == f"a{flood[:MOST_MARKS]}�b"
    stream = Stream()
    shown = "".join(map(stream.step, f"a{flood}b"))
    assert not FLOOD.search(shown) and shown.startswith("a") and shown.endswith("b") and "�" in shown


@given(st.text())
def test_what_is_left_can_be_encoded_and_holds_no_control_character(text: str) -> None:
    safe = neutralise(text)
    safe.encode()
    assert all(unicodedata.category(char) != "Cc" for char in safe if char not in "\n\t")
    assert neutralise(safe) == safe


@given(st.text(), st.text())
def test_a_sequence_split_over_two_pieces_is_caught(first: str, second: str) -> None:
    assume(not FLOOD.search(neutralise(first + second)) and not FLOOD.search(first + second))
    assert neutralise(first) + neutralise(second) == neutralise(first + second)
    stream = Stream()
    assert stream.step(first) + stream.step(second) == neutralise(first + second)


@given(st.recursive(st.text() | st.integers(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)))
def test_json_says_the_same_and_holds_nothing_unsafe(value: object) -> None:
    text = to_json(value)
    assert not UNSAFE.search(text)
    assert json.loads(text) == value
    assert "\n" not in text


def test_json_keeps_halves_of_surrogate_pairs() -> None:
    assert to_json({"a": "x\ud83d\x9b\u202e"}) == '{"a": "x\\ud83d\\u009b\\u202e"}'


@given(st.text(), st.integers(2, 40))
def test_a_row_is_short_and_one_line(text: str, most: int) -> None:
    row = on_a_row(text, most)
    assert len(row) <= most and not re.search(r"[\n\t\r]", row)


def test_a_row_of_a_huge_text_is_its_beginning() -> None:
    assert on_a_row("word " * 1_000_000, 12) == "word word w…"
