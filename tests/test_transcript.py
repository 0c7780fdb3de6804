"""Facts about conversation files: what is written is read back exactly, and what is wrong is said exactly."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kvchat import transcript
from kvchat.errors import InputError

FORMATS = list(transcript.WRITERS)
ROOT = Path(__file__).resolve().parent.parent

text = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)
tricky = st.lists(
    st.sampled_from(["## User", "\\## User", "## Assistant ", "## System\r", "---", "\n", "\r\n", "\u2028", "x", " "])
)
content = (text | tricky.map("".join) | tricky.map("\n".join)).filter(str.strip)
turns = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": content}), min_size=1, max_size=6
)
system = st.lists(content.map(lambda words: {"role": "system", "content": words}), max_size=1)
conversations = st.builds(list.__add__, system, turns)


def reread(messages: transcript.Messages, format: str, path: Path, name: str = "trip") -> transcript.Messages:
    path.write_bytes(transcript.write(messages, format, name).encode())
    return transcript.read(path, format)


def failure(path: Path, content: str | bytes, format: str = "auto") -> str:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(InputError) as caught:
        transcript.read(path, format)
    assert "\n" not in str(caught.value)
    return str(caught.value).removeprefix(f"{path}: ")


@pytest.mark.parametrize("format", FORMATS)
@given(messages=conversations, name=text)
@example(messages=[{"role": "user", "content": "## User\n\n\\## Assistant\n"}], name='a "b"\n---\n')
def test_what_is_written_is_read_back_exactly(
    format: str, messages: transcript.Messages, name: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    assert reread(messages, format, tmp_path_factory.getbasetemp() / f"round-{format}", name) == messages


@pytest.mark.parametrize("format", FORMATS)
def test_the_format_is_recognised_by_the_text_alone(format: str, tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    path = tmp_path / "no-ending"
    path.write_text(transcript.write(messages, format, "trip"))
    assert transcript.read(path) == messages


def test_a_markdown_file_with_windows_line_ends_is_read_as_written(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "one\ntwo"}, {"role": "assistant", "content": "three"}]
    path = tmp_path / "trip.md"
    path.write_bytes(transcript.write(messages, "md", "trip").replace("\n", "\r\n").encode())
    assert transcript.read(path) == messages


def test_a_handwritten_markdown_file_needs_headings_only(tmp_path: Path) -> None:
    path = tmp_path / "trip.md"
    path.write_text("## User\nHi\n## Assistant\nHello")
    assert [message["content"] for message in transcript.read(path)] == ["Hi", "Hello"]


def test_the_example_conversation_can_be_imported() -> None:
    messages = transcript.read(ROOT / "sessions" / "example.json")
    assert [message["role"] for message in messages] == ["system", *["user", "assistant"] * 4]


def test_a_byte_order_mark_is_not_content(tmp_path: Path) -> None:
    path = tmp_path / "trip.json"
    path.write_bytes(b"\xef\xbb\xbf" + b'[{"role": "user", "content": "Hi"}]')
    assert transcript.read(path) == [{"role": "user", "content": "Hi"}]


def test_text_parts_are_joined(tmp_path: Path) -> None:
    path = tmp_path / "trip.json"
    parts = [{"type": "text", "text": "Hello, "}, {"type": "text", "text": "world"}]
    path.write_text(json.dumps([{"role": "user", "content": parts}]))
    assert transcript.read(path) == [{"role": "user", "content": "Hello, world"}]


def test_a_jsonl_line_may_hold_the_whole_conversation(tmp_path: Path) -> None:
    path = tmp_path / "trip.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": "Hi"}]}\n')
    assert transcript.read(path) == [{"role": "user", "content": "Hi"}]


def test_users_may_speak_twice_in_a_row(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "user", "content": "Anybody?"}]
    assert reread(messages, "json", tmp_path / "trip.json") == messages


def test_several_conversations_are_counted_and_refused(tmp_path: Path) -> None:
    line = '{"messages": [{"role": "user", "content": "Hi"}]}\n'
    expected = "holds 3 conversations; split it into one file each"
    assert failure(tmp_path / "many.jsonl", line * 3) == expected
    assert failure(tmp_path / "many.json", json.dumps([{"conversations": []}] * 3)) == expected


USER = '{"role": "user", "content": "Hi"}'


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (
            '[{"role": "user",\n  oops',
            "not JSON: Expecting property name enclosed in double quotes at line 2, column 3",
        ),
        ("[" * 100_000, "not a conversation: JSON that nests too deeply"),
        ("[" + "1" * 5000 + "]", "not a conversation: JSON that nests too deeply or holds too long a number"),
        ("", "not JSON: Expecting value at line 1, column 1"),
        ("[]", "the conversation is empty"),
        ('[{"role": "system", "content": "x"}]', "the conversation is only a system prompt"),
        ('{"messages": []}', "the conversation is empty"),
        ('{"title": "x"}', "expected a list of messages, or an object with a list 'messages' or 'conversations'"),
        ("12", "expected a list of messages, got a number"),
        (f"[{USER}, 3]", "message 2: expected an object with a role and content, got a number"),
        (
            f'[{USER}, {{"role": "wizard", "content": "x"}}]',
            "message 2: unknown role 'wizard'; known: system, user, assistant",
        ),
        ('[{"role": ["user"], "content": "x"}]', "message 1: unknown role ['user']; known: system, user, assistant"),
        ('{"conversations": [{"from": "bot", "value": "x"}]}', "message 1: unknown role 'bot'; known: human, gpt"),
        ('[{"content": "x"}]', "message 1: it has no role"),
        ('[{"role": "user"}]', "message 1: it has no content"),
        ('[{"role": "user", "content": 5}]', "message 1: content is a number, expected text"),
        (f'[{USER}, {{"role": "assistant", "content": " \\n"}}]', "message 2: the message is empty"),
        (f'[{USER}, {{"role": "system", "content": "x"}}]', "message 2: a system message can only be the first"),
        (
            '[{"role": "user", "content": [{"type": "image_url"}]}]',
            "message 1: content of type 'image_url' is not supported",
        ),
        ('[{"role": "user", "content": ["x"]}]', "message 1: a part of the content is text, expected an object"),
        ('[{"role": "assistant", "content": null, "tool_calls": [{}]}]', "message 1: tool calls are not supported"),
        ('[{"role": "tool", "content": "x"}]', "message 1: tool calls are not supported"),
        (
            '[{"role": "user", "content": "\\ud800"}]',
            "message 1: the message is not valid Unicode: character 1 is '\\ud800'",
        ),
        (f'[{USER}, {{"messages": [{USER}]}}]', "messages and whole conversations are mixed; split the file"),
        (b"\xff", "not UTF-8 text: byte 0 is 0xff"),
    ],
)
def test_a_broken_file_is_one_line_that_says_where_and_why(content: str | bytes, problem: str, tmp_path: Path) -> None:
    assert failure(tmp_path / "trip.json", content).startswith(problem)


def test_a_broken_jsonl_line_is_named(tmp_path: Path) -> None:
    problem = "not JSON: Expecting value at line 3, column 9"
    assert failure(tmp_path / "trip.jsonl", f'{USER}\n\n{{"role":}}\n') == problem


def test_markdown_without_headings_is_refused(tmp_path: Path) -> None:
    assert failure(tmp_path / "notes.md", "Just notes").startswith("text before the first heading")
    assert failure(tmp_path / "open.md", "---\ntitle: x\n") == "the front matter that begins with --- has no end"


def test_an_unknown_format_names_the_known_ones(tmp_path: Path) -> None:
    assert (
        failure(tmp_path / "trip.json", "[]", "yaml")
        == "unknown format 'yaml'; formats: auto, json, jsonl, sharegpt, md"
    )
    with pytest.raises(InputError, match="unknown format 'yaml'"):
        transcript.write([], "yaml", "trip")
