"""LoCoMo: long conversations of two friends, with questions about them, read as a chat; and the score of an answer.

Maharana et al., "Evaluating Very Long-Term Conversational Memory of LLM Agents" (ACL 2024), arXiv 2402.17753.

Speaker A is the user and speaker B the assistant, so a turn is a line of A and the reply of B. Lines that one of them
says in a row are one message. A line with a photo ends with its caption; a day's first line begins with the date.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter
from typing import Any, TypeGuard, TypeVar

from kvchat.errors import InputError

KINDS = {1: "multi-hop", 2: "temporal", 3: "open", 4: "single-hop"}
"""Categories of questions. Category 5 asks about things that were never said, and has no answer."""

UTTERANCE = re.compile(r"D:?(\d+):(\d+)")
"""Day and line. The files hold "D8:6", but also "D8:6; D9:17", "D30:05", "D:11:26" and "D"."""

ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Line:
    """What one speaker says at once; `place` is its (day, line), or None if it stands in no file."""

    role: str
    text: str
    place: tuple[int, int] | None


@dataclass(frozen=True, slots=True)
class Pair:
    """A question and its answer; `number` counts all questions of the file from 1, `evidence` is a turn from 1."""

    number: int
    question: str
    answer: str
    kind: str
    evidence: int


def is_locomo(tree: object) -> TypeGuard[dict[str, Any]]:
    """Whether a JSON document is one conversation of LoCoMo, judged by its outermost names."""
    return isinstance(tree, dict) and isinstance(tree.get("conversation"), dict) and "qa" in tree


def conversation(tree: Mapping[str, Any]) -> list[dict[str, str]]:
    """The messages: a system message that names the speakers, then user and assistant by turns.

    If B opens, the user says "Hi!" first; a last message of A, which has no reply, is left out.

    Raises:
        InputError: something is missing or of the wrong type; the line names it.
    """
    talk = _field(tree, "conversation", dict)
    speakers = f"{_field(talk, 'speaker_a', str)} (user) and {_field(talk, 'speaker_b', str)} (assistant)"
    opening = f"This is a conversation between {speakers}, two friends, over several months."
    messages = [{"role": lines[0].role, "content": " ".join(line.text for line in lines)} for lines in _joined(talk)]
    return [{"role": "system", "content": opening}, *messages]


def pairs(tree: Mapping[str, Any]) -> list[Pair]:
    """The questions of categories 1 to 4, in the file's order, each with the turn of its last evidence.

    Evidence that stands nowhere in the conversation is passed over. A question left without any counts as known only
    after the last turn.

    Raises:
        InputError: something is missing or of the wrong type; the line names it.
    """
    found: list[Pair] = []
    messages = _joined(_field(tree, "conversation", dict))
    places = {line.place: index // 2 + 1 for index, lines in enumerate(messages) for line in lines if line.place}
    for number, item in enumerate(_field(tree, "qa", list), start=1):
        category = _field(item, "category", int)
        if category in KINDS:
            cited = UTTERANCE.findall(" ".join(map(str, _field(item, "evidence", list))))
            turns = [places[place] for day, line in cited if (place := (int(day), int(line))) in places]
            answer = str(_field(item, "answer", (str, int, float)))
            evidence = max(turns, default=len(messages) // 2)
            found.append(Pair(number, _field(item, "question", str), answer, KINDS[category], evidence))
    return found


def f1(prediction: str, answer: str) -> float:
    """Harmonic mean of precision and recall over the words that both share, 0 to 1.

    Words are normalised as for SQuAD (Rajpurkar et al., arXiv 1606.05250): lower case, without ASCII punctuation and
    the articles a, an and the. If either side has no word left, 1 if neither has, else 0.
    """
    given, expected = _words(prediction), _words(answer)
    if not given or not expected:
        return float(given == expected)
    shared = (Counter(given) & Counter(expected)).total()
    return 2 * shared / (len(given) + len(expected))


def exact(prediction: str, answer: str) -> bool:
    """Whether both are the same words in the same order, normalised as for `f1`."""
    return _words(prediction) == _words(answer)


def _words(text: str) -> list[str]:
    return ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split()


def _joined(talk: Mapping[str, Any]) -> list[list[Line]]:
    """The lines of each message: an even number of messages, those of the user first."""
    messages = [list(lines) for _, lines in groupby(_lines(talk), key=attrgetter("role"))]
    if messages and messages[0][0].role == "assistant":
        messages.insert(0, [Line("user", "Hi!", None)])
    if len(messages) < 2:
        raise InputError("not a LoCoMo conversation: its days hold no line that is replied to")
    return messages[: len(messages) // 2 * 2]


def _lines(talk: Mapping[str, Any]) -> Iterator[Line]:
    """Every line, in order. Days are counted from 1 without a gap; dates of days that hold no lines are passed over."""
    roles = {_field(talk, "speaker_a", str): "user", _field(talk, "speaker_b", str): "assistant"}
    day = 1
    while f"session_{day}" in talk:
        date = f"({_field(talk, f'session_{day}_date_time', str)}) "
        for item in _field(talk, f"session_{day}", list):
            speaker, place = _field(item, "speaker", str), UTTERANCE.fullmatch(_field(item, "dia_id", str))
            if speaker not in roles or not place:
                raise InputError(
                    f"not a LoCoMo conversation: session_{day} has a line {item['dia_id']!r} of {speaker!r}; "
                    f"expected 'D{day}:1' and so on, of {' or '.join(roles)}"
                )
            photo = f" [shares a photo of {item['blip_caption']}]" if item.get("blip_caption") else ""
            yield Line(roles[speaker], f"{date}{_field(item, 'text', str)}{photo}", (int(place[1]), int(place[2])))
            date = ""
        day += 1


def _field(item: object, name: str, kind: type[T] | tuple[type[T], ...]) -> T:
    """`item[name]`, which must be of that type."""
    value = item.get(name) if isinstance(item, dict) else None
    if not isinstance(value, kind):
        names = " or ".join(each.__name__ for each in (kind if isinstance(kind, tuple) else (kind,)))
        raise InputError(f"not a LoCoMo conversation: {name!r} is missing or not of type {names}")
    return value
