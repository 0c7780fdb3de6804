"""Settings written into config.toml: its comments, its order and whatever else stands there stay.

The file is replaced whole once the new one is on disk, and only by one that would be read without an error.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import Any

import tomlkit
from pydantic import ByteSize
from tomlkit.exceptions import TOMLKitError
from tomlkit.items import Comment, Whitespace
from tomlkit.items import Table as Section

from kvchat.config import Config, dotted
from kvchat.errors import ConfigError
from kvchat.files import written
from kvchat.meanings import MEANINGS
from kvchat.values import annotation, as_text, kept, value_of

Table = MutableMapping[str, Any]


def save(config: Config, values: Mapping[str, Any]) -> Config:
    """Write `values` into the file of `config`; its settings then, where no variable and no flag wins over the file.

    Raises:
        ConfigError: as of `write`.
    """
    origins = config.origins()
    free = [key for key in values if origins.get(key) in ("default", "config.toml")]
    new = {key: value_of(Config(), key) if values[key] is None else values[key] for key in free}
    after = config.replaced(new, "config.toml")  # refuses what does not go with a variable or a flag
    write(config.file, values)
    return after


def write(path: Path, values: Mapping[str, Any]) -> None:
    """Set `values`, by dotted key as in {"compress.keep_ratio": 0.3}; None = the default again.

    A file or section that is missing is made; a setting that is new to the file gets its meaning as a comment.

    Raises:
        ConfigError: the file is not TOML, cannot be written, or would not be accepted; it is as it was.
    """
    document = _read(path, values)
    for key, value in values.items():
        _put(document, key, value)
    config = Config.of_file(document.unwrap())
    for key, value in values.items():  # in the types of the settings: what was typed is text
        if value is not None and annotation(key) is not None:
            _put(document, key, kept(config, key, value))
    _replace(path, tomlkit.dumps(document))


def _read(path: Path, values: Mapping[str, Any]) -> tomlkit.TOMLDocument:
    """The file, with lines of settings in and out of comments as `values` need them."""
    try:
        text = path.read_bytes().decode("utf-8")
        document = tomlkit.parse(text)
        for key, value in values.items():
            text = _switched(text, key, key in dotted(document), value is not None)
        return tomlkit.parse(text)
    except FileNotFoundError:
        return tomlkit.document()
    except (TOMLKitError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}; nothing is written") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None


def _switched(text: str, key: str, is_there: bool, is_set: bool) -> str:
    """Take a line as `# seed = 1` out of its comment when it is set, and back when a setting has no default to show."""
    section, _, name = key.partition(".")
    has_default = annotation(key) is None or value_of(Config(), key) is not None
    if is_there == is_set or (is_there and has_default):
        return text
    before, after = ("", "# ") if is_there else ("# ", "")
    pattern = rf"(^\[{re.escape(section)}\][^\n]*$(?:\n(?!\[).*$)*?\n[ \t]*){before}({re.escape(name)})(?=[ \t]*=)"
    return re.sub(pattern, lambda found: found[1] + after + found[2], text, count=1, flags=re.MULTILINE)


def _put(document: tomlkit.TOMLDocument, key: str, value: Any) -> None:
    """Set one value; `key` may lead into a table of a setting, as in tui.keys.map."""
    *sections, name = key.split(".")
    if not sections or not all((*sections, name)):
        raise ConfigError(f"setting {key!r} needs a section, as in compress.keep_ratio")
    table: Table = document
    for depth, section in enumerate(sections):
        if section not in table:
            if value is None:
                return
            table[section] = tomlkit.inline_table() if depth else tomlkit.table()
        table = table[section]
        if not isinstance(table, MutableMapping):
            raise ConfigError(f"setting {'.'.join(sections[: depth + 1])} must be a table")
    _set(table, key, name, value)


def _set(table: Table, key: str, name: str, value: Any) -> None:
    default = None if annotation(key) is None else value_of(Config(), key)
    if value is None and (name not in table or default is None):
        table.pop(name, None)
    elif isinstance(value, Mapping) and isinstance(there := table.get(name), Section):
        for gone in there.keys() - value.keys():
            del there[gone]
        there.update(value)
    elif name in table or not isinstance(table, Section):
        table[name] = _item(default if value is None else value)
    else:
        _append(table, name, value, MEANINGS.get(key, ""))


def _append(table: Section, name: str, value: Any, meaning: str) -> None:
    """Add a line at the end of a section, before the empty line that parts it from the next and what stands there."""
    body, rest = table.value.body, []
    while body and isinstance(body[-1][1], Whitespace | Comment):
        rest.append(body.pop())
    while rest and isinstance(rest[-1][1], Comment):
        body.append(rest.pop())
    if body and not isinstance(last := body[-1][1], Section):
        last.trivia.trail = last.trivia.trail or "\n"  # there is none at the end of a file
    if meaning and not any(isinstance(item, Section) for _, item in body):  # behind those it would be theirs
        table.add(tomlkit.comment(meaning))
    table.add(name, _item(value))
    body.extend(reversed(rest))


def _item(value: Any) -> Any:
    if isinstance(value, ByteSize):
        return as_text(value) if value else 0
    if not isinstance(value, Mapping):
        return list(value) if isinstance(value, tuple) else value
    table = tomlkit.inline_table()
    table.update(value)
    return table


def _replace(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        mode = path.stat().st_mode & 0o777 if path.exists() else None
        with written(path, force=True) as stream:
            stream.write(text.encode("utf-8"))
        if mode is not None:
            path.chmod(mode)  # it is the user's file: whoever may read it still may
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from None
