"""Conversations as text files: JSON and JSON lines in OpenAI's form, ShareGPT, and Markdown.

A conversation is a list of {"role": ..., "content": ...}. What `write` makes, `read` gives back exactly. Nothing is
repaired: what is not understood is an InputError that names the file, the message (counted from 1) and the reason.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from kvchat.errors import InputError

ROLES = ("system", "user", "assistant")
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "system": "system", "user": "user", "assistant": "assistant"}
HEADING = re.compile(r"^(\\*)## (System|User|Assistant)[ \t\r]*$", re.MULTILINE)
"""A heading of the Markdown form; with backslashes in front it is content."""

Messages = list[dict[str, str]]


def read(path: Path, format: str = "auto") -> Messages:
    """The conversation in the file at `path`. `format` is "auto" or a key of READERS.

    Raises:
        InputError: not UTF-8, not of that format, more than one conversation, or a message that cannot be taken in.
        OSError: the file cannot be read.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text: byte {error.start} is {error.object[error.start]:#04x}") from None
    reader = READERS.get(_guess(path, text) if format == "auto" else format)
    if reader is None:
        raise InputError(f"unknown format {format!r}; formats: auto, {', '.join(READERS)}")
    try:
        return _checked(reader(text))
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def write(messages: Sequence[Mapping[str, str]], format: str, name: str) -> str:
    """The conversation as text. `format` is a key of WRITERS, `name` its title where the format has one.

    Raises:
        InputError: an unknown format.
    """
    writer = WRITERS.get(format)
    if writer is None:
        raise InputError(f"unknown format {format!r}; formats: {', '.join(WRITERS)}")
    return writer([{"role": message["role"], "content": message["content"]} for message in messages], name)


def check_text(text: str) -> str:
    """`text` itself, if it can be a message.

    Raises:
        InputError: it is empty or blank, or holds half of a surrogate pair (from a broken escape or argument).
    """
    if not text.strip():
        raise InputError("the message is empty")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        broken = error.object[error.start]
        raise InputError(f"the message is not valid Unicode: character {error.start + 1} is {broken!r}") from None
    return text


def _guess(path: Path, text: str) -> str:
    """The reader's name, from the file's ending, else from how the text begins."""
    by_ending = {".jsonl": "jsonl", ".ndjson": "jsonl", ".md": "md", ".markdown": "md", ".json": "json"}
    if path.suffix.lower() in by_ending:
        return by_ending[path.suffix.lower()]
    if not text.lstrip().startswith(("{", "[")):
        return "md"
    first, _, rest = text.strip().partition("\n")
    return "jsonl" if rest and _is_json(first) else "json"


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _checked(raw: list[Any]) -> Messages:
    """`raw` as messages, each one known to be usable."""
    if not raw:
        raise InputError("the conversation is empty")
    messages: Messages = []
    for number, item in enumerate(raw, start=1):
        try:
            messages.append(_message(item, first=number == 1))
        except InputError as error:
            raise InputError(f"message {number}: {error}") from None
    if messages[-1]["role"] == "system":
        raise InputError("the conversation is only a system prompt; give that with `kvchat chat --system`")
    return messages


def _message(item: Any, first: bool) -> dict[str, str]:
    """One message of OpenAI's or ShareGPT's form."""
    if not isinstance(item, dict):
        raise InputError(f"expected an object with a role and content, got {_kind(item)}")
    if "from" in item and "role" not in item:
        role, content = item["from"], item.get("value")
        known = SHAREGPT_ROLES
    else:
        role, content = item.get("role"), item.get("content")
        known = dict(zip(ROLES, ROLES, strict=True))
    if item.get("tool_calls") or item.get("function_call") or role in ("tool", "function"):
        raise InputError("tool calls are not supported")
    if not isinstance(role, str) or role not in known:
        raise InputError(f"unknown role {role!r}; known: {', '.join(known)}" if role is not None else "it has no role")
    if known[role] == "system" and not first:
        raise InputError("a system message can only be the first")
    return {"role": known[role], "content": check_text(_content(content))}


def _content(content: Any) -> str:
    """The text of a message's content: text itself, or a list of text parts, joined."""
    if isinstance(content, str):
        return content
    if content is None:
        raise InputError("it has no content")
    if not isinstance(content, list):
        raise InputError(f"content is {_kind(content)}, expected text")
    return "".join(_part(part) for part in content)


def _part(part: Any) -> str:
    if not isinstance(part, dict):
        raise InputError(f"a part of the content is {_kind(part)}, expected an object")
    if part.get("type") != "text":
        raise InputError(f"content of type {part.get('type')!r} is not supported, only text")
    if not isinstance(part.get("text"), str):
        raise InputError("a text part has no text")
    return str(part["text"])


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def _parse(text: str, line: int = 1) -> Any:
    """The JSON value in `text`, which begins on the file's line `line`."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"not JSON: {error.msg} at line {error.lineno + line - 1}, column {error.colno}") from None
    except (ValueError, RecursionError):
        raise InputError("not a conversation: JSON that nests too deeply or holds too long a number") from None


def _read_json(text: str) -> list[Any]:
    return _only_one(_conversations(_parse(text)))


def _read_jsonl(text: str) -> list[Any]:
    # Not splitlines: JSON text may hold U+2028 and its like unescaped.
    lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    return _only_one(_conversations([_parse(line, number) for number, line in lines]))


def _conversations(document: Any) -> list[list[Any]]:
    """Every conversation of a JSON document, as raw messages."""
    if isinstance(document, dict):
        for key in ("messages", "conversations"):
            if isinstance(document.get(key), list):
                return [document[key]]
        raise InputError("expected a list of messages, or an object with a list 'messages' or 'conversations'")
    if not isinstance(document, list):
        raise InputError(f"expected a list of messages, got {_kind(document)}")
    whole = [item for item in document if isinstance(item, dict) and ("messages" in item or "conversations" in item)]
    if not whole:
        return [document]
    if len(whole) < len(document):
        raise InputError("messages and whole conversations are mixed; split the file")
    return [conversation for item in document for conversation in _conversations(item)]


def _only_one(conversations: list[list[Any]]) -> list[Any]:
    if len(conversations) > 1:
        raise InputError(f"holds {len(conversations)} conversations; split it into one file each")
    return conversations[0]


def _read_md(text: str) -> list[Any]:
    # The writer begins with "---\n"; if that became "\r\n", an editor converted the file, not the author of a message.
    if text.partition("\n")[0].endswith("\r"):
        text = text.replace("\r\n", "\n")
    # The last section then ends as the others do: with the line's end and a blank line.
    body = _after_front_matter(text) + "\n"
    headings = [match for match in HEADING.finditer(body) if not match[1]]
    before = body[: headings[0].start()] if headings else body
    if before.strip():
        raise InputError(f"text before the first heading (## User, ## Assistant or ## System): {before.strip()[:40]!r}")
    ends = [*(match.start() for match in headings[1:]), len(body)][: len(headings)]
    return [
        {"role": match[2].lower(), "content": _unescaped(body[match.end() : end])}
        for match, end in zip(headings, ends, strict=True)
    ]


def _after_front_matter(text: str) -> str:
    if not text.startswith("---\n"):
        return text
    end = text.find("\n---\n", 3)
    if end < 0:
        raise InputError("the front matter that begins with --- has no end")
    return text[end + 5 :]


def _unescaped(section: str) -> str:
    """The content between two headings, less the blank lines and backslashes that `_write_md` added."""
    content = section.removeprefix("\n").removeprefix("\n").removesuffix("\n").removesuffix("\n")
    return HEADING.sub(lambda match: match[0].removeprefix("\\"), content)


def _write_json(messages: Messages, name: str) -> str:
    return json.dumps({"title": name, "messages": messages}, ensure_ascii=False, indent=1) + "\n"


def _write_jsonl(messages: Messages, name: str) -> str:
    return "".join(json.dumps(message, ensure_ascii=False) + "\n" for message in messages)


def _write_sharegpt(messages: Messages, name: str) -> str:
    origin = {"user": "human", "assistant": "gpt", "system": "system"}
    turns = [{"from": origin[message["role"]], "value": message["content"]} for message in messages]
    return json.dumps({"id": name, "conversations": turns}, ensure_ascii=False, indent=1) + "\n"


def _write_md(messages: Messages, name: str) -> str:
    sections = [
        f"\n## {message['role'].capitalize()}\n\n{HEADING.sub(lambda match: chr(92) + match[0], message['content'])}\n"
        for message in messages
    ]
    # A JSON string is a YAML string too.
    return f"---\ntitle: {json.dumps(name, ensure_ascii=False)}\n---\n" + "".join(sections)


READERS: dict[str, Callable[[str], list[Any]]] = {
    "json": _read_json,
    "jsonl": _read_jsonl,
    "sharegpt": _read_json,
    "md": _read_md,
}
WRITERS: dict[str, Callable[[Messages, str], str]] = {
    "json": _write_json,
    "jsonl": _write_jsonl,
    "sharegpt": _write_sharegpt,
    "md": _write_md,
}
