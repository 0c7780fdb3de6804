"""Model output cannot drive the terminal."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvchat.terminal import neutralise


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


@given(st.text())
def test_what_is_left_can_be_encoded_and_holds_no_control_character(text: str) -> None:
    safe = neutralise(text)
    safe.encode()
    assert all(unicodedata.category(char) != "Cc" for char in safe if char not in "\n\t")
    assert neutralise(safe) == safe


@given(st.text(), st.text())
def test_a_sequence_split_over_two_pieces_is_caught(first: str, second: str) -> None:
    assert neutralise(first) + neutralise(second) == neutralise(first + second)
