"""Which sessions a line of the picker asks for: words by their letters, #tags, and in what order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

from textual.fuzzy import FuzzySearch

from kvchat.tui.rows import one_line

if TYPE_CHECKING:
    from kvchat.store.store import SessionInfo

MOST_WAYS = 1000
"""Ways to find a word's letters in a title that are compared; the count grows exponentially with the word."""


@dataclass(frozen=True, slots=True)
class Order:
    """A way to sort sessions, which is called `name`."""

    name: str
    key: Callable[[SessionInfo], Any]
    falling: bool = True


ORDERS = (
    Order("last used first", lambda info: info.updated),
    Order("by title", lambda info: title_of(info).casefold(), falling=False),
    Order("most turns first", lambda info: info.num_turns),
    Order("largest first", lambda info: info.nbytes),
)


@dataclass(frozen=True, slots=True)
class Query:
    """What was typed, taken apart.

    words  parts that a session's title or name holds, letter by letter
    tags   beginnings of tags that it has
    text   what its messages are searched for; None: they are not
    """

    words: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    text: str | None = None

    @classmethod
    def parse(cls, line: str) -> Query:
        """A line that begins with a slash searches messages; what begins with # is a tag."""
        line = line.strip()
        rest = line.removeprefix("/")
        tags = tuple(_folded(word[1:]) for word in rest.split() if len(word) > 1 and word.startswith("#"))
        words = [word for word in rest.split() if not word.startswith("#")]
        if rest != line:
            return cls(tags=tags, text=" ".join(words))
        return cls(tuple(map(_folded, words)), tags)

    def has_tags(self, info: SessionInfo) -> bool:
        """Whether a session has all the tags."""
        own = [_folded(tag) for tag in info.tags]
        return all(any(tag.startswith(wanted) for tag in own) for wanted in self.tags)


class Letters:
    """Finds the words of a query in titles and names."""

    def __init__(self, words: Sequence[str]) -> None:
        # Not with a Matcher, whose `highlight` takes what it highlights for markup.
        self._words, self._search = words, FuzzySearch(case_sensitive=True)

    def score(self, info: SessionInfo) -> float:
        """How well a session fits; 0 if a word is found neither in its title nor in its name."""
        title, name = _folded(title_of(info)), _folded(one_line(info.name))
        scores = [max(self._match(word, title)[0], self._match(word, name)[0]) for word in self._words]
        return sum(scores) if all(scores) else 0.0

    def places(self, text: str) -> list[int]:
        """The characters of a title or a name that were found in it."""
        folded = _folded(text)
        return sorted({place for word in self._words for place in self._match(word, folded)[1]})

    def _match(self, word: str, text: str) -> tuple[float, Sequence[int]]:
        first = _leftmost(word, text)
        if not first:
            return 0.0, ()
        if word not in text and prod(text.count(letter) for letter in word) > MOST_WAYS:
            return self._search.score(text, first), first
        return self._search.match(word, text)


def select(infos: Iterable[SessionInfo], query: Query, order: Order) -> list[SessionInfo]:
    """The sessions that are asked for: the best first if words are and the order is the usual one."""
    found = sorted(filter(query.has_tags, infos), key=order.key, reverse=order.falling)
    if not query.words:
        return found
    letters = Letters(query.words)
    scored = [(score, info) for info in found if (score := letters.score(info))]
    if order is ORDERS[0]:
        scored.sort(key=lambda pair: pair[0], reverse=True)
    return [info for _, info in scored]


def title_of(info: SessionInfo) -> str:
    """What a session is called in a list, safe to show: its title, or else its name."""
    return one_line(info.title).strip() or one_line(info.name)


def _leftmost(word: str, text: str) -> list[int]:
    """The first place for each letter after those before it; nothing if there is not one for each."""
    places, place = [], -1
    for letter in word:
        place = text.find(letter, place + 1)
        if place < 0:
            return []
        places.append(place)
    return places


def _folded(text: str) -> str:
    """Small letters, where that leaves every letter in its place."""
    small = text.lower()
    if len(small) == len(text):
        return small
    return "".join(low if len(low := char.lower()) == 1 else char for char in text)
