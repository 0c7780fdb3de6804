"""What an evaluation is run on: a conversation, turn by turn, and the questions asked along the way."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from kvchat import transcript
from kvchat.errors import InputError
from kvchat.evals import locomo

Message = Mapping[str, str]
Turn = tuple[Message, ...]

GENERAL = (
    "What did we talk about at the very beginning of our conversation?",
    "Summarise our conversation so far in three sentences.",
    "Which names of people or places came up in our conversation?",
    "What was the last thing I asked you?",
    "Which dates, times or numbers did I mention in our conversation?",
    "What have you learned about me from our conversation?",
    "Is there anything in our conversation that was left open?",
    "Which plans did we make in our conversation, and for when?",
    "What did you recommend to me, and why?",
    "What did I say that I like, and what did I say that I dislike?",
    "Quote one sentence that I wrote earlier in our conversation.",
    "If I forgot everything else from our conversation, what should I remember?",
)
"""Asked of a conversation that brings no questions."""


@dataclass(frozen=True, slots=True)
class Question:
    """One question, asked on a scratch tail, so that the conversation goes on as if it had not been asked.

    Turns are counted from 1. A reply that begins with `lead` is continued from there: the expected continuation is
    " " + `answer`.

    Attributes:
        id: unique in its case, the same in every run.
        text: the user's message.
        answer: what is expected; "" if nothing is.
        lead: how the reply begins, given to the model; "" if nothing is given.
        kind: "name", "number", "place" or "preference" for planted facts, a value of `locomo.KINDS`, or "plain".
        evidence: the turn after which the answer is known; 0 if there is none.
        asked_after: the turn after which the question is asked, not before `evidence`.
        corrected: whether the answer replaced an earlier one.
    """

    id: str
    text: str
    answer: str
    lead: str
    kind: str
    evidence: int
    asked_after: int
    corrected: bool = False


@dataclass(frozen=True, slots=True)
class Case:
    """A conversation and its questions.

    A turn begins with its user's message; only the first may lack one, if the assistant opens the conversation.
    """

    name: str
    system: str | None
    turns: tuple[Turn, ...]
    questions: tuple[Question, ...]

    def __post_init__(self) -> None:
        assert len({question.id for question in self.questions}) == len(self.questions)
        for question in self.questions:
            assert 0 <= question.evidence <= question.asked_after
            assert 1 <= question.asked_after <= len(self.turns)


def read(path: Path) -> Case:
    """The conversation in a file, with every question asked after the last turn.

    A file of LoCoMo brings its questions; any other conversation gets the `GENERAL` ones.

    Raises:
        InputError: neither a LoCoMo conversation nor a file that `transcript.read` takes.
        OSError: the file cannot be read.
    """
    tree = _tree(path)
    if isinstance(tree, list) and tree and all(map(locomo.is_locomo, tree)):
        raise InputError(f"{path}: holds {len(tree)} LoCoMo conversations; split it into one file each")
    try:
        if locomo.is_locomo(tree):
            return _from_locomo(path.stem, tree)
        return of_messages(path.stem, transcript.read(path))
    except InputError as error:
        problem = str(error).removeprefix(f"{path}: ")
        raise InputError(f"{path}: {problem} (expected a LoCoMo file or a conversation to import)") from None


def of_messages(name: str, messages: Sequence[Message]) -> Case:
    """A conversation that brings no questions, with the `GENERAL` ones; its system message is the first, if any."""
    system = messages[0]["content"] if messages[0]["role"] == "system" else None
    turns = _turns(messages if system is None else messages[1:])
    questions = tuple(
        Question(f"plain-{number}", text, "", "", "plain", 0, len(turns))
        for number, text in enumerate(GENERAL, start=1)
    )
    return Case(name, system, turns, questions)


def cut(case: Case, turns: int) -> Case:
    """The first turns, at most that many, and the questions whose evidence lies in them, asked no later than the end.

    Raises:
        InputError: `turns` is less than 1.
    """
    if turns < 1:
        raise InputError(f"cannot cut a conversation to {turns} turns; expected at least 1")
    last = min(turns, len(case.turns))
    known = [question for question in case.questions if question.evidence <= last]
    questions = tuple(replace(question, asked_after=min(question.asked_after, last)) for question in known)
    return replace(case, turns=case.turns[:last], questions=questions)


def spread(case: Case, at: Sequence[float], count: int, seed: int) -> Case:
    """The same conversation, probed after these fractions of its turns with up to `count` questions each.

    A probe takes questions whose evidence lies at or before it, spread evenly over the age of that evidence, none
    twice. A question gets the probe's turn into its id: "q12@181".

    Raises:
        InputError: no fraction is given, one is not in (0, 1], or `count` is less than 1.
    """
    wrong = [fraction for fraction in at if not 0 < fraction <= 1]
    if wrong or not at:
        raise InputError(
            f"probes lie at fractions above 0 and up to 1 of the turns, got {wrong[0] if wrong else 'none'}"
        )
    if count < 1:
        raise InputError(f"cannot ask {count} questions at a probe; expected at least 1")
    source = random.Random(seed)
    probes = sorted({max(1, round(fraction * len(case.turns))) for fraction in at})
    questions = [
        replace(question, id=f"{question.id}@{probe}", asked_after=probe)
        for probe in probes
        for question in _sample(case.questions, probe, count, source)
    ]
    return replace(case, questions=tuple(questions))


def asked(case: Case, turn: int) -> list[Question]:
    """The questions to ask once `turn` turns are fed, in their order."""
    return [question for question in case.questions if question.asked_after == turn]


def _sample(questions: Sequence[Question], probe: int, count: int, source: random.Random) -> list[Question]:
    """Up to `count` questions: for each of so many equal spans of the turns, the nearest to a random point in it."""
    left = [question for question in questions if question.evidence <= probe]
    source.shuffle(left)  # Of those equally near, the first is taken.
    chosen: list[Question] = []
    spans = min(count, len(left))
    for span in range(spans):
        point = (span + source.random()) * probe / spans
        nearest = min(left, key=lambda question: abs(question.evidence - point))
        left.remove(nearest)
        chosen.append(nearest)
    return chosen


def _tree(path: Path) -> object:
    """The JSON document in the file, or None if it is none."""
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return None


def _from_locomo(name: str, tree: Mapping[str, Any]) -> Case:
    system, *messages = locomo.conversation(tree)
    turns = _turns(messages)
    questions = tuple(
        Question(f"q{pair.number}", pair.question, pair.answer, "", pair.kind, pair.evidence, len(turns))
        for pair in locomo.pairs(tree)
    )
    return Case(name, system["content"], turns, questions)


def _turns(messages: Sequence[Message]) -> tuple[Turn, ...]:
    starts = [index for index, message in enumerate(messages) if index == 0 or message["role"] == "user"]
    return tuple(tuple(messages[start:end]) for start, end in pairwise([*starts, len(messages)]))
